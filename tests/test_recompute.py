"""recompute: what is cheaper to compute than to send is computed where it is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import assert_same
from helpers import Bless, diff_of, leaves_alone, load
from torch import nn

from stagecut import Pipe, pipe_split, pipeline
from stagecut.backend.ranks.mailbox import Mailbox
from stagecut.ir.check.verifier import verify
from stagecut.ir.errors import SplitError, VerifyError
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text
from stagecut.passes.partition import Partition
from stagecut.passes.pipeline import default_pipeline
from stagecut.passes.recompute import Recompute
from stagecut.passes.runner import run_passes


def test_sources_move_to_their_users(bless: Bless) -> None:
    bless("recompute-sources.diff", diff_of(Recompute(), load("sources", Partition())))


def test_written_sources_stay(bless: Bless) -> None:
    bless("recompute-written-sources.diff", diff_of(Recompute(), load("written-sources", Partition())))


def test_what_is_large_and_cheap_is_computed_where_it_is_read(bless: Bless) -> None:
    bless("recompute-masks.diff", diff_of(Recompute(), load("masks")))


def test_the_user_decides(bless: Bless) -> None:
    asked = Recompute((("mask", "relay"), ("hidden", "recompute")))
    bless("recompute-asked.diff", diff_of(asked, load("masks")))


def test_a_stage_of_sources_is_not_emptied() -> None:
    leaves_alone(Recompute(), load("only-sources", Partition()))


def test_nothing_to_do() -> None:
    leaves_alone(Recompute(), load("shared"))
    leaves_alone(Recompute(), load("crossing"))


@pytest.mark.parametrize(
    ("routes", "why"),
    [
        ({"maks": "recompute"}, "did you mean 'mask'"),
        ({"mask": "send"}, "'send' is no route"),
        ({"positions": "recompute"}, "it is an input of the model"),
        ({"noise": "recompute"}, "cannot be computed anew"),
        ({"cache.1": "recompute"}, "cannot be computed anew"),
    ],
)
def test_what_cannot_be_is_refused(routes: dict[str, str], why: str) -> None:
    with pytest.raises(SplitError, match=why):
        Recompute(tuple(routes.items())).run(load("masks"))


def test_a_recompute_must_be_one() -> None:
    """The verifier holds the transfer to what the stage does."""

    program = load("sources")
    run_passes(program, default_pipeline(), check=True)
    transfer = next(t for t in program.transfers if t.route == "recompute")
    assert f"recompute({'%ones_1'})" in text(program)
    assert text(parse(text(program))) == text(program)
    transfer.recomputed = program.stages[0].ops[-1].results[0]
    with pytest.raises(VerifyError, match="V13"):
        verify(program)


class Masked(nn.Module):
    """Attention with a mask of 4 MiB, made from positions, a buffer and a narrow row, in the first stage and read in all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("bias", torch.zeros(1024))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        mask = torch.where(positions[:, None] >= positions[None, :], self.bias, -1e9)
        x = torch.softmax(self.first(x).sum(-1) + mask, -1) @ x
        pipe_split()
        x = torch.softmax(self.second(x).sum(-1) + mask, -1) @ x
        pipe_split()
        return torch.softmax(self.third(x).sum(-1) + mask, -1) @ x


def _cut(**options: Any) -> tuple[Masked, Pipe, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model, inputs = Masked(), (torch.randn(1024, 8), torch.arange(1024))
    return model, pipeline(model, inputs, **options), inputs


def _bytes_sent(pipe: Pipe) -> int:
    sent = [t for t in pipe.program.transfers if t.route in ("send", "relay") and t.source is not None]
    return sum((t.value.type.nbytes() or 0) * (t.target - (t.source or 0)) for t in sent)  # type: ignore[union-attr]


def test_masks_do_not_travel() -> None:
    model, pipe, inputs = _cut()
    assert {t.route for t in pipe.program.transfers} == {"feed", "send", "recompute"}
    assert _bytes_sent(pipe) == 2 * 1024 * 8 * 4
    assert next(e for e in pipe.program.state if e.name == "bias").stages == (0, 1, 2)
    assert pipe.verify(*inputs).ok
    box = Mailbox(pipe.program, pipe.stages)
    assert_same(box.forward(list(inputs))[0].detach(), model(*inputs).detach(), "separate processes")
    assert {*pipe.state_dict()} == {*model.state_dict()}


def test_masks_travel_when_asked() -> None:
    model, pipe, inputs = _cut()
    name = next(t.value.hint for t in pipe.program.transfers if t.route == "recompute")
    again, asked, _ = _cut(routes={name: "relay"})
    assert all(t.route != "recompute" for t in asked.program.transfers)
    assert _bytes_sent(asked) > 50 * _bytes_sent(pipe)
    assert asked.verify(*inputs).ok
    assert torch.equal(asked(*inputs)[0], pipe(*inputs)[0])
    assert again is not model


def test_what_carries_gradient_is_computed_anew_when_asked() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            s = h.tanh()
            pipe_split()
            return self.b(h) * s + s

    model, x = Skip(), torch.randn(3, 4)
    plain, asked = pipeline(model, (x,)), pipeline(model, (x,), routes={"tanh": "recompute"})
    assert [len(p.program.stages[0].outputs) for p in (plain, asked)] == [2, 1]
    assert asked.verify(x).ok


def test_an_input_travels_from_the_first_stage_when_asked() -> None:
    model, pipe, inputs = _cut(routes={"positions": "relay"})
    relayed = [(t.target, t.via) for t in pipe.program.transfers if t.source is None and t.route == "relay"]
    assert relayed == [(1, (0,)), (2, (0, 1))]
    assert text(parse(text(pipe.program))) == text(pipe.program)
    assert pipe.verify(*inputs).ok
    assert model


def test_a_view_of_what_is_written_later_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Written(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            part = (x[:1].expand(3, -1) * 4).long()
            pipe_split()
            x.select(0, 0).zero_()
            pipe_split()
            return part * part + x.sum().long()

    monkeypatch.setattr("stagecut.passes.recompute.START", 0)
    x = torch.randn(3, 4)
    assert pipeline(Written(), (x,)).verify(x).ok


def test_values_that_are_read_many_times_take_no_time_without_end() -> None:
    """A frozen model: nothing carries gradient, and each value is read twice, so paths back double with every op."""

    class Doubling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(50):
                x = x * x.tanh()
            pipe_split()
            return x + 1

    x = torch.randn(4096, 1024)
    pipe = pipeline(Doubling(), (x,))
    assert [t.route for t in pipe.program.transfers if t.source is not None] == ["send"]


def test_a_copy_that_nothing_reads_any_more_is_gone() -> None:
    """What reads it was itself moved to a later stage; a transfer of what another pass takes away goes with it."""

    class Chain(nn.Module):
        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            a = torch.full((4,), 2.0)
            pipe_split()
            b = x * 2
            c = a.double()
            pipe_split()
            return b * c.float() + index

    pipe = pipeline(Chain(), (torch.ones(4), torch.ones(4)))
    for stage in pipe.program.stages:
        for op in stage.ops:
            assert op.results[0].uses or op.results[0] in stage.outputs

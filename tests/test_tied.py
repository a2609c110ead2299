"""tied=: a parameter that several stages read has a copy in each, or is sent by the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import assert_same
from torch import nn

from stagecut import Pipe, pipe_split, pipeline
from stagecut.backend.ranks.mailbox import Mailbox
from stagecut.ir.errors import InputError, SplitError
from stagecut.ir.text.parser import parse
from stagecut.ir.text.printer import text

IDS = torch.randint(0, 11, (3, 5))


class Tied(nn.Module):
    """Embedding and head share a weight; a scale is read by all stages; a norm is shared by two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("offset", torch.ones(8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids) * self.scale + self.offset
        pipe_split()
        h = self.block(h) * self.scale
        pipe_split()
        return self.head(h * self.scale + self.offset)


def _pipe(tied: Any) -> tuple[Tied, Pipe]:
    torch.manual_seed(0)
    model = Tied()
    return model, pipeline(model, (IDS,), tied=tied)


def _places(pipe: Pipe) -> dict[str, tuple[tuple[int, ...], str | None]]:
    return {e.name: (e.stages, e.share) for e in pipe.program.state if e.share}


def test_all_are_sent() -> None:
    _, pipe = _pipe("transmit")
    sent = (0,), "transmit"
    assert _places(pipe) == {"scale": sent, "embed.weight": sent, "offset": ((0, 2), "replicate")}
    assert {"embed.weight", "head.weight"} <= {*pipe.stages[0].state_dict()}
    assert "head.weight" not in pipe.stages[2].state_dict()


def test_one_is_sent() -> None:
    _, pipe = _pipe({"head.weight": "transmit"})
    assert _places(pipe) == {
        "scale": ((0, 1, 2), "replicate"), "embed.weight": ((0,), "transmit"), "offset": ((0, 2), "replicate"),
    }  # fmt: skip


@pytest.mark.parametrize("tied", ["replicate", "transmit", {"scale": "transmit"}])
def test_results_are_the_models(tied: Any) -> None:
    model, pipe = _pipe(tied)
    assert pipe.verify(IDS).ok
    assert {*pipe.state_dict()} == {*model.state_dict()}
    assert text(parse(text(pipe.program))) == text(pipe.program)
    box = Mailbox(pipe.program, pipe.stages)
    (found,) = box.forward([IDS])
    expected = model(IDS)
    assert_same(found.detach(), expected.detach(), "output")
    for output in (found, expected):
        output.square().sum().backward()
    box.backward()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(box.gradients()[name], parameter.grad)


def test_a_parameter_that_is_returned_and_sent() -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = x * self.weight
            pipe_split()
            return y + 1, self.weight

    model, x = Returned(), torch.randn(4)
    pipe = pipeline(model, (x,), tied="transmit")
    assert pipe.program.state[0].stages == (0,)
    assert pipe.verify(x).ok


def test_refusals() -> None:
    with pytest.raises(InputError, match="tied='transmt' is not known"):
        _pipe("transmt")
    with pytest.raises(SplitError, match=r"did you mean 'head\.weight'"):
        _pipe({"head.weigth": "transmit"})
    torch.manual_seed(0)
    with pytest.raises(SplitError, match="a module kept whole holds it"):
        pipeline(Tied(), (IDS,), tied={"head.weight": "transmit"}, leaf_modules=["head"])

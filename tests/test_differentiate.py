"""The roles of stages in the IR: what they show, that they read back, and that they compute autograd's gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cluster.matrix import cut
from cluster.models import SUBJECTS
from helpers import load
from torch import nn

from stagecut import Pipe, RolesError, parse, pipe_split, pipeline, text, to_dot, to_html
from stagecut.backend.stages.modules import find
from stagecut.ir.errors import ParseError
from stagecut.ir.ops import is_heavy
from stagecut.ir.run.backward import run_roles
from stagecut.ir.text.life import life_of_value
from stagecut.ir.types import value_bytes


class Net(nn.Module):
    """A weight of two stages, a skip connection, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.lin, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x @ self.w)
        skip = x
        pipe_split()
        x = torch.tanh(self.norm(x) @ self.w)
        pipe_split()
        return self.lin(x) + skip  # type: ignore[no-any-return]


def test_the_roles_of_a_small_model(bless: Callable[[str, str], None]) -> None:
    pipe = pipeline(Net(), (torch.randn(2, 4),), check=None)
    program, _ = pipe.differentiated()
    bless("differentiated.ir", text(program))
    assert text(pipe.program) == text(pipeline(Net(), (torch.randn(2, 4),), check=None).program)


def test_the_text_reads_back() -> None:
    program = load("differentiated")
    again = parse(text(program))
    assert text(again) == text(program)
    assert [len(stage.saved) for stage in again.stages] == [2, 5, 1]
    assert [str(value.gradient_of) for value in again.cotangents] == ["%add"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gradient(%add)", "gradient(%add, -)", "2 gradients for 1 values"),
        ("backward_input 2 (", "backward_input 3 (", "there is no stage 3 before this"),
        ("backward_input 2 (", "backward_weight 2 (", "not the place of a backward_weight of stage 2"),
        ("relay(1)  # 32 B\n  transfer %tanh_1.grad", "relay(0)  # 32 B\n  transfer %tanh_1.grad", "goes through stages"),
    ],
)
def test_a_fault_in_the_text_is_told(old: str, new: str, message: str) -> None:
    source = text(load("differentiated"))
    assert old in source
    with pytest.raises(ParseError, match=message):
        parse(source.replace(old, new, 1))


def test_less_is_saved_where_light_ops_are_computed_again() -> None:
    saved, heavy = [], []
    for recompute in (False, True):
        _, pipe = cut(SUBJECTS["Llama"], 2)
        program, _ = pipe.differentiated(recompute)
        saved.append(sum(value_bytes(value.type) or 0 for stage in program.stages for value in stage.saved))
        ops = [op for _, block in program.backward_blocks() for op in block.ops]
        heavy.append(sum(map(is_heavy, ops)))
    assert saved[1] < saved[0] / 2
    assert heavy[0] == heavy[1]


def test_a_value_that_is_saved_dies_in_the_backward() -> None:
    program = load("differentiated")
    life = life_of_value(program, "tanh")
    assert [(use.place.stage, use.place.target) for use in life.uses][2:] == [
        (1, "aten.native_layer_norm_backward.default"),
        (0, "aten.tanh_backward.default"),
    ]
    crossings = life_of_value(program, "tanh.grad").crossings
    assert [(crossing.source, crossing.target, crossing.route, crossing.via) for crossing in crossings] == [(2, 0, "relay", (1,))]


def test_the_page_shows_a_program_with_its_backward() -> None:
    program = load("differentiated")
    assert "backward_weight 0" in to_html([("roles", text(program), 0.0)], program, title="roles")
    assert "stage-2" in to_dot(program)


def _tensors(pipe: Pipe) -> dict[str, torch.Tensor]:
    tensors = {}
    for stage, block in zip(pipe.stages, pipe.program.stages, strict=True):
        for names in block.state.values():
            for name in names:
                tensor = find(stage, name)
                assert tensor is not None
                tensors[name] = tensor.detach().clone()
    return tensors


def check(model: nn.Module, pipe: Pipe, *args: Any, recompute: bool = False, **kwargs: Any) -> None:
    """The roles give the outputs of the pipe and the gradients of autograd."""
    program, constants = pipe.differentiated(recompute)
    assert text(parse(text(program))) == text(program)
    flat = pipe.flatten(args, kwargs)
    tensors = _tensors(pipe) | constants.tensors
    outputs = pipe(*args, **kwargs)
    places = {value: place for place, value in enumerate(program.outputs)}
    roots = [outputs[places[value.gradient_of]] for value in program.cotangents]
    cotangents = [torch.randn_like(root) for root in roots]
    torch.autograd.backward(roots, cotangents)
    results, gradients = run_roles(program, flat, tensors, cotangents)
    for mine, expected in zip(results, outputs, strict=True):
        torch.testing.assert_close(mine, expected)
    by_name = {name: gradients.get(entry.value) for name, entry in program.name_owners().items()}
    for name, parameter in model.named_parameters():
        assert (by_name[name] is None) == (parameter.grad is None), name
        torch.testing.assert_close(by_name[name], parameter.grad)
    for value, argument in zip(program.inputs, flat, strict=True):
        if isinstance(argument, torch.Tensor) and argument.requires_grad:
            torch.testing.assert_close(gradients[value], argument.grad)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("name", ["ResNet", "two towers", "Llama", "UNet"])
def test_the_interpreter_gives_the_gradients_of_autograd(name: str, stages: int) -> None:
    torch.manual_seed(0)
    model, pipe = cut(SUBJECTS[name], stages)
    check(model, pipe, recompute=stages == 3, **SUBJECTS[name].inputs(2))


def test_an_input_that_requires_grad() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 4, requires_grad=True)
    check(model, pipeline(model, (x,), check=None), x)


def test_frozen_weights_have_no_gradient() -> None:
    torch.manual_seed(0)
    model = Net()
    model.lin.requires_grad_(False)
    model.w.requires_grad_(False)
    check(model, pipeline(model, (torch.randn(2, 4),), check=None), torch.randn(2, 4))
    program, _ = pipeline(model, (torch.randn(2, 4),), check=None).differentiated()
    assert [sum(len(block.ops) for block in stage.backward) for stage in program.stages] == [0, 4, 1]


def test_a_stage_without_a_backward_is_named() -> None:
    pipe = pipeline(Net(), (torch.randn(2, 4),), check=None, leaf_modules=["norm"])
    with pytest.raises(RolesError, match=r"stage 1 has no backward in the program: module\.norm runs as a whole"):
        pipe.differentiated()


class Remembers(nn.Module):
    """A state of the caller's that grows in one stage, and of which another reads a row."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, cache: SimpleNamespace) -> torch.Tensor:
        cache.rows = torch.cat([cache.rows, torch.tanh(self.lin(x))])
        row = cache.rows[0]
        pipe_split()
        return x * row


def test_state_of_the_caller_is_kept_in_lanes() -> None:
    pipe = pipeline(Remembers(), (torch.randn(2, 4), SimpleNamespace(rows=torch.ones(3, 4))), check=None)
    program, _ = pipe.differentiated()
    assert [(lane.left, lane.stages) for lane in pipe.program.lanes] == [(1, (0, 1))]
    # the row that crosses is a copy
    assert [(lane.left, lane.stages) for lane in program.lanes] == [(1, (0,))]
    assert text(parse(text(program))) == text(program)


class Writes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2) + 1


def test_a_stage_that_writes_what_is_the_callers_has_no_backward() -> None:
    pipe = pipeline(Writes(), (torch.randn(2, 4),), check=None)
    with pytest.raises(RolesError, match=r"stage 0 has no backward in the program: forward writes %x, which is the caller's"):
        pipe.differentiated()

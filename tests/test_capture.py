"""capture: what is kept whole because tracing fails inside of it, and what such a module is given and writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from stagecut import Pipe, SplitPoint, pipe_split, pipeline

X = torch.randn(3, 4)


class Chooses(nn.Module):
    """Branches on a number that may depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, flag: Any = None) -> torch.Tensor:
        return self.a(x) if (x.sum() > 0 if flag is None else flag) else self.b(x)


class Layers(nn.Module):
    """One number that depends on data, made once and given to every layer."""

    def __init__(self, number: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Chooses() for _ in range(3))
        self.number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flag = self.number(x)
        for layer in self.layers:
            x = layer(x, flag).tanh()
        return x


def _cut(model: nn.Module) -> Pipe:
    return pipeline(model, (X,), split_spec={"layers.1": SplitPoint.BEGINNING, "layers.2": SplitPoint.BEGINNING})


def _is_right(pipe: Pipe, model: nn.Module) -> bool:
    return all(torch.equal(pipe(x)[0], model(x)) for x in (X, -X, X.abs(), -X.abs()))


def test_a_number_that_depends_on_data_is_an_operand() -> None:
    """It crosses to the other stages, and each call takes its own branch."""
    for number in (lambda x: (x > 1).any().item(), lambda x: (x > 1).sum().item(), lambda x: x.clamp(0).sum().item()):
        model = Layers(number)
        pipe = _cut(model)
        assert pipe.num_stages == 3
        assert _is_right(pipe, model)
        assert [note.partition(":")[0] for note in pipe.notes] == ["module 'layers.0' and all of its class are kept whole"]
        assert "test_capture.py" in pipe.notes[0]


def test_the_module_whose_forward_fails_is_kept_whole_not_the_one_it_calls_a_method_of() -> None:
    """`to` swaps parameters, which tracing refuses inside of the child's method."""

    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, flag: Any) -> torch.Tensor:
            self.inner = self.inner.to(torch.float32)
            return self.inner(x)  # type: ignore[no-any-return]

    model = Layers(lambda x: None)
    model.layers[1] = Casts()
    model.layers[0] = model.layers[2] = nn.Sequential()
    model.layers[0].forward = model.layers[2].forward = lambda x, flag: x * 2  # type: ignore[method-assign]
    pipe = pipeline(model, (X,))
    assert [note.partition(" and ")[0] for note in pipe.notes] == ["module 'layers.1'"]
    assert _is_right(pipe, model)


def test_a_note_of_a_module_that_is_part_of_another_kept_whole_is_gone() -> None:
    """Only the larger one counts."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Chooses()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            return y if y.sum() > 0 else -y

    model = nn.Sequential(nn.Linear(4, 4), Outer())
    pipe = pipeline(model, (X,))
    assert [note.partition(" and ")[0] for note in pipe.notes] == ["module '1'"]


def test_what_is_written_through_data_is_written() -> None:
    """The op of the module says so, though no version counter moves."""

    class Clips(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.weight.data.clamp_(-0.1, 0.1)
            x.data.mul_(2)
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clips = Clips(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.clips(x * 1)  # type: ignore[no-any-return]

    program = pipeline(Model(), (X,), leaf_modules=["clips"]).program
    (op,) = (op for op in program.all_ops() if op.target == "module.clips")
    assert [value.hint for value in op.effects.writes] == ["mul", "clips.weight"]


class Masks(nn.Module):
    """A mask from a function of two indices, as models that see make it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        x = self.a(x)

        def allowed(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return (kinds[one] == kinds[other]) | (one >= other)

        places = torch.arange(x.shape[0])
        with TransformGetItemToIndex():
            mask = torch.vmap(torch.vmap(allowed, in_dims=(None, 0)), in_dims=(0, None))(places, places)
        pipe_split()
        return self.b(mask.to(x) @ x)


def test_indices_in_a_function_that_is_mapped_are_ops() -> None:
    model = Masks()
    pipe = pipeline(model, (X, torch.tensor([0, 1, 0])))
    assert pipe.num_stages == 2
    for kinds in (torch.tensor([0, 1, 0]), torch.tensor([1, 1, 0]), torch.tensor([2, 1, 0])):
        assert torch.equal(pipe(X, kinds)[0], model(X, kinds))

"""Modules and functions of the user's that are called as ops of torch are: their names mean nothing."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import fx, nn

from stagecut import Pipe, SplitPoint, pipe_split, pipeline
from stagecut.backend.ranks.mailbox import Mailbox
from stagecut.ir.graph import Op
from stagecut.ir.ops import is_heavy

X = torch.linspace(-1, 1, 12).view(3, 4)
NAMES = (
    "data",
    "detach",
    "detach_",
    "new_ones",
    "zeros_like",
    "contiguous",
    "dropout",
    "as_strided",
    "linear",
    "scaled_dot_product_attention",
)


def gradients(model: nn.Module, pipe: Pipe, x: torch.Tensor = X) -> None:
    """Across processes every parameter has the gradient that it has in the model."""
    twin = deepcopy(model)
    loss_of(twin(x)).backward()
    box = Mailbox(pipe.program, pipe.stages)
    loss_of(box.forward(pipe.flatten((x,), {}))).backward()
    box.backward()
    found = box.gradients()
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None, name
        gradient = found[name]
        assert gradient is not None, f"{name} has no gradient"
        torch.testing.assert_close(gradient, parameter.grad)


def loss_of(outputs: Any) -> torch.Tensor:
    """A loss of all outputs that carry gradient."""
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([(t * torch.arange(t.numel()).view(t.shape)).sum() for t in tensors if t.requires_grad]).sum()


class Bend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x))


class Named(nn.Module):
    """A module between two layers, under a name of one's choice."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.last, self.name = nn.Linear(4, 4), nn.Linear(4, 4), name
        self.add_module(name, Bend())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._modules[self.name](self.first(x))  # type: ignore[misc]
        pipe_split()
        return self.last(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_a_module_kept_whole_may_have_the_name_of_an_op(name: str) -> None:
    model = Named(name)
    pipe = pipeline(model, (X,), leaf_modules=[name])
    assert [op.target for op in pipe.program.all_ops() if op.is_users] == [f"module.{name}"]
    gradients(model, pipe)


class detach(torch.autograd.Function):
    """A function of the user's of which gradient flows back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 2


class data(detach):
    pass


class zeros_like(detach):
    pass


class Applies(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 4), nn.Linear(4, 4), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.function.apply(self.a(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("function", [detach, data, zeros_like], ids=lambda function: function.__name__)
def test_an_autograd_function_may_have_the_name_of_an_op(function: Any) -> None:
    model = Applies(function)
    gradients(model, pipeline(model, (X,), split_spec={"b": SplitPoint.BEGINNING}))


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """A function that fx leaves as it is."""
    return x * 3


fx.wrap("contiguous")


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(contiguous(self.a(x)))  # type: ignore[no-any-return]


def test_a_function_of_a_graph_may_have_the_name_of_an_op() -> None:
    module = fx.symbolic_trace(Wrapped())
    gradients(module, pipeline(module, (X,), split_spec={"b": SplitPoint.BEGINNING}))


def test_names_of_the_users_make_no_op_heavy() -> None:
    assert is_heavy(Op("torch.nn.functional.linear"))
    assert is_heavy(Op("method.matmul"))
    assert is_heavy(Op("torch.ops.mine.whatever.default"))
    assert not is_heavy(Op("module.linear", ((), {}, [])))
    assert not is_heavy(Op("extern.matmul"))

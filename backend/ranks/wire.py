"""The tensors that neighbouring stages exchange: flat tuples of contiguous tensors, relayed values among
them.

A schedule of torch.distributed knows only neighbours. So the boundary between two stages lists every value
that is made before it and needed after it; a stage hands on values that it does not use. Both ends compute
the same list from the program.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import Op, Program, Value
from stagecut.ir.sizes import evaluate
from stagecut.ir.types import DTYPES, ScalarType, TensorType, carries_grad

Sizes = Mapping[str, int]
"""Symbolic size -> its value in this call."""

OPEN = -1
"""Stands for a size that depends on data."""

_NAME = re.compile(r"[A-Za-z_]\w*")
_SIGNED = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}
_SCALARS = {"int": torch.int64, "float": torch.float64, "bool": torch.bool}


class _Own(torch.autograd.Function):
    """The tensor itself, not a view of another one, because torch detaches in place what crossed. Its
    gradient is contiguous.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0].contiguous()


def _own(tensor: torch.Tensor) -> torch.Tensor:
    owned: torch.Tensor = _Own.apply(tensor)
    return owned


@dataclass(frozen=True)
class Port:
    """One tensor of a boundary, and how a value becomes it.

    shape and dtype are the value's own, shape None for a number. order: the dims from the widest stride to
    the narrowest; repeated: dims along which all elements are the same one, of which only the first crosses.
    grad: whether a gradient comes back. strides: those of the value, None where its elements lie one after
    the other in the order of its dims. A size of OPEN is known when the value is there; such a value does not
    cross.
    """

    value: Value
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    order: tuple[int, ...] = ()
    repeated: tuple[int, ...] = ()
    grad: bool = False
    strides: tuple[int, ...] | None = None

    @property
    def wire_dtype(self) -> torch.dtype:
        """The dtype that crosses: communication libraries know no 8-bit floats and few unsigned numbers."""
        small = self.dtype.is_floating_point and self.dtype.itemsize == 1
        if small:
            return torch.uint8
        return _SIGNED.get(self.dtype, self.dtype.to_real())

    @property
    def wire_shape(self) -> tuple[int, ...]:
        """The shape that crosses."""
        if self.shape is None:
            return ()
        crossing = tuple(
            1 if dim in self.repeated else max(self.shape[dim], 0) for dim in self.order
        )
        if self.dtype.is_complex:
            return (*crossing, 2)
        return crossing

    def fits(self, tensor: Any) -> bool:
        """True for a tensor of the port's shape."""
        if self.shape is None or tensor.shape == self.shape:
            return True
        if len(tensor.shape) != len(self.shape):
            return False
        sizes = zip(tensor.shape, self.shape, strict=True)
        return all(want in (OPEN, size) for size, want in sizes)

    def meta(self) -> torch.Tensor:
        """A tensor without data of the type that crosses."""
        return torch.empty(
            self.wire_shape,
            dtype=self.wire_dtype,
            device="meta",
            requires_grad=self.grad,
        )

    def stand_in(self, device: torch.device) -> Any:
        """A value of the port's type: ones, or zeros where it has no fractions."""
        if self.shape is None:
            return 1
        fill = 1.0 if self.wire_dtype.is_floating_point else 0
        tensor = torch.full(self.wire_shape, fill, dtype=self.wire_dtype, device=device)
        return self.unpack(tensor.requires_grad_(self.grad))

    def pack(self, actual: Any, device: torch.device) -> torch.Tensor:
        """`actual` as the tensor that crosses: contiguous, with history only where a gradient comes back."""
        if self.shape is None:
            return torch.tensor(actual, dtype=self.dtype, device=device)
        refuse_quantized(self.value, actual)
        _refuse_layout(self.value, actual)
        tensor: torch.Tensor = actual
        for dim in self.repeated:
            tensor = tensor.narrow(dim, 0, 1)
        tensor = tensor.permute(self.order)
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        # contiguous also in dims of one element, which torch 2.11 compares
        tensor = tensor.contiguous().view(-1).view(tensor.shape)
        if self.wire_dtype != tensor.dtype:
            tensor = tensor.view(self.wire_dtype)
        if self.grad:
            return _own(tensor)
        return tensor.detach()

    def unpack(self, tensor: torch.Tensor) -> Any:
        """The value in a tensor that crossed, with the strides it had."""
        if self.shape is None:
            return tensor.item()
        tensor = _own(tensor)
        if self.wire_dtype != self.dtype:
            if self.dtype.is_complex:
                tensor = torch.view_as_complex(tensor)
            else:
                tensor = tensor.view(self.dtype)
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return tensor.permute(inverse).expand(self.shape)


def own(p: Port, actual: Any, device: torch.device) -> torch.Tensor:
    """`actual` as torch's schedules take it from the last stage: a tensor that is no view, with history only
    where a gradient comes back.
    """
    if p.shape is None:
        return p.pack(actual, device)
    refuse_quantized(p.value, actual)
    tensor: torch.Tensor = actual
    return _own(tensor) if p.grad else tensor.detach()


def writable(argument: Any, strides: Sequence[int] | None = None) -> Any:
    """A copy of a tensor that a stage may write, with these strides, or else with the strides of the tensor:
    torch refuses some writes by how elements lie.
    """
    if not isinstance(argument, torch.Tensor):
        return argument
    if strides is None and argument.layout is torch.strided:
        strides = argument.stride()
    if strides is None or 0 in strides:
        return argument.clone()
    return argument.new_empty_strided(argument.shape, strides).copy_(argument)


_WRITES = (
    "is a view and is being modified inplace",
    "A view was created in no_grad mode and is being modified inplace",
    "with out=... arguments don't support automatic differentiation",
    "needed for gradient computation has been modified by an inplace operation",
)


@contextmanager
def writes_explained(stage: int) -> Iterator[None]:
    """Turns torch's error for an in-place write into a StagecutError: the write became illegal because the
    received value now requires grad.

    Such a write goes into one of several views, by `out=`, or into a tensor that the backward needs. From
    outside nobody can tell whether the result of a module kept whole carries gradient, so where it crosses it
    does.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(refusal in str(error) for refusal in _WRITES):
            raise
        raise StagecutError(
            f"stage {stage} writes in a way that torch refuses where what crosses carries gradient: "
            f"{str(error).splitlines()[0]}",
            hint=(
                "write into a clone; or, where what a module kept whole makes carries none, detach() it "
                "behind the module"
            ),
        ).with_traceback(error.__traceback__) from None


def port(
    value: Value,
    sizes: Sizes,
    dtype: torch.dtype | None = None,
    returned: bool = False,
) -> Port:
    """The port of a value, whose dtype is `dtype` where it is not that of the program. With `returned`, the
    model returns it and it crosses nothing; its sizes may depend on data. Raises StagecutError for a value
    that cannot cross between processes.
    """
    value_type = value.type
    if isinstance(value_type, ScalarType) and value_type.kind in _SCALARS:
        return Port(value, None, _SCALARS[value_type.kind])
    if not isinstance(value_type, TensorType):
        raise _cannot_cross(value, f"a {value_type} is no tensor")
    if returned:
        numbers = [number_of(dim, sizes) for dim in value_type.shape]
        shape = tuple(OPEN if number is None else number for number in numbers)
    else:
        shape = tuple(size(dim, sizes, value) for dim in value_type.shape)
    dtype = dtype if dtype is not None else getattr(torch, DTYPES[value_type.dtype])
    assert dtype is not None
    if value_type.strides is None or returned:
        return Port(
            value, shape, dtype, tuple(range(len(shape))), (), carries_grad(value_type)
        )
    strides = [size(step, sizes, value) for step in value_type.strides]
    dims = range(len(shape))
    order = tuple(sorted(dims, key=lambda dim: (-strides[dim], dim)))
    unmoved = [dim for dim in order if strides[dim] == 0]
    repeated = tuple(dim for dim in unmoved if shape[dim] > 1)
    return Port(
        value, shape, dtype, order, repeated, carries_grad(value_type), tuple(strides)
    )


def size(dim: int | str, sizes: Sizes, value: Value) -> int:
    """The number that a size stands for in this call. Raises StagecutError when it depends on data."""
    number = number_of(dim, sizes)
    if number is not None:
        return number
    if any(name.startswith("u") for name in _NAME.findall(str(dim))):
        raise _cannot_cross(
            value, f"its size {dim} depends on data, so the receiver cannot know it"
        )
    raise StagecutError(
        f"{value!r} has the size {dim}, which varies, and nobody has said how large it is",
        where=_where(value),
        hint="let a Driver make the stages: it knows the sizes of each call; or cut a module with examples",
    )


def number_of(dim: int | str, sizes: Sizes) -> int | None:
    """The number that a size stands for; None when it depends on data."""
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    return evaluate(dim, tuple(sorted(sizes.items())))


def known_number(value: Value, sizes: Sizes) -> int | None:
    """The number that a value stands for in a call of these sizes; None for another value."""
    kind = value.type
    if not isinstance(kind, ScalarType) or kind.kind != "int" or kind.expr is None:
        return None
    return number_of(kind.expr, sizes)


def _cannot_cross(value: Value, why: str) -> StagecutError:
    return StagecutError(
        f"{value!r} cannot cross to another process: {why}",
        where=_where(value),
        hint="cut where it does not cross",
    )


def _where(value: Value) -> str:
    """The line of the user's code that makes a value, or the input that it is."""
    owner = value.owner
    if isinstance(owner, Op):
        return owner.where()
    return f"input '{value.hint}'"


def refuse_quantized(value: Value, actual: Any) -> None:
    """Returns when `actual`, which stands for `value`, is no quantized tensor. A trace takes a quantized
    tensor for one of floats.
    """
    if isinstance(actual, torch.Tensor) and actual.is_quantized:
        raise _cannot_cross(
            value,
            f"it is quantized ({actual.dtype}), and its scale is nothing that is sent",
        )


def _refuse_layout(value: Value, tensor: torch.Tensor) -> None:
    """Returns when the elements of a tensor, which stands for `value`, lie in memory by strides."""
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise _cannot_cross(
            value, f"its layout is {layout}, and only dense tensors are sent"
        )


def fed_inputs(program: Program) -> frozenset[Value]:
    """The user inputs that are given to every stage that reads them; the others travel from the first
    stage.
    """
    return frozenset(program.inputs) - {
        t.value for t in program.transfers if t.source is None and t.route == "relay"
    }


def boundaries(
    program: Program, fed: frozenset[Value], left: frozenset[Value] = frozenset()
) -> list[list[Value]]:
    """Per stage, the values it hands on, in order of definition; for the last one, the values that the model
    returns.

    Inputs in `fed` are given to each stage that reads them; the others go to the first stage, which hands
    them on. Outputs in `left` stay with the stage that makes them.
    """
    last_stage = len(program.stages) - 1
    made_in: dict[Value, int] = {
        value: 0 for value in program.inputs if value not in fed
    }
    needed_in: dict[Value, int] = {}
    for stage in program.stages:
        made_in |= {
            value: stage.index for value in stage.outputs if value not in made_in
        }
        needed_in |= dict.fromkeys(stage.inputs, stage.index)
    returned = [
        value
        for value in dict.fromkeys(program.output.operands)
        if value not in fed and value not in left
    ]
    needed_in |= dict.fromkeys(returned, last_stage)
    lists = [
        [v for v, start in made_in.items() if start <= i < needed_in.get(v, -1)]
        for i in range(last_stage)
    ]
    return [*lists, returned]

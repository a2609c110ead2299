"""Types of values: tensors, scalars (symbolic or specialised), none and opaque objects."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Dim = int | str
"""A size: a number, or an expression over symbols such as `s0` or `2*s0`."""

DTYPES: dict[str, str] = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u64": "uint64",
    "u32": "uint32",
    "u16": "uint16",
    "u8": "uint8",
    "b8": "bool",
    "c128": "complex128",
    "c64": "complex64",
    "c32": "complex32",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
    "f8e4m3fnuz": "float8_e4m3fnuz",
    "f8e5m2fnuz": "float8_e5m2fnuz",
    "f8e8m0fnu": "float8_e8m0fnu",
}
"""Short name -> torch's name, for every dtype a value may have."""

FLOATS = ("f64", "f32", "f16", "bf16")
"""The dtypes that a cast of a model changes, and that it casts to."""

_BYTES = {
    "c128": 16,
    "c64": 8,
    "f64": 8,
    "i64": 8,
    "u64": 8,
    "c32": 4,
    "f32": 4,
    "i32": 4,
    "u32": 4,
}
_BYTES |= {"f16": 2, "bf16": 2, "i16": 2, "u16": 2}


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of the short-named `dtype`."""
    return _BYTES.get(dtype, 1)


ITEM = "item"
ANY = "any"
MEAN = "mean"
SUM = "sum"


@dataclass(frozen=True, slots=True)
class Batch:
    """Where the samples of a batch are in a tensor.

    They lie along `dim`, and `size` is the size of that dim: `b`, the number of samples; `4*b`, four rows for
    each sample, those of one sample together; `b + b`, all samples twice, one block after the other. Batches
    that are divided independently have symbols of their own: `b`, `b1`.

    A tensor without such a dim has a word for `dim`. `item`: the tensor is an item of a list that has one for
    each sample. `mean`, `sum`: the tensor is a number, the mean or the sum over the samples.
    """

    dim: int | str
    size: str = "b"

    @property
    def terms(self) -> tuple[tuple[int, str], ...]:
        """The blocks that lie one after the other: how many rows for each sample, and of which batch."""
        if self.size == ANY:
            return ((1, ANY),)
        parts = (term.strip().rpartition("*") for term in self.size.split("+"))
        return tuple((int(rows or 1), symbol) for rows, _, symbol in parts)

    def __str__(self) -> str:
        plain = self.size == "b" or self.dim in (MEAN, SUM)
        return f"batch({self.dim})" if plain else f"batch({self.dim}: {self.size})"


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor. `strides` is None when the layout is contiguous; `grad` says whether it carries gradient.

    `batch` is known of the inputs and outputs of a program, and is no part of the type's identity: tensors
    are of one type wherever the batch is.
    """

    dtype: str
    shape: tuple[Dim, ...]
    strides: tuple[Dim, ...] | None = None
    device: str = "cpu"
    grad: bool = False
    batch: Batch | None = field(default=None, compare=False)

    @property
    def differentiable(self) -> bool:
        """True when the dtype can carry gradient at all."""
        return self.dtype[0] in "fcb" and self.dtype != "b8"

    def nbytes(self) -> int | None:
        """Bytes of the elements, or None when a size is symbolic."""
        sizes = [size for size in self.shape if isinstance(size, int)]
        if len(sizes) < len(self.shape):
            return None
        return math.prod(sizes) * dtype_bytes(self.dtype)

    def __str__(self) -> str:
        text = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        if self.strides is not None:
            text += "{" + ",".join(map(str, self.strides)) + "}"
        if self.device != "cpu":
            text += f"@{self.device}"
        if self.grad:
            text += " grad"
        return text if self.batch is None else f"{text} {self.batch}"


@dataclass(frozen=True, slots=True)
class ScalarType:
    """A Python scalar. `expr` is its symbolic expression (`s0`), or the literal it was specialised to
    (`5`).
    """

    kind: str
    expr: str | None = None

    def __str__(self) -> str:
        return self.kind if self.expr is None else f"{self.kind}({self.expr})"


SCALAR_KINDS = ("int", "float", "bool", "complex", "str", "none", "object")

Type = TensorType | ScalarType
NONE = ScalarType("none")
OBJECT = ScalarType("object")


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements, of a tensor of `shape`."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def value_bytes(value_type: Type) -> int | None:
    """Bytes of a value of this type; 8 for a value that is no tensor; None when a size is symbolic."""
    return value_type.nbytes() if isinstance(value_type, TensorType) else 8


def storage_bytes(value_type: Type) -> int:
    """Bytes of the memory in which a tensor of this type lies, from its first element to its last; 8 for a
    value that is no tensor. No size may be symbolic.
    """
    if not isinstance(value_type, TensorType):
        return 8
    sizes = [size for size in value_type.shape if isinstance(size, int)]
    assert len(sizes) == len(value_type.shape)
    if 0 in sizes:
        return 0
    strides = value_type.strides or contiguous_strides(tuple(sizes))
    steps = [step for step in strides if isinstance(step, int)]
    last = sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    return (last + 1) * dtype_bytes(value_type.dtype)


def same_layout(first: Type, second: Type) -> bool:
    """True for tensor types of one dtype, in which every element lies in the same place."""
    if not isinstance(first, TensorType) or not isinstance(second, TensorType):
        return False
    return same_elements(first, second) and first.strides == second.strides


def same_elements(first: Type, second: Type) -> bool:
    """True for tensor types of one dtype and shape, wherever their elements lie."""
    if not isinstance(first, TensorType) or not isinstance(second, TensorType):
        return False
    return (first.dtype, first.shape) == (second.dtype, second.shape)


def carries_grad(value_type: Type) -> bool:
    """True for a tensor type marked as carrying gradient."""
    return isinstance(value_type, TensorType) and value_type.grad

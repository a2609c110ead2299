"""The tensors of one stage <-> a safetensors file, with the facts that such a file does not hold: gradient,
strides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stagecut.backend.files.manifest import Description
from stagecut.backend.files.untrusted import SavedError
from stagecut.ir.graph import StateEntry
from stagecut.ir.types import DTYPES, TensorType, contiguous_strides

_STORED = {
    "f64": "F64",
    "f32": "F32",
    "f16": "F16",
    "bf16": "BF16",
    "b8": "BOOL",
    "f8e4m3fn": "F8_E4M3",
    "f8e5m2": "F8_E5M2",
    "i64": "I64",
    "i32": "I32",
    "i16": "I16",
    "i8": "I8",
    "u64": "U64",
    "u32": "U32",
    "u16": "U16",
    "u8": "U8",
    "c128": "F64",
    "c64": "F32",
    "c32": "F16",
}
"""dtype of the IR -> that of the file: complex numbers as pairs, dtypes that safetensors does not know as
bytes.
"""
_BYTES = "U8"
_GAPS, _FEW = 64, 2**20
"""A tensor may be spread over so many times its elements, and over so many places in any case: a limit to the
cost of a stranger's strides.
"""


def check_storable(entry: StateEntry, tensor: torch.Tensor) -> None:
    """Returns when a tensor can be written as that of `entry`. Raises SavedError otherwise."""
    kind = entry.type
    if (
        type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer)
        or tensor.layout is not torch.strided
    ):
        raise SavedError(
            f"'{entry.name}' is a {type(tensor).__name__} of layout {tensor.layout}",
            hint="plain dense tensors are saved; gather it first",
        )
    if (
        not isinstance(kind, TensorType)
        or tuple(tensor.shape) != kind.shape
        or tensor.dtype != getattr(torch, DTYPES[kind.dtype])
    ):
        raise SavedError(
            f"'{entry.name}' is {tensor.dtype} {list(tensor.shape)}, traced was {kind}",
            hint="cast or resize the model before it is cut",
        )
    if not tensor.is_contiguous() and not _may_lie(kind, tensor.shape, tensor.stride()):
        raise SavedError(
            f"'{entry.name}' has the strides {list(tensor.stride())}, which cannot be kept",
            hint="make it .contiguous() before the cut",
        )


def write_tensors(
    path: Path, state: Mapping[StateEntry, torch.Tensor]
) -> dict[str, Description]:
    """`path` holds the tensors by the first name of each; returns the descriptions that must be written
    beside them.
    """
    _library().torch.save_file(
        {
            entry.name: _stored(entry, tensor.detach())
            for entry, tensor in state.items()
        },
        path,
    )
    return {
        entry.name: Description(tensor.requires_grad, _strides(tensor))
        for entry, tensor in state.items()
    }


def _library() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise SavedError(
            "safetensors is not installed", hint="pip install 'stagecut[safetensors]'"
        ) from None
    return safetensors


def _stored(entry: StateEntry, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the file has it, in memory of its own where it lies in memory of others."""
    dense = tensor.resolve_conj().resolve_neg().contiguous()
    if dense.untyped_storage().nbytes() != dense.nbytes:
        dense = dense.clone()
    if dense.is_complex():
        return torch.view_as_real(dense)
    return dense if _dtype(entry) in _STORED else dense.view(torch.uint8)


def _dtype(entry: StateEntry) -> str:
    return entry.type.dtype if isinstance(entry.type, TensorType) else ""


def _strides(tensor: torch.Tensor) -> list[int] | None:
    return None if tensor.is_contiguous() else list(tensor.stride())


def _may_lie(kind: TensorType, shape: Sequence[int], strides: Sequence[int]) -> bool:
    """True for strides that can be read back: dense ones, and those of the trace, on which the program
    relies, where gaps are few.
    """
    if len(shape) != len(strides):
        return False
    if _is_dense(shape, strides):
        return True
    return (
        tuple(strides) == kind.strides
        and min(strides) >= 0
        and extent(shape, strides) <= _GAPS * math.prod(shape) + _FEW
    )


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The number of places from the first element of a tensor to its last one."""
    return (
        sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        + 1
        if 0 not in shape
        else 0
    )


def covers_storage(tensor: torch.Tensor) -> bool:
    """True when the storage of a tensor holds its elements and nothing else."""
    covered: int = _places(tensor.shape, tensor.stride()).unique().numel()
    return covered * tensor.element_size() == tensor.untyped_storage().nbytes()


def _places(shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """The place of each element, counted from the first one."""
    found = torch.zeros(tuple(shape), dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        found += (torch.arange(size) * stride).reshape(
            [-1 if at == dim else 1 for at in range(len(shape))]
        )
    return found


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """True when each element has a place of its own and no place is left over."""
    dims = sorted(
        (stride, size) for size, stride in zip(shape, strides, strict=True) if size != 1
    )
    want = contiguous_strides(tuple(size for _, size in reversed(dims)))
    return (
        0 not in shape
        and [stride for stride, _ in reversed(dims)] == list(want)
        and all(0 < stride < 2**62 for stride in strides)
    )


def read_tensors(
    path: Path,
    wanted: Sequence[StateEntry],
    described: Mapping[str, Description],
    device: torch.device,
) -> dict[StateEntry, torch.Tensor]:
    """The wanted tensors on `device`, in memory of their own. Everything is checked before the first is
    read.
    """
    library = _library()
    try:
        with library.safe_open(path, framework="pt") as file:
            names = {entry.name for entry in wanted}
            _check_names(path, names, set(file.keys()), "the file")
            _check_names(path, names, set(described), "what is written beside it")
            for entry in wanted:
                _check_header(
                    path, entry, file.get_slice(entry.name), described[entry.name]
                )
            return {
                entry: _made(
                    entry, file.get_tensor(entry.name), described[entry.name], device
                )
                for entry in wanted
            }
    except (library.SafetensorError, OSError, RuntimeError) as error:
        raise SavedError(
            f"'{path.name}' cannot be read: {str(error)[:300]}",
            where=str(path.parent),
            hint="copy or save it again",
        ) from error


def _check_names(path: Path, want: set[str], there: set[str], where: str) -> None:
    lacking, strange = sorted(want - there), sorted(there - want)
    if lacking or strange:
        what = (
            f"'{lacking[0]}' is missing"
            if lacking
            else f"'{strange[0]}' is no tensor of this stage"
        )
        raise SavedError(
            f"{what} in {where}", where=str(path), hint="copy or save it again"
        )


def _check_header(
    path: Path, entry: StateEntry, found: Any, described: Description
) -> None:
    kind = entry.type
    assert isinstance(kind, TensorType)
    pair = (2,) if kind.dtype.startswith("c") else ()
    if (found.get_dtype(), tuple(found.get_shape())) != (
        _STORED.get(kind.dtype, _BYTES),
        (*kind.shape, *pair),
    ):
        raise SavedError(
            f"'{entry.name}' is {found.get_dtype()} {found.get_shape()}, the program wants {kind}",
            where=str(path),
        )
    sizes = tuple(dim for dim in kind.shape if isinstance(dim, int))
    if described.strides is not None and not _may_lie(kind, sizes, described.strides):
        raise SavedError(
            f"'{entry.name}' cannot have the strides {described.strides[:8]}",
            where=str(path),
        )
    if described.requires_grad and not kind.differentiable:
        raise SavedError(
            f"'{entry.name}' cannot have a gradient: it is {kind}", where=str(path)
        )


def _made(
    entry: StateEntry,
    stored: torch.Tensor,
    described: Description,
    device: torch.device,
) -> torch.Tensor:
    dtype = getattr(torch, DTYPES[_dtype(entry)])
    seen = (
        torch.view_as_complex(stored.clone())
        if dtype.is_complex
        else stored.view(dtype)
    )
    made = torch.empty(seen.shape, dtype=dtype, device=device)
    if described.strides is not None:
        made = torch.empty_strided(
            seen.shape, described.strides, dtype=dtype, device=device
        )
    if described.strides is None or _is_dense(seen.shape, described.strides):
        made.copy_(seen)
    elif device.type != "meta":
        _fill(made, seen)
    if entry.kind == "param":
        return nn.Parameter(made, requires_grad=described.requires_grad)
    return made.requires_grad_(described.requires_grad)


def _fill(made: torch.Tensor, seen: torch.Tensor) -> None:
    """`made`, whose elements may share places or have gaps between them, equals `seen`. Gaps are zero."""
    # moved as bytes: not every dtype has index_put
    flat = torch.zeros(
        extent(made.shape, made.stride()), seen.element_size(), dtype=torch.uint8
    )
    flat[_places(made.shape, made.stride()).reshape(-1)] = (
        seen.contiguous().reshape(-1).view(torch.uint8).reshape(-1, seen.element_size())
    )
    made.as_strided((len(flat),), (1,)).copy_(flat.reshape(-1).view(seen.dtype))

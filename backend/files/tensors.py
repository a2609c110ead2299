"""The tensors of one stage <-> a safetensors file, with the facts that such a file does not hold: gradient,
strides.
"""

from __future__ import annotations

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


def check_storable(entry: StateEntry, tensor: torch.Tensor) -> None:
    """Returns when a tensor can be written as that of `entry`. Raises SavedError otherwise."""
    tensor_type = entry.type
    if (
        type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer)
        or tensor.layout is not torch.strided
    ):
        raise SavedError(
            f"'{entry.name}' is a {type(tensor).__name__} of layout {tensor.layout}",
            hint="plain dense tensors are saved; gather it first",
        )
    if (
        not isinstance(tensor_type, TensorType)
        or tuple(tensor.shape) != tensor_type.shape
        or tensor.dtype != getattr(torch, DTYPES[tensor_type.dtype])
    ):
        raise SavedError(
            f"'{entry.name}' is {tensor.dtype} {list(tensor.shape)}, traced was {tensor_type}",
            hint="cast or resize the model before it is cut",
        )
    if _strides(tensor) is not None and not _is_dense(tensor.shape, tensor.stride()):
        raise SavedError(
            f"'{entry.name}' has the strides {list(tensor.stride())}: elements share a place, or have gaps "
            "between them",
            hint="make it .contiguous() in __init__, before the cut",
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
    if _dtype(entry) in _STORED:
        return dense
    return dense.view(torch.uint8)


def _dtype(entry: StateEntry) -> str:
    if isinstance(entry.type, TensorType):
        return entry.type.dtype
    return ""


def _strides(tensor: torch.Tensor) -> list[int] | None:
    if tensor.is_contiguous():
        return None
    return list(tensor.stride())


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """True when each element has a place of its own and no place is left over. False for an empty tensor."""
    if len(shape) != len(strides) or 0 in shape:
        return False
    dims: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size != 1:
            dims.append((stride, size))
    dims.sort()
    want = contiguous_strides(tuple(size for _, size in reversed(dims)))
    steps = [stride for stride, _ in reversed(dims)]
    if steps != list(want):
        return False
    return all(0 < stride < 2**62 for stride in strides)


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
                entry: _restored(
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


def _check_names(path: Path, want: set[str], present: set[str], where: str) -> None:
    lacking = sorted(want - present)
    strange = sorted(present - want)
    if lacking or strange:
        what = f"'{strange[0]}' is no tensor of this stage" if strange else ""
        if lacking:
            what = f"'{lacking[0]}' is missing"
        raise SavedError(
            f"{what} in {where}", where=str(path), hint="copy or save it again"
        )


def _check_header(
    path: Path, entry: StateEntry, stored: Any, described: Description
) -> None:
    tensor_type = entry.type
    assert isinstance(tensor_type, TensorType)
    pair = (2,) if tensor_type.dtype.startswith("c") else ()
    dtype = stored.get_dtype()
    shape = stored.get_shape()
    wanted_dtype = _STORED.get(tensor_type.dtype, _BYTES)
    wanted_shape = (*tensor_type.shape, *pair)
    if dtype != wanted_dtype or tuple(shape) != wanted_shape:
        raise SavedError(
            f"'{entry.name}' is {dtype} {shape}, the program wants {tensor_type}",
            where=str(path),
        )
    sizes = tuple(dim for dim in tensor_type.shape if isinstance(dim, int))
    if described.strides is not None and not _is_dense(sizes, described.strides):
        raise SavedError(
            f"'{entry.name}' cannot have the strides {described.strides[:8]}",
            where=str(path),
        )
    if described.requires_grad and not tensor_type.differentiable:
        raise SavedError(
            f"'{entry.name}' cannot have a gradient: it is {tensor_type}",
            where=str(path),
        )


def _restored(
    entry: StateEntry,
    stored: torch.Tensor,
    described: Description,
    device: torch.device,
) -> torch.Tensor:
    dtype = getattr(torch, DTYPES[_dtype(entry)])
    if dtype.is_complex:
        view = torch.view_as_complex(stored.clone())
    else:
        view = stored.view(dtype)
    strides = described.strides
    if strides is None:
        tensor = torch.empty(view.shape, dtype=dtype, device=device)
    else:
        tensor = torch.empty_strided(view.shape, strides, dtype=dtype, device=device)
    tensor.copy_(view)
    if entry.kind == "param":
        return nn.Parameter(tensor, requires_grad=described.requires_grad)
    return tensor.requires_grad_(described.requires_grad)

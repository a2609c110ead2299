"""Writes a safetensors file piece by piece: the next piece comes from the device while the disk has this one.

The format: eight bytes for the length of a header of JSON, the header, and the tensors one after the other.
Order and padding are those of safetensors itself, so that the same tensors give the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path

import torch

from stagecut.backend.files.together import CheckpointError

PIECE = 64 * 2**20
"""Bytes that are copied and written at a time."""

_METADATA = {"format": "pt"}

_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of dtypes in the order in which a file has their tensors."""

_PLACES = {dtype: place for place, dtype in enumerate(_NAMES)}


def write_file(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """`file` has these tensors, and keeps them when the machine stops. Beside them it takes PIECE bytes of
    memory, and for tensors of a device twice as much.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise CheckpointError(
                f"'{name}' is {tensor.dtype}, which no safetensors file holds",
                hint="cast it to another dtype first",
            )
    order = sorted(tensors, key=lambda name: (_PLACES[tensors[name].dtype], name))
    with file.open("wb", buffering=0) as out:
        _write(out, _header(order, tensors))
        pieces = _pieces(tensors[name] for name in order)
        for piece in _on_host(pieces):
            _write(out, piece.numpy().data)
        os.fsync(out.fileno())


def _write(out: FileIO, content: bytes | memoryview) -> None:
    """All of it is written; one call of the system writes 2 GiB at most."""
    left = memoryview(content)
    while left:
        left = left[out.write(left) :]


def _header(order: Iterable[str], tensors: Mapping[str, torch.Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": _METADATA}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": [*tensor.shape],
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The bytes of the tensors in their order, in pieces."""
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1)
        yield from flat.view(torch.uint8).split(PIECE) if flat.numel() else ()


def _on_host(pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The pieces in memory of the host. A piece is valid until the next one is asked for; meanwhile, one of a
    device is on its way.
    """
    copies = _Copies()
    waiting: torch.Tensor | None = None
    for piece in pieces:
        copied = piece if _is_on_host(piece) else copies.begin(piece)
        if waiting is not None:
            copies.finish(waiting)
            yield waiting
        waiting = copied
    if waiting is not None:
        copies.finish(waiting)
        yield waiting


class _Copies:
    """Copies from a device to two buffers on the host, in turns."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._turn = 0
        self._under_way: dict[int, torch.cuda.Event] = {}

    def begin(self, piece: torch.Tensor) -> torch.Tensor:
        """A buffer that has the piece when it is finished."""
        on_gpu = piece.device.type == "cuda"
        if not self._buffers:
            self._buffers = [
                torch.empty(PIECE, dtype=torch.uint8, pin_memory=on_gpu)
                for _ in range(2)
            ]
        self._turn = 1 - self._turn
        copied = self._buffers[self._turn][: piece.numel()]
        copied.copy_(piece, non_blocking=on_gpu)
        if on_gpu:
            stream = torch.cuda.current_stream(piece.device)
            self._under_way[copied.data_ptr()] = stream.record_event()
        return copied

    def finish(self, copied: torch.Tensor) -> None:
        """The buffer has its piece."""
        event = self._under_way.pop(copied.data_ptr(), None)
        if event is not None:
            event.synchronize()


def _is_on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"

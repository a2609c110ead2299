"""In eval mode each micro-batch has buffers of its own: what the stages write for one must not be read for
another.

A model that decodes keeps keys and values in its buffers. Its micro-batches are other sequences. In train
mode the micro-batches write one buffer after the other, as statistics of a norm are meant to be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stagecut.backend.stages.crossing import written_buffers
from stagecut.backend.stages.modules import Stage, find, put
from stagecut.ir.graph import Stage as Block


class Buffers:
    """The buffers that a stage writes in eval mode, for each micro-batch.

    Those of micro-batch 0 are the stage's own. What is written to these between two calls holds for all
    micro-batches.
    """

    def __init__(self, module: Stage, block: Block) -> None:
        self._module = module
        written = [block.state[entry] for entry in written_buffers(block)]
        self._names = [names for names in written if find(module, names[0]) is not None]
        self._copies: list[list[torch.Tensor]] = []
        self._left: list[tuple[torch.Tensor, int]] = []

    def begin(self, count: int, apart: bool) -> None:
        """A call of `count` micro-batches begins, which keep their buffers apart or share them."""
        if not apart:
            self._copies = []
        elif len(self._copies) != count - 1 or not self._is_left():
            own = self._own()
            self._copies = []
            for _ in range(count - 1):
                copies = [tensor.clone() for tensor in own]
                self._copies.append(copies)

    @contextmanager
    def of(self, microbatch: int) -> Iterator[None]:
        """Inside, the stage has the buffers of this micro-batch."""
        if not self._names or not self._copies:
            yield
            return
        if not microbatch:
            yield
            self._left = [(tensor, _version(tensor)) for tensor in self._own()]
            return
        own = self._own()
        self._put(self._copies[microbatch - 1])
        try:
            yield
            self._copies[microbatch - 1] = self._own()
        finally:
            self._put(own)

    def _is_left(self) -> bool:
        """True when nobody has written the stage's own buffers since the last call."""
        own = self._own()
        if len(own) != len(self._left):
            return False
        for tensor, (left, version) in zip(own, self._left, strict=True):
            if tensor is not left or _version(tensor) != version:
                return False
        return True

    def _own(self) -> list[torch.Tensor]:
        tensors = [find(self._module, names[0]) for names in self._names]
        return [tensor for tensor in tensors if tensor is not None]

    def _put(self, tensors: list[torch.Tensor]) -> None:
        for names, tensor in zip(self._names, tensors, strict=True):
            for name in names:
                put(self._module, name, tensor)


def _version(tensor: torch.Tensor) -> int:
    if tensor.is_inference():
        return -1
    return tensor._version

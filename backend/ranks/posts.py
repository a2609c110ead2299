"""Messages of a stage, each begun by itself, for torch up to 2.12.

Its runtime puts each message into a batch, and NCCL runs all batches of a rank on one stream: a receive that
is posted early holds up what is sent behind it. Messages that are begun by themselves go over a stream of
their pair of ranks. Later versions of torch do what is done here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

ONE_STREAM = (
    "the group of ranks was made with device_id=, so that all messages of a rank go over one stream and wait "
    "for each other\n"
    "  try: init_process_group without device_id=, after torch.cuda.set_device(...)"
)


def shares_a_stream(group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """True where NCCL has one communicator, and so one stream, for the messages of a rank to all others."""
    bound = getattr(group or dist.group.WORLD, "bound_device_id", None)
    return device.type == "cuda" and bound is not None


class Posts:
    """The messages that a stage has begun and not waited for."""

    def __init__(self) -> None:
        self._arriving: dict[tuple[str, int], list[Any]] = {}
        self._leaving: list[Any] = []

    def receive(self, kind: str, chunk: int, operations: Iterable[dist.P2POp]) -> None:
        """Values or gradients of a micro-batch begin to arrive."""
        self._arriving[kind, chunk] = [_begun(operation) for operation in operations]

    def arrive(self, kind: str, chunk: int) -> None:
        """The tensors that were to arrive are there for what computes from now on."""
        for work in self._arriving.pop((kind, chunk), ()):
            work.wait()

    def send(self, operations: Iterable[dist.P2POp]) -> None:
        """Tensors begin to leave."""
        self._leaving += map(_begun, operations)

    def settle(self) -> None:
        """The tensors that have left may be written by what computes from now on."""
        for work in self._leaving:
            work.wait()
        self._leaving.clear()


def _begun(operation: dist.P2POp) -> Any:
    peer = "group_dst" if operation.op is dist.isend else "group_src"
    return operation.op(
        operation.tensor,
        group=operation.group,
        tag=operation.tag,
        **{peer: operation.group_peer},
    )

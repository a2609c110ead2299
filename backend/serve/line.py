"""The line of ranks: what goes from each to the next, in one message a call."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from stagecut.backend.ranks.wire import Port
from stagecut.ir.graph import Value

ALIGNED = 16
"""Tensors begin at multiples of so many bytes in a message."""

MOST_ON_THE_WAY = 64
"""Messages that are sent before the oldest of them must have arrived."""

TAGS = 2**15
"""Messages are told apart by a number below this, where the backend knows tags: it may deliver what is under
one tag in another order than it was sent.
"""


@dataclass(frozen=True)
class Seat:
    """The place of this process: it runs the stage of its rank in `group`, on `device`."""

    group: dist.ProcessGroup
    device: torch.device

    @cached_property
    def rank(self) -> int:
        """The rank, which is the number of the stage."""
        return dist.get_rank(self.group)

    @cached_property
    def ranks(self) -> int:
        """The number of ranks, which is that of the stages."""
        return dist.get_world_size(self.group)


class Line:
    """The connections of a rank with the others, for all its programs: mostly with the one before and the one
    behind.
    """

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._tagged = "gloo" in str(dist.get_backend_config(seat.group))
        self._received: Counter[int] = Counter()
        self._sent: Counter[int] = Counter()
        self._on_the_way: deque[tuple[Any, torch.Tensor]] = deque()

    def receive(
        self, ports: Sequence[Port], source: int | None = None
    ) -> dict[Value, Any]:
        """The values of the next message from a rank, the one before if none is named."""
        seat = self._seat
        source = seat.rank - 1 if source is None else source
        offsets, size = _layout(ports)
        message = torch.empty(size, dtype=torch.uint8, device=seat.device)
        tag = self._tag(self._received[source])
        self._received[source] += 1
        dist.recv(
            message,
            group=seat.group,
            group_src=source,
            tag=tag,
        )
        values: dict[Value, Any] = {}
        for p, offset in zip(ports, offsets, strict=True):
            part = message[offset : offset + _bytes(p)].view(p.wire_dtype)
            values[p.value] = p.unpack(part.view(p.wire_shape))
        return values

    def send(
        self, ports: Sequence[Port], values: Mapping[Value, Any], to: int | None = None
    ) -> None:
        """A rank, the one behind if none is named, gets these values when it comes to receive them."""
        seat = self._seat
        to = seat.rank + 1 if to is None else to
        offsets, size = _layout(ports)
        message = torch.empty(size, dtype=torch.uint8, device=seat.device)
        for p, offset in zip(ports, offsets, strict=True):
            packed = p.pack(values[p.value], seat.device)
            part = message[offset : offset + _bytes(p)].view(p.wire_dtype)
            part.view(p.wire_shape).copy_(packed)
        tag = self._tag(self._sent[to])
        self._sent[to] += 1
        work = dist.isend(
            message,
            group=seat.group,
            group_dst=to,
            tag=tag,
        )
        # with the message, which must live until it is read: its memory is free for the stream that made it
        self._on_the_way.append((work, message))
        while self._on_the_way and self._on_the_way[0][0].is_completed():
            arrived(self._on_the_way.popleft()[0])
        while len(self._on_the_way) > MOST_ON_THE_WAY:
            self._wait_for_the_oldest()

    def finish(self) -> None:
        """All that was sent has arrived."""
        while self._on_the_way:
            self._wait_for_the_oldest()

    def _wait_for_the_oldest(self) -> None:
        work, _ = self._on_the_way[0]
        arrived(work)
        if self._seat.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self._on_the_way.popleft()

    def _tag(self, number: int) -> int:
        return number % TAGS if self._tagged else 0


def arrived(work: Any) -> None:
    """A message has arrived. Raises a DistError where a connection is broken: another rank is to blame."""
    try:
        work.wait()
    except RuntimeError as error:
        raise dist.DistNetworkError(str(error)) from None


def _bytes(p: Port) -> int:
    return torch.Size(p.wire_shape).numel() * p.wire_dtype.itemsize


def _layout(ports: Sequence[Port]) -> tuple[list[int], int]:
    """The places of the tensors in a message, and its size, at least one byte."""
    offsets: list[int] = []
    end = 0
    for p in ports:
        offsets.append(end)
        end += -(-_bytes(p) // ALIGNED) * ALIGNED
    return offsets, max(1, end)

"""The tokens that the last rank chooses, on their way to the others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from stagecut.backend.ranks.hosts import group_of_hosts
from stagecut.backend.serve.line import Seat, arrived

MOST_LANES = 64
"""Requests in flight together. So many steps may be told before the first of them is heard."""


class Tokens:
    """What was chosen in the last step: a token for each row, and whether the row is done.

    The last rank tells; the others hear. Nothing else travels back, and it travels beside what goes from
    stage to stage: between devices where the backend is NCCL, so that no host waits for it, else between
    hosts. `wait` is called once for each token: other requests go on.
    """

    def __init__(self, seat: Seat, vocabulary: int, wait: Callable[[], None]) -> None:
        self._seat = seat
        backends = str(dist.get_backend_config(seat.group))
        self.between_devices = seat.device.type == "cuda" and "nccl" in backends
        self.group = group_of_hosts(seat.group)
        if self.between_devices:
            ranks = dist.get_process_group_ranks(seat.group)
            self.group = dist.new_group(
                ranks, backend="nccl", use_local_synchronization=True
            )
        self._vocabulary = vocabulary
        self._wait = wait
        self.is_ahead = seat.device.type == "cuda"
        self._own = threading.local()  # each request has a thread
        self._told: deque[tuple[Any, torch.Tensor]] = deque()
        self.done: torch.Tensor | None = None

    @property
    def chooses(self) -> bool:
        """True on the rank that has the logits."""
        return self._seat.rank == self._seat.ranks - 1

    def before_call(self) -> None:
        """The rank that chooses waits for the stage before it, once for each token: the prefill of a long
        prompt is several calls. The others wait when they look at the logits. A rank with a device starts the
        call, and waits when it needs the tokens.
        """
        waits = self.chooses and not self.is_ahead
        if waits and getattr(self._own, "has_chosen", True):
            self._own.has_chosen = False
            self._wait()

    def tell(self, tokens: torch.Tensor, done: torch.Tensor) -> None:
        """All other ranks are told the tokens of this step."""
        self._own.has_chosen = True
        message = torch.stack([tokens.long(), done.long()])
        if not self.between_devices:
            message = self._on_host(message)
        # the others may have calls of other requests to make before they hear
        self._told.append((self._broadcast(message), message))
        while len(self._told) > MOST_LANES:
            arrived(self._told.popleft()[0])
        if self.between_devices:
            self._wait()

    def _on_host(self, message: torch.Tensor) -> torch.Tensor:
        """The message in the memory of the host; other requests start calls until it is there."""
        if not self.is_ahead:
            return message.cpu()
        arriving = message.to("cpu", non_blocking=True)
        if message.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
            self._wait()
            copied.synchronize()
        else:
            self._wait()
        return arriving

    def hear(self, rows: int) -> torch.Tensor:
        """The tokens of this step, one for each row. `done` holds the rows that end with them."""
        self._wait()
        device = self._seat.device if self.between_devices else None
        message = torch.empty(2, rows, dtype=torch.long, device=device)
        arrived(self._broadcast(message))
        self.done = message[1].bool()
        return message[0]

    def finish(self) -> None:
        """All that was told is heard."""
        while self._told:
            arrived(self._told.popleft()[0])

    def _broadcast(self, message: torch.Tensor) -> Any:
        last = self._seat.ranks - 1
        return dist.broadcast(message, group=self.group, group_src=last, async_op=True)

    def as_logits(self, rows: int) -> Awaited:
        """Logits by which only the tokens of this step can be chosen."""
        return Awaited(self, rows, self._vocabulary, self._seat.device)


class Awaited:
    """Logits of a step that the last rank has. Whoever looks at the last position waits for the tokens that
    are chosen there.
    """

    def __init__(
        self, tokens: Tokens, rows: int, vocabulary: int, device: torch.device
    ) -> None:
        self._tokens = tokens
        self._device = device
        self.shape = torch.Size((rows, 1, vocabulary))

    def __getitem__(self, _: Any) -> torch.Tensor:
        chosen = self._tokens.hear(self.shape[0]).to(self._device)
        shape = (self.shape[0], self.shape[2])
        logits = torch.full(shape, -torch.inf, device=self._device)
        return logits.scatter_(1, chosen[:, None], 0.0)

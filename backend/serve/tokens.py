"""The tokens that the last rank chooses, on their way to the others."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from stagecut.backend.serve.step import Seat


class Tokens:
    """What was chosen in the last step: a token for each row, and whether the row is done.

    The last rank tells; the others hear. Nothing else travels back.
    """

    def __init__(self, seat: Seat, vocabulary: int) -> None:
        self._seat = seat
        self._vocabulary = vocabulary
        self.done: torch.Tensor | None = None

    @property
    def chooses(self) -> bool:
        """True on the rank that has the logits."""
        return self._seat.rank == self._seat.ranks - 1

    def tell(self, tokens: torch.Tensor, done: torch.Tensor) -> None:
        """All other ranks know the tokens of this step."""
        self._broadcast(torch.stack([tokens.long(), done.long()]))

    def hear(self, rows: int) -> torch.Tensor:
        """The tokens of this step, one for each row. `done` holds the rows that end with them."""
        message = torch.empty(2, rows, dtype=torch.long, device=self._seat.device)
        self._broadcast(message)
        self.done = message[1].bool()
        return message[0]

    def _broadcast(self, message: torch.Tensor) -> None:
        group = self._seat.group
        dist.broadcast(
            message.contiguous(), group=group, group_src=self._seat.ranks - 1
        )

    def as_logits(self, rows: int) -> Awaited:
        """Logits by which only the tokens of this step can be chosen."""
        return Awaited(self, rows, self._vocabulary)


class Awaited:
    """Logits of a step that the last rank has. Whoever looks at the last position waits for the tokens that
    are chosen there.
    """

    def __init__(self, tokens: Tokens, rows: int, vocabulary: int) -> None:
        self._tokens = tokens
        self.shape = torch.Size((rows, 1, vocabulary))

    def __getitem__(self, _: Any) -> torch.Tensor:
        chosen = self._tokens.hear(self.shape[0])
        logits = torch.full(
            (self.shape[0], self.shape[2]), -torch.inf, device=chosen.device
        )
        return logits.scatter_(1, chosen[:, None], 0.0)

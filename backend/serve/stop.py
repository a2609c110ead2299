"""Whether a loop of generation is over, said without waiting for the device where that can be.

The loop of transformers asks after each token whether a row is left that is not done. Asked of a tensor, the
host waits for its device, and then the device for its host, which prepares the next step. Where only the
length ends a request, the host knows. Where tokens end it, the answer comes a step late: the loop makes one
step more than it needs, and what that appended is taken off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

Answer = Callable[[], bool]


class Stop:
    """When one request is over: at `longest` tokens; or with `by_tokens`, when all of its rows are done."""

    def __init__(self, longest: int, by_tokens: bool) -> None:
        self._longest = longest
        self._by_tokens = by_tokens
        self._answers: deque[Answer] = deque()
        self.extra = 0
        """The tokens at the end of each row that one step too many has appended."""

    def rows(self, done: torch.Tensor, length: int) -> Rows:
        """The rows that are done with so many tokens, as the loop asks for them."""
        return Rows(done, lambda left: self._is_over(left, length))

    def _is_over(self, left: torch.Tensor, length: int) -> bool:
        if self._by_tokens:
            self._answers.append(_later(left.max() == 0))
        if len(self._answers) > 1 and self._answers.popleft()():
            self.extra = 1
            return True
        return length >= self._longest


class Rows:
    """A number for each row, in the place of the tensor that the loop makes of what its criteria say. What
    the loop computes from it are tensors, but for the one thing that it asks: whether the largest is 0.
    """

    def __init__(
        self, numbers: torch.Tensor, is_over: Callable[[torch.Tensor], bool]
    ) -> None:
        self._numbers = numbers
        self._is_over = is_over

    def __invert__(self) -> Rows:
        return Rows(~self._numbers, self._is_over)

    def __and__(self, other: Rows) -> Rows:
        return Rows(self._numbers & other._numbers, other._is_over)

    def __rsub__(self, other: Any) -> torch.Tensor:
        return torch.rsub(self._numbers, other)

    def max(self) -> Largest:
        """What can be compared with 0."""
        return Largest(lambda: self._is_over(self._numbers))

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.__and__ and isinstance(args[1], Rows):
            return Rows(args[0], args[1]._is_over) & args[1]
        plain = [arg._numbers if isinstance(arg, Rows) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


class Largest:
    """The largest number of rows, of which only is asked whether it is 0."""

    def __init__(self, is_zero: Answer) -> None:
        self._is_zero = is_zero

    def __eq__(self, other: object) -> bool:
        if other != 0:
            raise NotImplementedError
        return self._is_zero()

    __hash__ = None  # type: ignore[assignment]


def _later(flag: torch.Tensor) -> Answer:
    """The value of a flag that its device still computes; whoever asks waits for it."""
    arriving = flag.to("cpu", non_blocking=True)
    if not flag.is_cuda:
        return lambda: bool(arriving)
    copied = torch.cuda.Event()
    copied.record()

    def answer() -> bool:
        copied.synchronize()
        return bool(arriving)

    return answer

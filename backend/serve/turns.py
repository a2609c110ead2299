"""Requests that are in flight together: each runs in a thread of its own, and the threads take turns.

One thread runs at a time, and they follow each other in one order, so all ranks run the same calls in the
same order. A thread passes its turn on where it would wait for another rank, or for its device. On a device
each has a stream of its own: it waits for its own work alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Work = Callable[[], None]


class Turns:
    """Runs pieces of work that take turns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._live: list[threading.Semaphore] = []
        self._own = threading.local()
        self._errors: list[BaseException] = []
        self._streams: list[torch.cuda.Stream] = []
        """One for each piece of work, kept: memory that is free again is so for the stream that had it."""

    def run(self, works: Sequence[Work]) -> None:
        """All of the work is done. Raises what the first of it to fail has raised; the others stop at their
        next turn.
        """
        self._errors.clear()
        gates = [threading.Semaphore(0) for _ in works]
        self._live = list(gates)
        threads = [
            threading.Thread(target=self._enter, args=(place, gate, work), daemon=True)
            for place, (gate, work) in enumerate(zip(gates, works, strict=True))
        ]
        for thread in threads:
            thread.start()
        if gates:
            gates[0].release()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def pass_on(self) -> None:
        """All other threads have had their turns, as far as they are not done. Random numbers go on where
        they were.
        """
        gate = getattr(self._own, "gate", None)
        if gate is None or len(self._live) < 2:
            return
        state = _random_state(self._device)
        self._after(gate).release()
        gate.acquire()
        if self._errors:
            raise _Stopped
        _set_random_state(self._device, state)

    def _after(self, gate: threading.Semaphore) -> threading.Semaphore:
        place = self._live.index(gate)
        return self._live[(place + 1) % len(self._live)]

    @contextmanager
    def _on_stream(self, place: int) -> Iterator[None]:
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.set_device(self._device)
        while len(self._streams) <= place:
            self._streams.append(torch.cuda.Stream())
        stream = self._streams[place]
        # what was made before, weights for one, is there
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def _enter(self, place: int, gate: threading.Semaphore, work: Work) -> None:
        gate.acquire()
        self._own.gate = gate
        try:
            if not self._errors:
                with self._on_stream(place):
                    work()
        except _Stopped:
            pass
        except BaseException as error:
            self._errors.append(error)
        following = self._after(gate)
        self._live.remove(gate)
        if following is not gate:
            following.release()


class _Stopped(BaseException):
    """Other work has failed."""


def _random_state(device: torch.device) -> tuple[Any, ...]:
    if device.type == "cuda":
        return torch.get_rng_state(), torch.cuda.get_rng_state(device)
    return (torch.get_rng_state(),)


def _set_random_state(device: torch.device, state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)

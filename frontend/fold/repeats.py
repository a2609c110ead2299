"""Traces a block of modules that a model repeats twice, and makes one node of each further call alike.

A call is traced like any other until two calls with equal keys, whose code read equal values, had equal
traces. From then on, one node stands for a call with that key whose code would read these values. Lowering
makes the ops of that trace for it, with its own arguments, parameters and buffers: the program is the one
that tracing each call makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import _disable_current_modes

from stagecut.frontend.fold.body import (
    Body,
    Frames,
    Recorder,
    Replay,
    begins,
    in_model,
)
from stagecut.frontend.fold.calls import Call
from stagecut.frontend.fold.kinds import Kinds, has_global_hooks
from stagecut.frontend.fold.reads import Reads
from stagecut.frontend.fold.results import Odd
from stagecut.frontend.watch.known import KnownValues, depends_on_constants
from stagecut.frontend.watch.training import is_of_dropout
from stagecut.frontend.watch.watch import TraceWatch
from stagecut.ir.run.storage import storage_of


class Repeats:
    """Open while a model is traced. `replayed` counts the calls that were not traced by themselves."""

    def __init__(
        self, module: nn.Module, watch: TraceWatch, known: KnownValues
    ) -> None:
        self._watch = watch
        self._known = known
        self._kinds: Kinds[Body] = Kinds(module, self._add_attributes)
        self._others = _names_by_memory(module)
        self._tracer: Any = None
        self._numbers = count()
        self.replayed = 0

    @property
    def odd(self) -> list[str]:
        """Calls that stand for no other one, and why."""
        return self._kinds.odd

    @contextmanager
    def open(self) -> Iterator[None]:
        """While open, calls of repeated blocks are traced once for all."""
        tracer: Any = proxy_tensor._ModuleStackTracer
        run = tracer.call_module

        def call_module(
            own: Any, owner: nn.Module, forward: Any, args: Any, kwargs: Any
        ) -> Any:
            return self._call(
                own, owner, args, kwargs, lambda: run(own, owner, forward, args, kwargs)
            )

        with patch.object(tracer, "call_module", call_module):
            yield

    def _call(
        self,
        tracer: Any,
        owner: nn.Module,
        args: Any,
        kwargs: Any,
        run: Callable[[], Any],
    ) -> Any:
        # a branch of a conditional has a tracer of its own
        self._tracer = self._tracer or tracer
        if tracer is not self._tracer or not self._kinds.may_be_known(owner):
            return run()
        if tracer.enable_attr_proxy or has_global_hooks():
            return run()
        with torch._C.DisableTorchFunction():
            path = tracer.path_of_module(owner)
            found = self._kinds.find(
                Call(owner, path, args, kwargs, _Tracing(tracer, self))
            )
            if found is None:
                recorder = None
            elif found.kind is not None and found.known is not None:
                self._add_attributes(found.call, found.kind.reads)
                return self._replay(found.call, found.known)
            else:
                recorder = self._recorder(found.call)
        if found is None or recorder is None:
            return run()
        done = self._done(found.call, recorder)
        return self._kinds.record(found, run, recorder, done)

    def _replay(self, call: Call, body: Body) -> Any:
        self.replayed += 1
        with _disable_current_modes():
            result = Replay(body, call, self._tracer).run()
        self._watch.reads.read_again(in_model(call.path), body.reads)
        return result

    def _recorder(self, call: Call) -> Recorder:
        number = next(self._numbers)
        frames = _frames(self._tracer, call)
        begins(self._tracer, call, number)
        return Recorder(self._tracer, call, frames, number)

    def _done(self, call: Call, recorder: Recorder) -> Callable[[Any], Body]:
        """Tells from the result of a call that is traced from now on what it has done."""
        reads = self._watch.reads
        before = self._said()
        count = reads.count()

        def done(result: Any) -> Body:
            self._refuse(before)
            body = recorder.body(result)
            body.reads = reads.since(count, in_model(call.path))
            return body

        return done

    def _add_attributes(self, call: Call, reads: Reads) -> None:
        """The watch knows what the code of a call reads of its modules."""
        for path, name in reads.attributes:
            self._watch.attribute_reads.add(call.block[path], name)

    def _said(self) -> tuple[int, int]:
        """How many notes there are, and how often code has asked for values."""
        return len(self._watch.notes), self._known.asked

    def _refuse(self, before: tuple[int, int]) -> None:
        """Raises Odd for a call that has said or asked something."""
        notes, asked = self._said()
        if notes != before[0]:
            raise Odd("it makes a note")
        if asked != before[1]:
            raise Odd("it asks for the value of a constant")

    def sets_flag(self, path: str) -> bool:
        """True for a module whose training flag forward sets."""
        return in_model(path) in self._watch.reads.fixed

    def others(self, name: str) -> list[str]:
        """The names of the memory of a parameter or buffer, as a tracer has them."""
        root = name.partition(".")[0]
        return [f"{root}.{other}" for other in self._others.get(in_model(name), ())]

    def state(self) -> Any:
        """What code may ask about the trace."""
        return torch.is_grad_enabled(), self._watch.reads.state()


class _Tracing:
    """What a call finds around it in a trace."""

    def __init__(self, tracer: Any, repeats: Repeats) -> None:
        self._tracer = tracer
        self.state = repeats.state
        self.sets_flag = repeats.sets_flag
        self.others = repeats.others

    def node(self, tensor: torch.Tensor) -> fx.Node | None:
        slot = proxy_tensor.get_proxy_slot(tensor, self._tracer, None)
        return slot.proxy.node if slot is not None else None

    def knows(self, tensor: torch.Tensor) -> bool:
        return self.node(tensor) is not None

    def facts(self, tensor: torch.Tensor) -> Any:
        """Whether a tensor is a constant, and whether a dropout made it."""
        return depends_on_constants(tensor), is_of_dropout(tensor)

    def counts(self, path: str) -> int:
        return int(self._tracer.num_calls.get(path, 0))


def _frames(tracer: Any, call: Call) -> Frames:
    """The place of a call: what a node made here says of it."""
    probe = tracer.create_node("call_function", _frames, (), {}, name="stagecut_probe")
    tracer.graph.erase_node(probe)
    calls = tracer.num_calls.get(call.path, 0)
    cls = type(call.owner)
    own = (
        f"{call.path}@{calls}" if calls else call.path,
        (call.path, f"{cls.__module__}.{cls.__qualname__}"),
    )
    around = tuple(probe.meta["nn_module_stack"].items())
    return Frames(probe.meta.get("stack_trace", ""), (*around, own))


def _names_by_memory(module: nn.Module) -> dict[str, list[str]]:
    """The name of each parameter and buffer that shares its memory -> all names of that memory."""
    homes: dict[int, list[str]] = {}
    named = (
        module.named_parameters(remove_duplicate=False),
        module.named_buffers(remove_duplicate=False),
    )
    for name, tensor in chain(*named):
        homes.setdefault(storage_of(tensor) or -id(tensor), []).append(name)
    return {name: names for names in homes.values() if len(names) > 1 for name in names}

"""Traces a block of modules that a model repeats twice, and makes one node of each further call alike.

A call is traced like any other until two calls with equal keys, whose code read equal values, had equal
traces. From then on, one node stands for a call with that key whose code would read these values. Lowering
makes the ops of that trace for it, with its own arguments, parameters and buffers: the program is the one
that tracing each call makes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    Odd,
    Recorder,
    Replay,
    begins,
    in_model,
)
from stagecut.frontend.fold.calls import Call
from stagecut.frontend.fold.reads import Reads
from stagecut.frontend.fold.values import Unknown
from stagecut.frontend.watch.attributes import Containers
from stagecut.frontend.watch.generators import Generators
from stagecut.frontend.watch.known import KnownValues, depends_on_constants
from stagecut.frontend.watch.training import is_of_dropout
from stagecut.frontend.watch.watch import TraceWatch
from stagecut.ir.run.storage import storage_of

FEWEST = 3
"""So many modules must be alike to be looked at: the first two calls are traced in any case."""

MOST_KINDS = 16
"""Calls with one key whose code read so many other things are traced without another look."""


class Repeats:
    """Open while a model is traced. `replayed` counts the calls that were not traced by themselves."""

    def __init__(
        self, module: nn.Module, watch: TraceWatch, known: KnownValues
    ) -> None:
        self._watch = watch
        self._known = known
        self._repeated = _repeated(module)
        self._kinds: list[_Kind] = []
        self._others = _names_by_memory(module)
        self._recording = False
        self._tracer: Any = None
        self._numbers = count()
        self.replayed = 0
        self.odd: list[str] = []
        """Calls that stand for no other one, and why."""

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
        if (
            id(owner) not in self._repeated
            or self._recording
            or tracer is not self._tracer
        ):
            return run()
        if tracer.enable_attr_proxy or _has_global_hooks():
            return run()
        with torch._C.DisableTorchFunction():
            call = Call(
                owner,
                tracer.path_of_module(owner),
                args,
                kwargs,
                _Tracing(tracer, self),
            )
            key = call.key()
            alike = [kind for kind in self._kinds if kind.key == key]
            if (
                key is None
                or any(kind.is_odd for kind in alike)
                or len(alike) > MOST_KINDS
            ):
                found = None
            else:
                found = _Found(tracer, call, key, _frames(tracer, call))
        if found is None:
            return run()
        with torch._C.DisableTorchFunction():
            kind = _fitting(alike, found)
            if kind is not None and kind.is_confirmed:
                return self._replay(found, kind)
        return self._record(found, kind, run)

    def _replay(self, found: _Found, kind: _Kind) -> Any:
        self.replayed += 1
        with _disable_current_modes():
            result = Replay(kind.body, found.call, found.tracer).run()
        self._watch.reads.read_again(in_model(found.call.path), kind.body.reads)
        self._add_attributes(found.call, kind.reads)
        return result

    def _record(self, found: _Found, kind: _Kind | None, run: Callable[[], Any]) -> Any:
        """The result of a call that is traced. The kinds gain one, or the kind is confirmed or corrected."""
        kinds = self._kinds
        reads = Reads()
        before = self._outside()
        containers = Containers(found.call.arguments)
        with torch._C.DisableTorchFunction():
            number = next(self._numbers)
            begins(found.tracer, found.call, number)
            recorder = Recorder(found.tracer, found.call, found.frames, number)
        self._recording = True
        try:
            with recorder, reads.noting(found.call.block):
                result = run()
        finally:
            self._recording = False
            self._add_attributes(found.call, reads)
        with torch._C.DisableTorchFunction():
            try:
                self._refuse(found, before, containers, reads)
                body = recorder.body(result)
                body.reads = self._watch.reads.since(
                    before.reads, in_model(found.call.path)
                )
                values = reads.values(found.call.block)
            except (Odd, Unknown) as error:
                self.odd.append(f"{found.call.path}: {error}")
                if kind is not None:
                    kinds.remove(kind)
                kinds.append(_Kind(found.key, Reads(), None, None))
                return result
            if kind is None:
                kinds.append(_Kind(found.key, reads, values, body))
            else:
                kind.learn(reads, found.call, body)
        return result

    def _add_attributes(self, call: Call, reads: Reads) -> None:
        """The watch knows what the code of a call reads of its modules."""
        for path, name in reads.attributes:
            self._watch.attribute_reads.add(call.block[path], name)

    def _outside(self) -> _Outside:
        watch = self._watch
        return _Outside(
            Generators(), len(watch.notes), watch.reads.count(), self._known.asked
        )

    def _refuse(
        self, found: _Found, before: _Outside, containers: Containers, reads: Reads
    ) -> None:
        """Raises Odd for a call that did something besides making nodes."""
        if reads.odd:
            raise Odd(reads.odd)
        if containers.changed():
            raise Odd("it changes a container it is given")
        if before.generators.drawn():
            raise Odd("it draws from a generator")
        if before.notes != len(self._watch.notes):
            raise Odd("it makes a note")
        if before.known != self._known.asked:
            raise Odd("it asks for the value of a constant")
        if not found.call.is_as_before(found.key):
            raise Odd("it leaves something changed")

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


@dataclass
class _Outside:
    """What lies outside of the graph, before a call."""

    generators: Generators
    notes: int
    reads: int
    known: int


@dataclass
class _Found:
    """A call that may be like others."""

    tracer: Any
    call: Call
    key: dict[str, Any]
    frames: Frames


class _Kind:
    """Calls that are traced alike, as far as that is known; with no body, calls that are traced each."""

    def __init__(
        self, key: dict[str, Any], reads: Reads, values: Any, body: Body | None
    ) -> None:
        self.key = key
        self.reads = reads
        self.values = values
        self._body = body
        self.is_odd = body is None
        self.is_confirmed = False

    @property
    def body(self) -> Body:
        assert self._body is not None
        return self._body

    def fits(self, call: Call) -> bool:
        """True when the code would read the same in this call."""
        try:
            return bool(self.reads.values(call.block) == self.values)
        except Unknown:
            return False

    def learn(self, reads: Reads, call: Call, body: Body) -> None:
        """The kind is confirmed where another call of it has read no more, has changed nothing that it read,
        and has an equal trace; else it is that of the later call.
        """
        is_equal = self.fits(call) and self.body.equals(body)
        self.is_confirmed = is_equal and self.reads.includes(reads)
        self.reads.add(reads)
        self.values = self.reads.values(call.block)
        self._body = body


def _fitting(kinds: Sequence[_Kind], found: _Found) -> _Kind | None:
    for kind in kinds:
        if kind.fits(found.call):
            return kind
    return None


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


def _has_global_hooks() -> bool:
    hooks: Any = nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
    )


# --- before the trace -------------------------------------------------------------------------------------


def _repeated(module: nn.Module) -> set[int]:
    """The ids of the modules that have parts, and that FEWEST modules or more are like at first sight."""
    forms: dict[int, int] = {}
    numbers: dict[Any, int] = {}

    def form(owner: nn.Module) -> int:
        parts = [
            (name, form(part))
            for name, part in owner._modules.items()
            if part is not None
        ]
        number = numbers.setdefault((type(owner), (*parts,)), len(numbers))
        forms[id(owner)] = number
        return number

    form(module)
    alike = Counter(forms.values())
    repeated = [
        owner for owner in module.modules() if alike[forms[id(owner)]] >= FEWEST
    ]
    return {id(owner) for owner in repeated if owner._modules}


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

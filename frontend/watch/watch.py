"""Watches for what a trace would lose without a word: state that forward changes outside of parameters and
buffers, and changes that tracing makes to a model.

A `Watch` is open while torch.export runs. It makes assigned buffers writes of the graph, keeps grad modes and
autocast where they stand, notes plain attributes that change, and leaves the model as it was.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from stagecut.frontend.marks import ASSIGNED, CHOICES, FIXED, SYMBOLS
from stagecut.frontend.source import place_of, shown, user_line
from stagecut.frontend.watch.attributes import (
    HOOKS,
    RETURN_IT,
    Contents,
    Kept,
    attributes,
    brief,
    content_of,
    fingerprint,
    is_memory,
)
from stagecut.frontend.watch.forbidden import (
    DRAW,
    KEEP_WHOLE,
    NOTED,
    UNTRACEABLE,
    GradFlags,
    Unread,
    Untraceable,
    refusing,
)
from stagecut.frontend.watch.generators import STEERS, Generators, is_generator
from stagecut.frontend.watch.globals import Surroundings
from stagecut.frontend.watch.line import LineFinder
from stagecut.frontend.watch.training import ModeReads, last_node, node_of
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import CaptureError
from stagecut.ir.run.storage import storage_of


def watched(
    module: nn.Module,
    export: Callable[[Watch], ExportedProgram],
    whole: Sequence[str],
    remarks: list[str],
) -> ExportedProgram:
    """The program that `export` returns; `export` opens the watch that it is given around the trace.

    Where forward leaves attributes changed, it is traced again with the attributes as it left them. The trace
    stands for all calls when the second trace is the same and changes nothing further. Raises CaptureError
    with the source line otherwise.
    """
    _refuse_backward_hooks(module, whole)
    first = Watch(module)
    try:
        exported = export(first)
    except _Lost as error:
        raise CaptureError(
            error.what, where=_line_of(error, module, export), hint=error.hint
        ) from None
    if first.drew:
        if not _draws_for_nothing(module, export, exported):
            lost = _draw(first.drew, module)
            raise CaptureError(
                lost.what, where=_line_of(lost, module, export), hint=lost.hint
            )
        first.notes.append(
            f"forward draws from {first.drew}, and nothing depends on what it draws: the stages do not draw"
        )
    remarks[:] = first.notes
    if (
        first.left
        and (again := _again(module, export, first, exported, first.left)) != SAME_TRACE
    ):

        def carrying(left: dict[tuple[str, str], Any]) -> str:
            return _again(module, export, first, exported, left)

        groups: dict[Any, dict[tuple[str, str], Any]] = {}
        for (path, name), value in first.left.items():
            groups.setdefault((type(module.get_submodule(path)), name), {})[
                path, name
            ] = value
        raise first.refusal(
            next(iter(_guilty(list(groups.values()), carrying) or first.left)),
            for_good=again == SETTLED,
        )
    return first.checked(exported)


class _Lost(CaptureError):
    """Forward did something that no trace holds. `happened` tells, while a watch is open, whether it has done
    so.
    """

    def __init__(
        self, what: str, happened: Callable[[Watch], Any], *, where: str, hint: str
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.happened = happened


def _draw(source: str, module: nn.Module) -> _Lost:
    return _Lost(
        f"forward draws from {source} or seeds it, and a trace would keep what was drawn",
        lambda watch: watch._generators.drawn(),
        where=place_of(type(module)),
        hint=DRAW,
    )


def _line_of(
    error: _Lost, module: nn.Module, export: Callable[[Watch], ExportedProgram]
) -> str:
    """The line that does it, found in another trace."""
    watch = Watch(module, find=error.happened)
    try:
        export(watch)
    except Exception as other:
        raise_ours(other)
    return (
        shown(watch.finder.line) if watch.finder and watch.finder.line else error.where
    )


def _guilty(
    groups: list[dict[tuple[str, str], Any]],
    carrying: Callable[[dict[tuple[str, str], Any]], str],
) -> dict[tuple[str, str], Any]:
    """The changed attributes that make the next call trace differently: the group without which both traces
    are the same, else a group that alone makes them differ.
    """
    if len(groups) == 1:
        return groups[0]
    for group in groups:
        if (
            carrying(
                {
                    key: value
                    for other in groups
                    if other is not group
                    for key, value in other.items()
                }
            )
            == SAME_TRACE
        ):
            return group
    # hooks go with the flag that says they are there
    plain = [group for group in groups if not any(name in HOOKS for _, name in group)]
    return next((group for group in plain if carrying(group) != SAME_TRACE), {})


SAME_TRACE, SETTLED, READ = "same trace", "settled", "read"


def _again(
    module: nn.Module,
    export: Any,
    first: Watch,
    exported: ExportedProgram,
    left: dict[tuple[str, str], Any],
) -> str:
    """Traces again with these attributes as forward left them. SAME_TRACE: the graph is equal. SETTLED: the
    graph differs, but forward leaves the same in the attributes. READ: otherwise.
    """
    second = Watch(module, left)
    try:
        again = export(second)
    except Exception as error:
        raise_ours(error)
        return READ
    if any(second.ends[key] != first.ends[key] for key in left):
        return READ
    return SAME_TRACE if _equal(exported, again) else SETTLED


def _draws_for_nothing(
    module: nn.Module,
    export: Callable[[Watch], ExportedProgram],
    exported: ExportedProgram,
) -> bool:
    """True when the trace is the same whatever forward draws from generators that are not torch's."""
    for word in STEERS:
        watch = Watch(module, steer=partial(Generators.steer, word=word))
        try:
            again = export(watch)
        except Exception:
            return False
        if not _equal(exported, again):
            return False
    return True


def _equal(one: ExportedProgram, other: ExportedProgram) -> bool:
    constants = [list(program.constants.values()) for program in (one, other)]
    return (
        _text(one) == _text(other)
        and len(constants[0]) == len(constants[1])
        and all(map(same_constant, *constants))
    )


def _text(exported: ExportedProgram) -> list[str]:
    """The graphs of a program as text, without the numbers of calls of autograd.Functions."""
    return [
        re.sub(r"#\d+", "", str(m.graph))
        for m in exported.graph_module.modules()
        if isinstance(m, fx.GraphModule)
    ]


def same_constant(one: Any, other: Any) -> bool:
    """True for two constants of traces that have equal values; on the meta device, for two of one type."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one is other
    if one.is_meta or other.is_meta:  # no values to compare
        return (one.shape, one.dtype, one.device) == (
            other.shape,
            other.dtype,
            other.device,
        )
    return torch.equal(one, other)


class Watch:
    """Open while a module is traced. `checked` says afterwards whether the trace holds all that forward
    did.
    """

    def __init__(
        self,
        module: nn.Module,
        carried: dict[tuple[str, str], Any] | None = None,
        find: Callable[[Watch], Any] | None = None,
        steer: Callable[[Generators], None] = lambda _: None,
    ) -> None:
        self._module = module
        self._steer = steer
        self.drew = ""
        self._carried = carried or {}
        self._stack = ExitStack()
        self._reads = ModeReads(module)
        self._hooks: set[Any] = set()
        self._numbers: dict[tuple[str, str], set[int]] = {}
        self._lines: dict[tuple[int, str], tuple[str, int, str]] = {}
        self._start: dict[tuple[str, str], Any] = {}
        self._children: dict[tuple[str, str], nn.Module | None] = {}
        self._state: dict[tuple[str, str, str], Any] = {}
        self._versions: dict[tuple[str, str, str], int] = {}
        self._changed: dict[tuple[str, str], str] = {}
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.notes: list[str] = []
        self.finder = LineFinder(lambda: find(self)) if find else None
        self._held: set[int] = set()
        self.left: dict[tuple[str, str], Any] = {}
        self.ends: dict[tuple[str, str], Any] = {}

    def __enter__(self) -> Watch:
        with self._stack:  # closed again where opening fails
            self._open()
            self._stack = self._stack.pop_all()
        return self

    def _open(self) -> None:
        from torch._export.passes import (
            replace_autocast_with_hop_pass,
            replace_set_grad_with_hop_pass,
        )

        trace: Any = importlib.import_module("torch.export._trace")
        kept, self._around = Kept(self._module), Surroundings(self._module)
        self._generators = Generators(
            [*self._around.generators, *filter(is_generator, kept.parts())]
        )
        for before in (self._generators, self._around, kept):
            self._stack.callback(before.restore)
        self._steer(self._generators)
        self._tensors = kept.replace_tensors()
        for (path, name), value in self._carried.items():
            module: nn.Module = self._module.get_submodule(path)
            if name in HOOKS:
                vars(module)[name].update(value)
                continue
            home: dict[str, Any] = (
                module._modules if name in module._modules else vars(module)
            )
            home[name] = value
        # these passes lose nested grad modes and autocasts
        for passes in (replace_set_grad_with_hop_pass, replace_autocast_with_hop_pass):
            self._patch(
                passes,
                passes.__name__.rpartition(".")[2],
                lambda graph, signature: (graph, signature),
            )
        # this class looks closer
        self._patch(trace, "_detect_attribute_assignment", _nothing)
        self._patch(
            trace,
            "_materialize_and_lift_constants",
            _without_unread(trace._materialize_and_lift_constants),
        )
        self._patch(trace, "register_buffer_assignment_hook", lambda *_: _Handle())
        self._patch(nn.Module, "__setattr__", self._noting(nn.Module.__setattr__))
        self._stack.enter_context(self._reads.noting())
        self._stack.enter_context(GradFlags(lambda: self._held))
        for owner, name, what in NOTED:
            self._patch(owner, name, self._remarking(getattr(owner, name), what))
        for owner, name, why in UNTRACEABLE:
            self._patch(owner, name, refusing(getattr(owner, name), why))
        self._patch(torch.random, "default_generator", Unread(torch.default_generator))
        for handle in (
            self._module.register_forward_pre_hook(
                self._begin, prepend=True, with_kwargs=True
            ),
            self._module.register_forward_hook(self._end),
        ):
            self._stack.callback(handle.remove)
        if self.finder:
            self._stack.callback(self.finder.stop)

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def _patch(self, owner: Any, name: str, new: Any) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, new)

    def _noting(self, plain: Callable[..., None]) -> Callable[..., None]:
        def setattr_(owner: nn.Module, name: str, value: Any) -> None:
            self._lines[id(owner), name] = user_line()
            plain(owner, name, value)

        return setattr_

    def _remarking(self, plain: Callable[..., Any], what: str) -> Callable[..., Any]:
        def remark(*args: Any, **kwargs: Any) -> Any:
            note = f"{what}: {shown(user_line())}"
            if note not in self.notes:
                self.notes.append(note)
            return plain(*args, **kwargs)

        return remark

    # --- while forward is traced ------------------------------------------------------------------

    def _begin(self, _: nn.Module, *given: Any) -> None:
        self._given = Contents(given)
        self._held = {
            id(t)
            for t in (
                *tree_leaves(given),
                *self._module.parameters(),
                *self._module.buffers(),
            )
        }
        self._lines.clear()
        self._state = dict(_state(self._module))
        self._versions = {
            key: tensor._version
            for key, tensor in self._state.items()
            if tensor is not None
        }
        self._hooks = {
            hook
            for owner in self._module.modules()
            for hook in (
                *owner._forward_hooks.values(),
                *owner._forward_pre_hooks.values(),
            )
        }
        self._start = {
            key: (value, fingerprint(value), brief(value))
            for key, value in attributes(self._module)
        }
        self._children = dict(_children(self._module))
        self._numbers = {key: set(hooks) for key, hooks in _hooks(self._module)}
        if self.finder:
            self.finder.start()

    def _end(self, _: nn.Module, __: Any, result: Any) -> None:
        if self.finder:
            self.finder.stop()
        for leaf in tree_leaves(result):
            # torch 2.11 looks for the class of a result in a set, by hash
            if type(leaf).__hash__ is None:
                raise odd_output(self._module, type(leaf).__name__)
        self._refuse_lost()
        self._write_back()
        for key, child in _children(self._module):
            self.ends[key] = type(child)
            before = self._children.get(key)
            if before is not child:
                self._changed[key] = (
                    f"{type(before).__name__} -> {type(child).__name__}"
                )
                self.left[key] = child
        for key, hooks in _hooks(self._module):
            self.ends[key] = len(hooks)
            if new := {
                number: hook
                for number, hook in hooks.items()
                if number not in self._numbers.get(key, ())
            }:
                self._changed[key] = f"{len(new)} more"
                self.left[key] = new
        for key, value in attributes(self._module):
            end = fingerprint(value)
            self.ends[key] = fingerprint(value, settled=True)
            _, start, was = self._start.get(key, (None, None, "nothing"))
            if start != end:
                self._changed[key] = f"{was} -> {brief(value)}"
                if not _is_constant(value):
                    self.left[key] = _carry(value)

    def _refuse_lost(self) -> None:
        """Raises CaptureError where forward changes a container it is given or a variable outside of the
        model, or draws from a generator that cannot be steered.
        """
        if source := self._generators.drawn():
            self.drew = source
            if not self._generators.can_be_steered():
                raise _draw(source, self._module)
        if self._given.changed():
            raise _Lost(
                "forward changes a container it is given, and the stages would not",
                lambda watch: watch._given.changed(),
                where=place_of(type(self._module)),
                hint=RETURN_IT,
            )
        for owner, name in self._around.changed():
            what = (
                f"'{name}', which lies outside of the model, is changed while forward runs, and the stages "
                "would not"
            )
            place = place_of(owner) if isinstance(owner, type) else _beginning(owner)
            if owner not in self._hooks:
                raise _Lost(
                    what,
                    partial(_changes, owner, name),
                    where=place,
                    hint="return what it collects as an output, make a number a buffer, "
                    + KEEP_WHOLE,
                )
            self.notes.append(f"{what}: {place}")  # a hook that only looks on

    def _write_back(self) -> None:
        """Buffers that were given another tensor get its values, after everything else that forward does."""
        now = dict(_state(self._module))
        for key in dict.fromkeys([*self._state, *now]):
            if now.get(key) is not self._state.get(key):
                self._refuse_assignment(key, self._state.get(key), now.get(key))
        assigned = [
            (key, self._state[key], new)
            for key, new in now.items()
            if new is not self._state.get(key)
        ]
        old = {id(before) for _, before, _ in assigned}
        final = [
            self._mark(key, new.clone()) if id(new) in old else new
            for key, _, new in assigned
        ]
        for (key, before, _), new in zip(assigned, final, strict=True):
            self._mark(key, before.copy_(new))

    def _mark(self, key: tuple[str, str, str], tensor: torch.Tensor) -> torch.Tensor:
        """The last op of the trace stands for the assignment to a buffer."""
        node = last_node()
        node.meta[ASSIGNED] = True
        line = self._lines.get((id(self._module.get_submodule(key[0])), key[2]))
        if line:
            node.meta["stack_trace"] = (
                f'  File "{line[0]}", line {line[1]}, in {line[2]}'
            )
        return tensor

    def _refuse_assignment(
        self, key: tuple[str, str, str], before: Any, new: Any
    ) -> None:
        """Raises CaptureError for an assignment that changes more than the values of one buffer."""
        path, kind, name = key
        if kind == "parameter":
            why = "a parameter must stay the tensor that an optimizer holds"
        elif before is None or new is None:
            why = "which makes or removes state while it runs"
        elif (before.shape, before.dtype, before.device) != (
            new.shape,
            new.dtype,
            new.device,
        ):
            why = f"{brief(before)} becomes {brief(new)}, and state keeps its size and dtype"
        elif any(other is before and k != key for k, other in self._state.items()):
            why = "which has a second name that goes on holding the old tensor"
        elif self._is_tied(key, new):
            why = "a second name for a tensor that is written in place"
        else:
            return
        raise CaptureError(
            f"forward assigns the {kind} '{f'{path}.{name}'.lstrip('.')}': {why}",
            where=self._where(path, name),
            hint=(
                "where only the first call does so, call the model once before; else write into it: "
                "self.name.copy_(...), a buffer of the final size made in __init__, "
                + KEEP_WHOLE
            ),
        )

    def _is_tied(self, key: tuple[str, str, str], new: torch.Tensor) -> bool:
        """True when the next call would write two buffers where it wrote one before."""
        others = [
            k
            for k, item in _state(self._module)
            if k != key and item is not None and storage_of(item) == storage_of(new)
        ]
        return bool(others) and any(
            self._state[k]._version != self._versions[k] for k in (key, *others)
        )

    # --- afterwards -------------------------------------------------------------------------------

    def checked(self, exported: ExportedProgram) -> ExportedProgram:
        """The exported program, with the model's own tensors as its constants. Its meta has the places at
        which Python chose by mode.
        """
        for name, value in exported.constants.items():
            if isinstance(
                value, torch.Tensor
            ) and torch._C._functorch.is_functorch_wrapped_tensor(value):
                raise CaptureError(
                    "forward calls torch.func.grad, vjp or jacrev, of which a trace keeps example values as "
                    "constants",
                    where=place_of(type(self._module)),
                    hint="use torch.autograd.grad(..., create_graph=True), "
                    + KEEP_WHOLE,
                )
            if id(value) in self._tensors:
                exported.constants[name] = self._tensors[id(value)][0]
        exported.graph_module.meta |= {
            CHOICES: self._reads.choices,
            FIXED: self._reads.fixed,
        }
        return exported

    def refusal(self, key: tuple[str, str], for_good: bool) -> CaptureError:
        """The error for an attribute that forward changes, once and for good or in each call, and reads in
        the next call.
        """
        path, name = key
        what = (
            f"forward changes the attribute '{f'{path}.{name}'.lstrip('.')}' ({self._changed[key]}), which "
            "a trace would freeze"
        )
        if for_good:
            return CaptureError(
                what,
                where=self._where(path, name),
                hint="call the model once before: its first call differs from the others",
            )
        return Unsettled(
            what,
            path,
            where=self._where(path, name),
            hint="make it a buffer: register_buffer, changed in place",
        )

    def _where(self, path: str, name: str) -> str:
        owner = self._module.get_submodule(path)
        line = self._lines.get((id(owner), name))
        return shown(line) if line else place_of(type(owner))


def odd_output(module: nn.Module, kind: str) -> CaptureError:
    """The error for a result of a class that no trace returns."""
    return CaptureError(
        f"{type(module).__name__} returns a {kind}, which is neither a tensor nor plain data",
        where=place_of(type(module)),
        hint=(
            "return tensors, numbers and texts, in tuples, lists, dicts, and objects that have them as "
            "attributes"
        ),
    )


def _changes(owner: Any, name: str, watch: Watch) -> bool:
    return (owner, name) in watch._around.changed()


def _beginning(function: FunctionType) -> str:
    code = function.__code__
    return f"{code.co_filename}:{code.co_firstlineno} in {code.co_name}"


def _children(module: nn.Module) -> Iterator[tuple[tuple[str, str], nn.Module | None]]:
    """The submodules by path and name, outer ones first."""
    for path, owner in module.named_modules():
        for name, child in owner._modules.items():
            yield (path, name), child


def _hooks(module: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """The hooks on the forward of all modules, by path and name."""
    for path, owner in module.named_modules():
        for name in HOOKS:
            yield (path, name), vars(owner)[name]


def _refuse_backward_hooks(module: nn.Module, kept_whole: Sequence[str]) -> None:
    """Raises CaptureError for a module with hooks on its backward, unless it is kept whole."""
    for path, owner in module.named_modules():
        hooks = [*owner._backward_hooks.values(), *owner._backward_pre_hooks.values()]
        if hooks and not any(
            path == whole or path.startswith(whole + ".") for whole in kept_whole
        ):
            code = getattr(hooks[0], "__code__", None)
            raise CaptureError(
                f"module '{path}' ({type(owner).__name__}) has a backward hook, and stages are made of ops "
                "that know no hooks",
                where=f"{code.co_filename}:{code.co_firstlineno} in {code.co_name}"
                if code
                else repr(hooks[0]),
                hint=f"keep the module whole: leaf_modules=['{path}']"
                if path
                else "register it on the stages",
            )


class Unsettled(CaptureError):
    """Forward changes an attribute of the module at `path`, and reads it in the next call."""

    def __init__(self, what: str, path: str, *, where: str, hint: str) -> None:
        super().__init__(what, where=where, hint=hint)
        self.path = path


def _without_unread(lift: Callable[..., Any]) -> Callable[..., Any]:
    """`lift`, called after constants that nothing reads are removed, because it fails on them. Their readers
    had no effect.
    """

    def lifted(traced: fx.GraphModule, *rest: Any) -> Any:
        for node in traced.graph.find_nodes(op="get_attr"):
            if not node.users:
                traced.graph.erase_node(node)
        return lift(traced, *rest)

    return lifted


class _Handle:
    def remove(self) -> None:
        """Nothing was registered."""


@contextmanager
def _nothing(_: Any) -> Iterator[None]:
    yield


def _state(module: nn.Module) -> Iterator[tuple[tuple[str, str, str], Any]]:
    """Parameters and buffers under all their names, also those that are None."""
    for path, owner in module.named_modules():
        for kind, held in (
            ("parameter", owner._parameters),
            ("buffer", owner._buffers),
        ):
            for name, item in held.items():
                yield (path, kind, name), item


class _Gone(torch.Tensor):
    """A tensor that an earlier call left behind. A trace must not read it."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise LeftBehind(
            f"forward reads what an earlier call left in an attribute ({getattr(func, '__name__', func)})"
        )


_GONE = torch.Tensor._make_subclass(_Gone, torch.empty(0))


class LeftBehind(Untraceable):
    """Forward reads a tensor that an earlier call left in an attribute."""


def _carry(item: Any, inside: tuple[int, ...] = ()) -> Any:
    """The object that the next call finds where this one leaves `item`: new containers, `_Gone` for
    tensors.
    """
    if isinstance(item, SYMBOLS) and not isinstance(item, nn.Parameter):
        return _GONE
    content = content_of(item)
    if content is None or id(content) in inside:
        return item
    if is_memory(item):
        return copy.copy(item)
    below = (*inside, id(content))
    if isinstance(item, (list, set, deque)) or type(item) is tuple:
        return type(item)(_carry(part, below) for part in item)
    if isinstance(item, tuple):
        return item
    made: Any = copy.copy(item)
    (made if isinstance(item, dict) else vars(made)).update(
        {k: _carry(v, below) for k, v in content.items()}
    )
    return made


def _is_constant(item: Any) -> bool:
    """True for tensors that depend on no input, no state and no random number. Making them again changes
    nothing.
    """
    leaves = tree_leaves(item)
    return bool(leaves) and all(
        isinstance(leaf, torch.Tensor) and not _depends(leaf) for leaf in leaves
    )


def _depends(tensor: torch.Tensor) -> bool:
    made = node_of(tensor)
    todo = [made] if made is not None else []
    seen: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        tags = getattr(node.target, "tags", ())
        if node.op == "placeholder" or torch.Tag.nondeterministic_seeded in tags:
            return True
        todo += [before for before in node.all_input_nodes if before not in seen]
        seen.update(node.all_input_nodes)
    return False

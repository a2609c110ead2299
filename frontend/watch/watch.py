"""Watches for what a trace would lose without a word: state that forward changes outside of parameters and
buffers, and changes that tracing makes to a model.

A `TraceWatch` is open while torch.export runs. It makes assigned buffers writes of the graph, keeps grad
modes and autocast where they stand, notes plain attributes that change, and leaves the model as it was.
"""

from __future__ import annotations

import copy
import importlib
import re
import sys
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
from stagecut.frontend.source import (
    is_users_file,
    outside_of_modes,
    place_of,
    shown,
    user_line,
)
from stagecut.frontend.watch.attribute_reads import AttributeReads
from stagecut.frontend.watch.attributes import (
    HOOKS,
    PUT_BACK,
    RETURN_IT,
    Containers,
    ModelContainers,
    attributes,
    brief,
    content_of,
    fingerprint,
    is_memory,
)
from stagecut.frontend.watch.checks import Checks
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
from stagecut.frontend.watch.lost_lines import LostLines
from stagecut.frontend.watch.prints import noting_prints
from stagecut.frontend.watch.training import ModeReads, last_node, node_of
from stagecut.ir.blame import OnPurpose, raise_ours
from stagecut.ir.errors import CaptureError
from stagecut.ir.run.remembered import Remembered
from stagecut.ir.run.storage import storage_of

Attributes = dict[tuple[str, str], Any]
"""Attributes of modules: module path and name -> value."""


def watched(
    module: nn.Module,
    export: Callable[[TraceWatch], ExportedProgram],
    whole: Sequence[str],
    notes: list[str],
    attributes_read: list[Remembered],
    folded: bool = False,
) -> ExportedProgram:
    """The program that `export` returns; `export` opens the watch that it is given around the trace. `notes`
    and `attributes_read` become those of the trace.

    A trace that is `folded`, in which nodes stand for whole calls, is compared with no other one: raises
    TraceEach where that would be needed.

    Where forward leaves attributes changed, it is traced again with the attributes as it left them. The trace
    stands for all calls when the second trace is the same and changes nothing further. Raises CaptureError
    with the source line otherwise.
    """
    _refuse_backward_hooks(module, whole)
    first = TraceWatch(module)
    try:
        exported = export(first)
    except _Lost as error:
        if folded:
            raise TraceEach from None
        raise _with_line(error, module, export) from None
    if folded and (first.drew or first.left_behind):
        raise TraceEach
    if first.drew:
        if not _draws_for_nothing(module, export, exported):
            raise _with_line(_draw(first.drew, module), module, export)
        first.notes.append(
            f"forward draws from {first.drew}, and nothing depends on what it draws: the stages do not draw"
        )
    notes[:] = [*first.notes, *first.asked, *first.lost.notes]
    if first.left_behind:
        _refuse_unsettled(module, export, first, exported)
    attributes_read[:] = first.attributes_read(whole)
    return first.checked(exported)


def _refuse_unsettled(
    module: nn.Module,
    export: Callable[[TraceWatch], ExportedProgram],
    first: TraceWatch,
    exported: ExportedProgram,
) -> None:
    """Raises CaptureError where the next call differs because of the attributes that forward leaves
    changed.
    """

    def outcome(left: Attributes) -> str:
        return _again(module, export, first, exported, left)

    whole_outcome = outcome(first.left_behind)
    if whole_outcome == SAME_TRACE:
        return
    groups: dict[Any, Attributes] = {}
    for key, value in first.left_behind.items():
        path, name = key
        group = groups.setdefault((type(module.get_submodule(path)), name), {})
        group[key] = value
    guilty = _guilty(list(groups.values()), outcome) or first.left_behind
    raise first.refusal(next(iter(guilty)), for_good=whole_outcome == SETTLED)


class TraceEach(OnPurpose):
    """Nothing may stand for a call of this model: each has to be traced by itself."""


class _Lost(CaptureError):
    """Forward did something that no trace holds. `happened` tells, while a watch is open, whether it has done
    so.
    """

    def __init__(
        self, what: str, happened: Callable[[TraceWatch], Any], *, where: str, hint: str
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


def _with_line(
    error: _Lost, module: nn.Module, export: Callable[[TraceWatch], ExportedProgram]
) -> CaptureError:
    """The error for the user, with the line that does it, found in another trace."""
    watch = TraceWatch(module, find=error.happened)
    try:
        export(watch)
    except Exception as failure:
        raise_ours(failure)
    line = watch.finder.line if watch.finder else None
    return CaptureError(
        error.what, where=shown(line) if line else error.where, hint=error.hint
    )


def _guilty(
    groups: list[Attributes], outcome: Callable[[Attributes], str]
) -> Attributes:
    """The changed attributes that make the next call trace differently: the group without which both traces
    are the same, else a group that alone makes them differ.
    """
    if len(groups) == 1:
        return groups[0]
    for group in groups:
        rest: Attributes = {}
        for other in groups:
            if other is not group:
                rest |= other
        if outcome(rest) == SAME_TRACE:
            return group
    for group in groups:
        # hooks go with the flag that says they are there
        has_hooks = any(name in HOOKS for _, name in group)
        if not has_hooks and outcome(group) != SAME_TRACE:
            return group
    return {}


SAME_TRACE, SETTLED, READ = "same trace", "settled", "read"


def _again(
    module: nn.Module,
    export: Any,
    first: TraceWatch,
    exported: ExportedProgram,
    left: Attributes,
) -> str:
    """Traces again with these attributes as forward left them. SAME_TRACE: the graph is equal. SETTLED: the
    graph differs, but forward leaves the same in the attributes. READ: otherwise.
    """
    second = TraceWatch(module, left)
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
    export: Callable[[TraceWatch], ExportedProgram],
    exported: ExportedProgram,
) -> bool:
    """True when the trace is the same whatever forward draws from generators that are not torch's."""
    for word in STEERS:
        watch = TraceWatch(module, steer=partial(Generators.steer, word=word))
        try:
            again = export(watch)
        except Exception:
            return False
        if not _equal(exported, again):
            return False
    return True


def _equal(first: ExportedProgram, second: ExportedProgram) -> bool:
    constants = [list(program.constants.values()) for program in (first, second)]
    return (
        _text(first) == _text(second)
        and len(constants[0]) == len(constants[1])
        and all(map(same_constant, *constants))
    )


def _text(exported: ExportedProgram) -> list[str]:
    """The graphs of a program as text, without the numbers of calls of autograd.Functions."""
    return [
        re.sub(r"#\d+", "", str(module.graph))
        for module in exported.graph_module.modules()
        if isinstance(module, fx.GraphModule)
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


class TraceWatch:
    """Open while a module is traced. `checked` says afterwards whether the trace holds all that forward
    did.
    """

    def __init__(
        self,
        module: nn.Module,
        carried: Attributes | None = None,
        find: Callable[[TraceWatch], Any] | None = None,
        steer: Callable[[Generators], None] = lambda _: None,
    ) -> None:
        self._module = module
        self._steer = steer
        self.drew = ""
        self._carried = carried or {}
        self._stack = ExitStack()
        self.reads = ModeReads(module)
        self.attribute_reads = AttributeReads(module)
        self.lost = LostLines(module)
        self.checks = Checks(self.lost)
        self._hooks: set[Any] = set()
        self._hook_numbers: dict[tuple[str, str], set[int]] = {}
        self._lines: dict[tuple[int, str], tuple[str, int, str]] = {}
        self._start: dict[tuple[str, str], Any] = {}
        self._children: dict[tuple[str, str], nn.Module | None] = {}
        self._state: dict[tuple[str, str, str], Any] = {}
        self._versions: dict[tuple[str, str, str], int] = {}
        self._changed: dict[tuple[str, str], str] = {}
        self._stand_ins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.notes: list[str] = []
        self.asked: dict[str, None] = {}
        """Notes of a line that calls may share: they do not keep a call from standing for others."""
        self.finder = LineFinder(lambda: find(self)) if find else None
        self._protected: set[int] = set()
        self.left_behind: Attributes = {}
        """The attributes that forward leaves changed, as the next call finds them."""
        self.ends: dict[tuple[str, str], Any] = {}
        """A fingerprint of each attribute after forward."""

    def __enter__(self) -> TraceWatch:
        with self._stack:  # closed again where opening fails
            self._open()
            self._stack = self._stack.pop_all()
        return self

    def _open(self) -> None:
        containers = ModelContainers(self._module)
        self._around = Surroundings(self._module)
        in_model = filter(is_generator, containers.parts())
        self._generators = Generators([*self._around.generators, *in_model])
        for snapshot in (self._generators, self._around, containers):
            self._stack.callback(snapshot.restore)
        self._steer(self._generators)
        self._stand_ins = containers.replace_tensors()
        self._carry_on()
        self._patch_export()
        self._patch(nn.Module, "__setattr__", self._noting(nn.Module.__setattr__))
        self._stack.enter_context(self.reads.noting())
        self._stack.enter_context(self.attribute_reads.noting())
        self._stack.enter_context(noting_prints(self.lost))
        self._stack.enter_context(GradFlags(lambda: self._protected, self._note_asked))
        self._patch(torch, "is_grad_enabled", self._asking(torch.is_grad_enabled))
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

    def _carry_on(self) -> None:
        """The model has the attributes that an earlier call left behind."""
        for (path, name), value in self._carried.items():
            module: nn.Module = self._module.get_submodule(path)
            if name in HOOKS:
                vars(module)[name].update(value)
            elif name in module._modules:
                module._modules[name] = value
            else:
                vars(module)[name] = value

    def _patch_export(self) -> None:
        """torch.export leaves out passes that lose something, and checks that this class makes closer."""
        from torch._export.passes import (
            replace_autocast_with_hop_pass,
            replace_set_grad_with_hop_pass,
        )

        trace: Any = importlib.import_module("torch.export._trace")
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

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def _patch(self, owner: Any, name: str, new: Any) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, new)

    def _noting(self, set_attribute: Callable[..., None]) -> Callable[..., None]:
        def setattr_(owner: nn.Module, name: str, value: Any) -> None:
            self._lines[id(owner), name] = user_line()
            set_attribute(owner, name, value)

        return setattr_

    def _remarking(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def remark(*args: Any, **kwargs: Any) -> Any:
            note = f"{what}: {shown(user_line())}"
            if note not in self.notes:
                self.notes.append(note)
            return function(*args, **kwargs)

        return remark

    def _asking(self, function: Callable[[], bool]) -> Callable[[], bool]:
        def ask() -> bool:
            self._note_asked()
            return function()

        return ask

    def _note_asked(self) -> None:
        """The notes tell of the model's own line that asks whether gradients are on."""
        frame = outside_of_modes(sys._getframe(2))
        if not is_users_file(frame.f_code.co_filename):
            return
        state = "on" if torch.is_grad_enabled() else "off"
        note = (
            f"forward asks whether gradients are on, and the stages do what it does where they are {state}: "
            f"{shown(user_line(frame))}"
        )
        self.asked[note] = None

    def attributes_read(self, whole: Sequence[str]) -> Iterator[Remembered]:
        """The plain attributes that the trace has read and forward does not change, as they are."""
        changed = {
            (id(self._module.get_submodule(path)), name) for path, name in self._changed
        }
        return self.attribute_reads.remembered({*changed, *self._lines}, whole)

    # --- while forward is traced ------------------------------------------------------------------

    def _begin(self, _: nn.Module, *arguments: Any) -> None:
        self._arguments = Containers(arguments)
        state = (*self._module.parameters(), *self._module.buffers())
        self._protected = {id(leaf) for leaf in (*tree_leaves(arguments), *state)}
        self._lines.clear()
        self._state = dict(_state(self._module))
        self._versions = {
            key: tensor._version
            for key, tensor in self._state.items()
            if tensor is not None
        }
        self._hooks = set()
        for owner in self._module.modules():
            self._hooks.update(owner._forward_hooks.values())
            self._hooks.update(owner._forward_pre_hooks.values())
        self._start = {
            # with the value: its identity must not go to another object
            key: (value, fingerprint(value), brief(value))
            for key, value in attributes(self._module)
        }
        self._children = dict(_children(self._module))
        self._hook_numbers = {key: set(hooks) for key, hooks in _hooks(self._module)}
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
        self._note_children()
        self._note_hooks()
        self._note_attributes()

    def _note_children(self) -> None:
        """Submodules that forward replaces are left behind."""
        for key, child in _children(self._module):
            self.ends[key] = type(child)
            old = self._children.get(key)
            if old is not child:
                self._changed[key] = f"{type(old).__name__} -> {type(child).__name__}"
                self.left_behind[key] = child

    def _note_hooks(self) -> None:
        """Hooks that forward registers are left behind."""
        for key, hooks in _hooks(self._module):
            self.ends[key] = len(hooks)
            numbers = self._hook_numbers.get(key, ())
            added = {
                number: hook for number, hook in hooks.items() if number not in numbers
            }
            if added:
                self._changed[key] = f"{len(added)} more"
                self.left_behind[key] = added

    def _note_attributes(self) -> None:
        """Attributes that forward changes are left behind, unless each call makes the same constants."""
        for key, value in attributes(self._module):
            self.ends[key] = fingerprint(value, by_type=True)
            _, start, text = self._start.get(key, (None, None, "nothing"))
            if start != fingerprint(value):
                self._changed[key] = f"{text} -> {brief(value)}"
                if not _is_constant(value):
                    self.left_behind[key] = _carry(value)

    def _refuse_lost(self) -> None:
        """Raises CaptureError where forward changes a container it is given or a variable outside of the
        model, or draws from a generator that cannot be steered.
        """
        generator = self._generators.drawn()
        if generator:
            self.drew = generator
            if not self._generators.can_be_steered():
                raise _draw(generator, self._module)
        if self._arguments.changed(besides=PUT_BACK):
            raise _Lost(
                "forward changes a container it is given, and the stages would not",
                lambda watch: watch._arguments.changed(besides=PUT_BACK),
                where=place_of(type(self._module)),
                hint=RETURN_IT,
            )
        for owner, name in self._around.changed():
            self._refuse_outside(owner, name)

    def _refuse_outside(self, owner: Any, name: str) -> None:
        """Raises CaptureError for a variable outside of the model that is changed; a change that only a hook
        makes is a note.
        """
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
        state = dict(_state(self._module))
        for key in dict.fromkeys([*self._state, *state]):
            if state.get(key) is not self._state.get(key):
                self._refuse_assignment(key, self._state.get(key), state.get(key))
        assigned = [
            (key, self._state[key], new)
            for key, new in state.items()
            if new is not self._state.get(key)
        ]
        replaced = {id(old) for _, old, _ in assigned}
        values = [
            self._mark(key, new.clone()) if id(new) in replaced else new
            for key, _, new in assigned
        ]
        for (key, old, _), value in zip(assigned, values, strict=True):
            self._mark(key, old.copy_(value))

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

    def _refuse_assignment(self, key: tuple[str, str, str], old: Any, new: Any) -> None:
        """Raises CaptureError for an assignment that changes more than the values of one buffer."""
        path, kind, name = key
        if kind == "parameter":
            why = "a parameter must stay the tensor that an optimizer holds"
        elif old is None or new is None:
            why = "which makes or removes state while it runs"
        elif (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
            why = (
                f"{brief(old)} becomes {brief(new)}, and state keeps its size and dtype"
            )
        elif self._has_other_name(key, old):
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

    def _has_other_name(self, key: tuple[str, str, str], tensor: Any) -> bool:
        return any(
            other is tensor and name != key for name, other in self._state.items()
        )

    def _is_tied(self, key: tuple[str, str, str], new: torch.Tensor) -> bool:
        """True when the next call would write two buffers where it wrote one before."""
        others = [
            name
            for name, tensor in _state(self._module)
            if name != key
            and tensor is not None
            and storage_of(tensor) == storage_of(new)
        ]
        return bool(others) and any(
            self._state[name]._version != self._versions[name]
            for name in (key, *others)
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
            if id(value) in self._stand_ins:
                exported.constants[name] = self._stand_ins[id(value)][0]
        exported.graph_module.meta |= {
            CHOICES: self.reads.choices,
            FIXED: self.reads.fixed,
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
        error = CaptureError(
            what,
            where=self._where(path, name),
            hint=_instead(self.left_behind[key]),
        )
        error.module = path
        return error

    def _where(self, path: str, name: str) -> str:
        owner = self._module.get_submodule(path)
        line = self._lines.get((id(owner), name))
        return shown(line) if line else place_of(type(owner))


def _instead(value: Any) -> str:
    """Where a model may keep what it leaves in an attribute."""
    if isinstance(value, (list, tuple, dict, set, deque)):
        return f"return what it holds as outputs, and collect them outside of the model, {KEEP_WHOLE}"
    return f"make it a buffer: register_buffer, changed in place, {KEEP_WHOLE}"


def odd_output(module: nn.Module, class_name: str) -> CaptureError:
    """The error for a result of a class that no trace returns."""
    return CaptureError(
        f"{type(module).__name__} returns a {class_name}, which is neither a tensor nor plain data",
        where=place_of(type(module)),
        hint=(
            "return tensors, numbers and texts, in tuples, lists, dicts, and objects that have them as "
            "attributes"
        ),
    )


def _changes(owner: Any, name: str, watch: TraceWatch) -> bool:
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
        for name, parameter in owner._parameters.items():
            yield (path, "parameter", name), parameter
        for name, buffer in owner._buffers.items():
            yield (path, "buffer", name), buffer


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


def _carry(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """The object that the next call finds where this one leaves `value`: new containers, `_Gone` for
    tensors.
    """
    if isinstance(value, SYMBOLS) and not isinstance(value, nn.Parameter):
        return _GONE
    content = content_of(value)
    if content is None or id(content) in inside:
        return value
    if is_memory(value):
        return copy.copy(value)
    below = (*inside, id(content))
    if isinstance(value, (list, set, deque)) or type(value) is tuple:
        return type(value)(_carry(part, below) for part in value)
    if isinstance(value, tuple):
        return value
    carried: Any = copy.copy(value)
    (carried if isinstance(value, dict) else vars(carried)).update(
        {key: _carry(part, below) for key, part in content.items()}
    )
    return carried


def _is_constant(value: Any) -> bool:
    """True for tensors that depend on no input, no state and no random number. Making them again changes
    nothing.
    """
    leaves = tree_leaves(value)
    return bool(leaves) and all(
        isinstance(leaf, torch.Tensor) and not _depends(leaf) for leaf in leaves
    )


def _depends(tensor: torch.Tensor) -> bool:
    newest = node_of(tensor)
    todo = [newest] if newest is not None else []
    seen: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        tags = getattr(node.target, "tags", ())
        if node.op == "placeholder" or torch.Tag.nondeterministic_seeded in tags:
            return True
        todo += [operand for operand in node.all_input_nodes if operand not in seen]
        seen.update(node.all_input_nodes)
    return False

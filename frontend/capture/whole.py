"""Modules kept whole: one op that calls the user's own module object.

During capture an opaque op stands in for the module's forward. One real run of a copy of the model gives its
output types. The run also tells what the module writes, which outputs share storage with inputs, and whether
it draws random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, zip_longest
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from stagecut.frontend.capture.example import failing_on_example
from stagecut.frontend.capture.scopes import goes_past_call
from stagecut.frontend.markers import is_marker
from stagecut.frontend.marks import SYMBOLIC, LeafCall
from stagecut.frontend.source import (
    gpus,
    place_of,
    shown,
    user_line,
)
from stagecut.frontend.watch.attributes import RETURN_IT, Containers
from stagecut.frontend.watch.forbidden import Untraceable
from stagecut.frontend.watch.generators import Generators
from stagecut.frontend.watch.globals import Surroundings
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import CaptureError, SplitError, nearest
from stagecut.ir.run.bindings import is_torchs
from stagecut.ir.run.objects import hides_tensors, opened
from stagecut.ir.run.remembered import Remembered
from stagecut.ir.run.storage import shared_with, storage_of, written_by

T = TypeVar("T")

torch.library.define(
    "stagecut::leaf", "(str key, Tensor[] args, Scalar[] numbers) -> Tensor[]"
)


_CALLS: dict[str, LeafCall] = {}


@torch.library.impl("stagecut::leaf", "CompositeExplicitAutograd")
def _leaf(key: str, args: list[torch.Tensor], numbers: list[Any]) -> list[torch.Tensor]:
    raise Untraceable(
        "stagecut::leaf stands in for a module during capture and cannot be run"
    )


@torch.library.register_fake("stagecut::leaf")
def _leaf_fake(
    key: str, args: list[torch.Tensor], numbers: list[Any]
) -> list[torch.Tensor]:
    call = _CALLS[key]
    varying: dict[int, Any] = {}
    for tensor, shape in zip(args, call.in_shapes, strict=True):
        for size, traced in zip(shape, tensor.shape, strict=True):
            if _varies(traced):
                varying[size] = traced
    return [_like(leaf, varying) for leaf in call.out_flat if _is_tensor(leaf)]


def _varies(size: Any) -> bool:
    """True for a size in a trace that is not the same in each call."""
    return isinstance(size, torch.SymInt) and not isinstance(
        size.node.maybe_as_int(), int
    )


def _like(example: torch.Tensor, varying: dict[int, Any]) -> torch.Tensor:
    """A tensor like `example`, which a real run made. A size equal to that of a varying dim of an
    argument varies with it (checked in each call).
    """
    if not any(n in varying for n in example.shape):
        return torch.empty_strided(
            example.shape, example.stride(), dtype=example.dtype, device=example.device
        )
    order = sorted(range(example.dim()), key=lambda dim: (-example.stride()[dim], dim))
    places = sorted(range(example.dim()), key=order.__getitem__)
    shape: list[Any] = [
        varying.get(example.shape[dim], example.shape[dim]) for dim in order
    ]
    # no stride depends on the widest dim
    if not any(example.shape[dim] in varying for dim in order[1:]):
        return torch.empty_strided(
            [shape[place] for place in places],
            example.stride(),
            dtype=example.dtype,
            device=example.device,
        )
    return torch.empty(shape, dtype=example.dtype, device=example.device).permute(
        places
    )


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


class OpObserver(TorchDispatchMode):
    """Sees every op while it is open. An error that `see` raises is raised again when it is closed.

    Within an op, torch would take a TypeError for the answer of an operand, or end the process.
    """

    def __init__(self) -> None:
        super().__init__()
        self._error: Exception | None = None

    def see(self, func: Any, args: Any, kwargs: Any) -> None:
        """An op is about to run."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        try:
            self.see(func, args, kwargs or {})
        except Exception as error:
            self._error = self._error or error
        return func(*args, **(kwargs or {}))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if self._error is not None:
            raise self._error


class EffectObserver(OpObserver):
    """Notices ops that draw random numbers, and the storages that are written."""

    def __init__(self) -> None:
        super().__init__()
        self.drew = False
        self.wrote: set[int | None] = set()
        self.split = ""

    def see(self, func: Any, args: Any, kwargs: Any) -> None:
        """The writes, draws and split points of the op are noted."""
        self.drew |= torch.Tag.nondeterministic_seeded in func.tags
        if is_marker(func):
            self.split = self.split or shown(user_line())
        self.wrote.update(written_by(func, args, kwargs))


def home_of(tensor: torch.Tensor) -> int:
    """The identity of the memory in which a tensor lies; its own where torch does not tell."""
    storage = storage_of(tensor)
    return -id(tensor) if storage is None else storage


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True)
class OtherMode:
    """The behaviour of a module with its training flags the other way round.

    wrote: the memory that it writes, given to it or its own. drew: it draws random numbers. homes: for each
    tensor that it returns, the given memory in which the tensor lies: a dropout that is off returns its
    operand.
    """

    wrote: set[int]
    drew: bool
    homes: tuple[int | None, ...]


def behaviour_in_other_mode(
    module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any
) -> OtherMode:
    """The behaviour of `run`, which runs `module`, with the flags of the module the other way round.

    A module that cannot run like that counts as one that writes all its buffers. So does a module of the
    user's, because a run shows only one of its branches.
    """
    tensors = tensors_in((args, kwargs))
    twins = {id(tensor): tensor.detach().clone() for tensor in tensors}
    homes = {home_of(twins[id(tensor)]): home_of(tensor) for tensor in tensors}
    may_write_all = not is_torchs(module)
    effects = EffectObserver()
    returned: Any = ()
    try:
        with _flags_turned(module), torch.no_grad(), effects:
            twin_args, twin_kwargs = tree_map(
                lambda leaf: twins.get(id(leaf), leaf), (args, kwargs)
            )
            returned = run(*twin_args, **twin_kwargs)
    except Exception as error:  # such as a norm in training that is given one sample
        raise_ours(error)
        may_write_all = True
    wrote = {homes.get(home, home) for home in effects.wrote if home is not None}
    if may_write_all:
        wrote.update(map(home_of, module.buffers()))
    return OtherMode(
        wrote,
        effects.drew,
        tuple(homes.get(home_of(tensor)) for tensor in tensors_in(returned)),
    )


def first_at(homes: Iterable[tuple[T, int | None]]) -> dict[int, T]:
    """Memory -> the first argument that lies in it, from pairs of an argument and its memory."""
    first: dict[int, T] = {}
    for argument, home in homes:
        if home is not None:
            first.setdefault(home, argument)
    return first


def in_either_mode(
    views: Sequence[T | None], homes: Sequence[int | None], arguments: Mapping[int, T]
) -> tuple[T | None, ...]:
    """For each result, the argument whose memory it shares. That is the one in `views`, else the one in whose
    memory the result lies in the other mode, which is that in `homes`. `arguments` maps memory to argument.
    """
    return tuple(
        arguments.get(home) if viewed is None and home is not None else viewed
        for viewed, home in zip_longest(views, homes[: len(views)])
    )


@contextmanager
def _flags_turned(module: nn.Module) -> Iterator[None]:
    """While open, each training flag in `module` is the other one."""
    flags = {part: part.training for part in module.modules()}
    try:
        for part, flag in flags.items():
            part.training = not flag
        yield
    finally:
        for part, flag in flags.items():
            part.training = flag


@contextmanager
def _without_script_objects(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, `modules` lack the objects of torch.jit that they hold, such as the packed weights of a
    quantized linear. The export makes stand-ins for all that it finds in the model, which few of their
    classes allow, and no code that it traces reads these.
    """
    parts = {part for module in modules for part in module.modules()}
    hidden = {
        part: {
            name: item
            for name, item in part.__dict__.items()
            if isinstance(item, torch.ScriptObject)
        }
        for part in parts
    }
    try:
        for part, items in hidden.items():
            for name in items:
                del part.__dict__[name]
        yield
    finally:
        for part, items in hidden.items():
            part.__dict__.update(items)


def packed_modules(model: nn.Module) -> list[str]:
    """The paths of torch's quantized modules whose weights are objects that the export cannot stand in for.
    The objects may lie in a module inside of theirs.
    """
    found: dict[str, None] = {}
    for path, part in model.named_modules():
        held = [i for i in part.__dict__.values() if isinstance(i, torch.ScriptObject)]
        if all(hasattr(item, "__obj_flatten__") for item in held):
            continue
        above = path.rpartition(".")[0]
        if above and type(model.get_submodule(above)).__module__.startswith(
            "torch.ao."
        ):
            path = above
        if path:
            found[path] = None
    return list(found)


class _RealCall:
    """One call of a module kept whole in a real run: its result and its effects. The tensors that it is given
    and those that it returns are counted in the order of their leaves.
    """

    def __init__(self, owner: nn.Module, run: Any, args: Any, kwargs: Any) -> None:
        self._tensors = tensors_in((args, kwargs))
        self._parameters = dict(owner.named_parameters())
        before = self._versions()
        containers = Containers([args, kwargs])
        with EffectObserver() as effects:
            self.result = run(*args, **kwargs)
        self.effects = effects
        self.changes_containers = containers.changed()
        self._written = [
            new != old or new[0] in effects.wrote
            for new, old in zip(self._versions(), before, strict=True)
        ]
        self._draws = effects.drew
        self.out_flat, self._out_spec = tree_flatten(opened(self.result))
        self._views: Sequence[int | None] = shared_with(self.out_flat, self._tensors)

    def _versions(self) -> list[tuple[int | None, int]]:
        """The memory and the version of each given tensor, then of each parameter."""
        tensors = (*self._tensors, *self._parameters.values())
        return [(storage_of(tensor), tensor._version) for tensor in tensors]

    def add(self, other: OtherMode) -> None:
        """The effects include those in the other mode."""
        homes = [home_of(tensor) for tensor in self._tensors]
        for position, home in enumerate(homes):
            self._written[position] |= home in other.wrote
        self._draws |= other.drew
        self._views = in_either_mode(
            self._views, other.homes, first_at(enumerate(homes))
        )

    def returned_writes(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The returned tensors that share memory with given tensors that are written, and the latter."""
        for tensor, position in zip(
            tensors_in(self.out_flat), self._views, strict=True
        ):
            if position is not None and self._written[position]:
                yield tensor, self._tensors[position]

    def record(self, path: str, owner: nn.Module) -> LeafCall:
        """The record of the call, which outlives its tensors' histories."""
        first = len(self._tensors)
        inputs = enumerate(self._written[:first])
        parameters = zip(self._parameters, self._written[first:], strict=True)
        written = [name for name, is_written in parameters if is_written]
        # another run may take another branch: every buffer counts as written
        written += [name for name, _ in owner.named_buffers()]
        return LeafCall(
            path,
            [],
            self._out_spec,
            [leaf.detach() if _is_tensor(leaf) else leaf for leaf in self.out_flat],
            self._out_spec,
            in_shapes=[tuple(tensor.shape) for tensor in self._tensors],
            views=tuple(self._views),
            written_inputs=tuple(
                position for position, is_written in inputs if is_written
            ),
            written_state=tuple(written),
            random=self._draws,
        )


def _check_like_real(path: str, tensors: list[torch.Tensor], call: LeafCall) -> None:
    """Raises for a traced call that is given other tensors than the real one was."""
    real = call.in_shapes
    if [tensor.dim() for tensor in tensors] != [len(shape) for shape in real]:
        raise CalledOtherwise(
            f"'{path}' is given {len(tensors)} tensors in the trace, {len(real)} in a real run, or "
            "others"
        )


class CalledOtherwise(Untraceable):
    """The model calls a module in another way when it is traced. A module around that one may be kept whole
    instead.
    """


@dataclass
class Leaves:
    """The modules of a model that are kept whole during one capture, with gradients on or off."""

    module: nn.Module
    inputs: Any
    grad: bool = True
    paths: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    calls: dict[str, LeafCall] = field(default_factory=dict)
    trace_notes: list[str] = field(default_factory=list)
    attributes_read: list[Remembered] = field(default_factory=list)

    def add(self, path: str) -> None:
        """The module at `path` is kept whole, and with it all modules inside. A list or dict of modules
        without a forward stands for each of its modules, because nobody calls the list itself.
        """
        owners = {
            name: owner
            for name, owner in self.module.named_modules(remove_duplicate=False)
            if name
        }
        if path not in owners:
            raise SplitError(
                f"leaf_modules names module '{path}', which the model does not have",
                hint=nearest(path, owners),
            )
        owner = owners[path]
        is_list = isinstance(owner, (nn.ModuleList, nn.ModuleDict))
        if is_list and type(owner).forward is nn.Module.forward:
            for name, _ in owner.named_children():
                self.add(f"{path}.{name}")
            return
        first = next(name for name, module in owners.items() if module is owner)
        outside = [name for name in self.paths if not name.startswith(f"{first}.")]
        self.paths = [*outside, first]

    @property
    def notes(self) -> list[str]:
        """The modules that are kept whole although nobody asked for it, and why; then the notes of the last
        trace.
        """
        return [
            f"module '{path}' and all of its class are kept whole: {reason}"
            for path, reason in self.reasons.items()
            if path in self.paths
        ] + self.trace_notes

    def add_class(self, path: str, reason: str) -> None:
        """All modules of the class of the module at `path` are kept whole, because the code of the class
        fails.
        """
        self.reasons[path] = reason
        cls = type(self.module.get_submodule(path))
        for name, owner in self.module.named_modules():
            if name and type(owner) is cls and not self._is_inside(name):
                self.add(name)

    def _is_inside(self, name: str) -> bool:
        """True for a module inside one that is kept whole."""
        return any(name.startswith(f"{path}.") for path in self.paths)

    def add_packed(self) -> None:
        """Modules whose weights the export cannot stand in for are kept whole."""
        for path in packed_modules(self.module):
            if not any(f"{path}.".startswith(f"{kept}.") for kept in self.paths):
                why = (
                    "its weights are packed by torch.jit, and no trace looks into them"
                )
                self.add_class(path, why)

    def _because(self, path: str) -> str:
        return f": {self.reasons[path]}" if path in self.reasons else ""

    def can_run(self) -> bool:
        """True when the model can be run for real, which recording a leaf's outputs takes."""
        return not any(
            isinstance(tensor, torch._subclasses.FakeTensor)
            for tensor in self.module.state_dict().values()
        )

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """While open, the leaf modules' forwards are opaque ops. The modules are as before afterwards."""
        if not self.paths:
            yield
            return
        self.calls = self._record()
        _CALLS.update(self.calls)
        modules = {path: self.module.get_submodule(path) for path in self.paths}
        forwards = {path: m.__dict__.get("forward") for path, m in modules.items()}
        try:
            for path, owner in modules.items():
                owner.__dict__["forward"] = self._stand_in(path, owner)
            with _without_script_objects(modules.values()):
                yield
        finally:
            for path, owner in modules.items():
                if forwards[path] is None:
                    owner.__dict__.pop("forward", None)
                else:
                    owner.__dict__["forward"] = forwards[path]
            for key in self.calls:
                _CALLS.pop(key, None)

    def _stand_in(self, path: str, owner: nn.Module) -> Any:
        """A forward that is one opaque op of the trace."""
        numbers = count()

        def forward(*args: Any, **kwargs: Any) -> Any:
            key = f"{id(self)}/{path}/{next(numbers)}"
            call = self.calls.get(key)
            if call is None:
                raise CaptureError(
                    f"leaf module '{path}' is called more often in the trace than in a real run"
                )
            if goes_past_call(owner):
                raise CaptureError(
                    f"module '{path}' is kept whole{self._because(path)}, and its forward is called past "
                    "its hooks or its __call__; "
                    "a stage calls the module",
                    where=shown(user_line()),
                    hint="call the module: m(x)",
                )
            call.in_flat, call.in_spec = tree_flatten((args, kwargs))
            tensors = [leaf for leaf in call.in_flat if _is_tensor(leaf)]
            symbolic = [leaf for leaf in call.in_flat if isinstance(leaf, SYMBOLIC)]
            _check_like_real(path, tensors, call)
            results = iter(torch.ops.stagecut.leaf(key, tensors, symbolic))
            return tree_unflatten(
                [next(results) if _is_tensor(leaf) else leaf for leaf in call.out_flat],
                call.out_spec,
            )

        return forward

    def _record(self) -> dict[str, LeafCall]:
        """Every call of every leaf module in one run of a copy of the model on copies of the example
        inputs.
        """
        calls: dict[str, LeafCall] = {}

        def prepare(model: nn.Module) -> None:
            for path in self.paths:
                owner = model.get_submodule(path)
                owner.__dict__["forward"] = self._recording(
                    path, owner, owner.forward, calls
                )

        try:
            self._run_copy(prepare)
        except Exception as error:
            raise_ours(error)
            # a model that fails may be refused for what it did before
            self._refuse_failing()
            raise
        return calls

    def _refuse_failing(self) -> None:
        """Raises CaptureError when the model fails on the example inputs with no module kept whole."""
        try:
            self._run_copy(lambda model: None)
        except Exception as error:
            raise_ours(error)
            raise failing_on_example(type(self.module), error) from error

    def _run_copy(self, prepare: Callable[[nn.Module], None]) -> None:
        """A copy of the model has run once on copies of the example inputs, after `prepare` was called with
        it.
        """
        model, inputs = copy.deepcopy((self.module, self.inputs))
        prepare(model)
        around = Surroundings(self.module)
        generators = Generators(around.generators)
        try:
            seeds = torch.random.fork_rng(gpus(self.module, inputs))
            with seeds, torch.set_grad_enabled(self.grad):
                model(*inputs[0], **inputs[1])
        finally:
            around.restore()
            generators.restore()

    def _recording(
        self, path: str, owner: nn.Module, run: Any, calls: dict[str, LeafCall]
    ) -> Any:
        """A forward that does what `run` does; `calls` gains a record of each call."""
        numbers = count()

        def forward(*args: Any, **kwargs: Any) -> Any:
            key = f"{id(self)}/{path}/{next(numbers)}"
            call = _RealCall(owner, run, args, kwargs)
            self._check(path, owner, call)
            if is_torchs(owner):
                call.add(behaviour_in_other_mode(owner, run, args, kwargs))
            self._check_history(path, owner, call)
            calls[key] = call.record(path, owner)
            return call.result

        return forward

    def _check(self, path: str, owner: nn.Module, call: _RealCall) -> None:
        """Raises for a call that does something that no op which stands for the module would do."""
        if call.changes_containers:
            raise self._refusal(
                path,
                owner,
                "changes a container it is given, which no stage would",
                RETURN_IT,
            )
        if call.effects.split:
            raise SplitError(
                f"a split point lies inside module '{path}', which is kept whole"
                + self._because(path),
                where=call.effects.split,
                hint="move pipe_split() in front of or behind the module",
            )
        hiding = next(filter(hides_tensors, call.out_flat), None)
        if hiding is not None:
            raise self._refusal(
                path,
                owner,
                f"returns a {type(hiding).__name__}, which hides tensors",
                "return tensors in tuples, lists, dicts or objects whose attributes are data",
            )

    def _check_history(self, path: str, owner: nn.Module, call: _RealCall) -> None:
        """Raises for a call that returns memory that it writes, with another history than it was given."""
        for tensor, written in call.returned_writes():
            is_same_memory = storage_of(tensor) == storage_of(written)
            if is_same_memory and tensor.requires_grad != written.requires_grad:
                raise self._refusal(
                    path,
                    owner,
                    "returns what it writes as a tensor of another history",
                    "return the tensor itself, or write and return a clone",
                )

    def _refusal(
        self, path: str, owner: nn.Module, what: str, hint: str
    ) -> CaptureError:
        return CaptureError(
            f"module '{path}' is kept whole{self._because(path)} and {what}",
            where=place_of(type(owner)),
            hint=hint,
        )

"""Modules kept whole: one op that calls the user's own module object.

During capture an opaque op stands in for the module's forward. One real run of a copy of the model gives its
output types. The run also tells what the module writes, which outputs share storage with inputs, and whether
it draws random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from stagecut.frontend.capture.scopes import goes_past_call
from stagecut.frontend.markers import is_marker
from stagecut.frontend.marks import SYMBOLIC, LeafCall
from stagecut.frontend.source import gpus, place_of, shown, user_line
from stagecut.frontend.watch.attributes import RETURN_IT, Contents
from stagecut.frontend.watch.forbidden import Untraceable
from stagecut.frontend.watch.generators import Generators
from stagecut.frontend.watch.globals import Surroundings
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import CaptureError, SplitError, nearest
from stagecut.ir.run.bindings import is_torchs
from stagecut.ir.run.objects import hides_tensors, opened
from stagecut.ir.run.storage import shared_with, storage_of, written_by

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
    varying: dict[int, Any] = {
        n: size
        for arg, shape in zip(args, call.in_shapes, strict=True)
        for n, size in zip(shape, arg.shape, strict=True)
        if isinstance(size, torch.SymInt)
        and not isinstance(size.node.maybe_as_int(), int)
    }
    return [_like(t, varying) for t in call.out_flat if _is_tensor(t)]


def _like(made: torch.Tensor, varying: dict[int, Any]) -> torch.Tensor:
    """A tensor like `made`, the one that a real run made. A size equal to that of a varying dim of an
    argument varies with it (checked in each call).
    """
    if not any(n in varying for n in made.shape):
        return torch.empty_strided(
            made.shape, made.stride(), dtype=made.dtype, device=made.device
        )
    order = sorted(range(made.dim()), key=lambda dim: (-made.stride()[dim], dim))
    places = sorted(range(made.dim()), key=order.__getitem__)
    shape: list[Any] = [varying.get(made.shape[dim], made.shape[dim]) for dim in order]
    # no stride depends on the widest dim
    if not any(made.shape[dim] in varying for dim in order[1:]):
        return torch.empty_strided(
            [shape[place] for place in places],
            made.stride(),
            dtype=made.dtype,
            device=made.device,
        )
    return torch.empty(shape, dtype=made.dtype, device=made.device).permute(places)


def _is_tensor(item: Any) -> bool:
    return isinstance(item, torch.Tensor)


class Looking(TorchDispatchMode):
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


class OpWatch(Looking):
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
    return [item for item in tree_leaves(tree) if isinstance(item, torch.Tensor)]


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


def in_other_mode(
    module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any
) -> OtherMode:
    """The behaviour of `run`, which runs `module`, with the flags of the module the other way round.

    A module that cannot run like that counts as one that writes all its buffers. So does a module of the
    user's, because a run shows only one of its branches.
    """
    given = tensors_in((args, kwargs))
    twins = {id(tensor): tensor.detach().clone() for tensor in given}
    homes = {home_of(twins[id(tensor)]): home_of(tensor) for tensor in given}
    may_write_all = not is_torchs(module)
    watch = OpWatch()
    returned: Any = ()
    try:
        with _flags_turned(module), torch.no_grad(), watch:
            twin_args, twin_kwargs = tree_map(
                lambda item: twins.get(id(item), item), (args, kwargs)
            )
            returned = run(*twin_args, **twin_kwargs)
    except Exception as error:  # such as a norm in training that is given one sample
        raise_ours(error)
        may_write_all = True
    wrote = {homes.get(home, home) for home in watch.wrote if home is not None}
    if may_write_all:
        wrote.update(map(home_of, module.buffers()))
    return OtherMode(
        wrote,
        watch.drew,
        tuple(homes.get(home_of(item)) for item in tensors_in(returned)),
    )


def in_either_mode(
    views: Sequence[int | None],
    homes: Sequence[int | None],
    given: Sequence[int | None],
) -> tuple[int | None, ...]:
    """For each result, the place of the argument whose memory it shares. That is the place in `views`, else
    the place of the memory in `homes`, in which the result lies in the other mode. `given` has the memory of
    each argument.
    """
    return tuple(
        given.index(home)
        if viewed is None and home is not None and home in given
        else viewed
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


class CalledOtherwise(Untraceable):
    """The model calls a module in another way when it is traced. A module around that one may be kept whole
    instead.
    """


@dataclass
class Leaves:
    """The modules of a model that are kept whole during one capture."""

    module: nn.Module
    inputs: Any
    paths: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    calls: dict[str, LeafCall] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

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
        if (
            isinstance(owners[path], (nn.ModuleList, nn.ModuleDict))
            and type(owners[path]).forward is nn.Module.forward
        ):
            for name, _ in owners[path].named_children():
                self.add(f"{path}.{name}")
            return
        path = next(name for name, owner in owners.items() if owner is owners[path])
        self.paths = [p for p in self.paths if not p.startswith(path + ".")] + [path]

    @property
    def notes(self) -> list[str]:
        """The modules that are kept whole although nobody asked for it, and why; then the other remarks of
        the last capture.
        """
        kept = {
            path: reason for path, reason in self.reasons.items() if path in self.paths
        }
        return [
            f"module '{path}' and all of its class are kept whole: {reason}"
            for path, reason in kept.items()
        ] + self.remarks

    def add_class(self, path: str, reason: str) -> None:
        """All modules of the class of the module at `path` are kept whole, because the code of the class
        fails.
        """
        self.reasons[path] = reason
        kind = type(self.module.get_submodule(path))
        for name, owner in self.module.named_modules():
            if (
                name
                and type(owner) is kind
                and not any(name.startswith(p + ".") for p in self.paths)
            ):
                self.add(name)

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
            isinstance(t, torch._subclasses.FakeTensor)
            for t in self.module.state_dict().values()
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
        own = {path: m.__dict__.get("forward") for path, m in modules.items()}
        try:
            for path, owner in modules.items():
                owner.__dict__["forward"] = self._stand_in(path, owner)
            with _without_script_objects(modules.values()):
                yield
        finally:
            for path, owner in modules.items():
                if own[path] is None:
                    owner.__dict__.pop("forward", None)
                else:
                    owner.__dict__["forward"] = own[path]
            for key in self.calls:
                _CALLS.pop(key, None)

    def _stand_in(self, path: str, owner: nn.Module) -> Any:
        count = 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            key = f"{id(self)}/{path}/{count}"
            count += 1
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
            given = [a for a in call.in_flat if isinstance(a, torch.Tensor)]
            numbers = [a for a in call.in_flat if isinstance(a, SYMBOLIC)]
            real = call.in_shapes
            if [tensor.dim() for tensor in given] != [len(shape) for shape in real]:
                raise CalledOtherwise(
                    f"'{path}' is given {len(given)} tensors in the trace, {len(real)} in a real run, or "
                    "others"
                )
            tensors = iter(torch.ops.stagecut.leaf(key, given, numbers))
            return tree_unflatten(
                [next(tensors) if _is_tensor(o) else o for o in call.out_flat],
                call.out_spec,
            )

        return forward

    def _record(self) -> dict[str, LeafCall]:
        """Every call of every leaf module in one run of a copy of the model on copies of the example
        inputs.
        """
        calls: dict[str, LeafCall] = {}
        model, inputs = copy.deepcopy((self.module, self.inputs))
        for path in self.paths:
            owner = model.get_submodule(path)
            owner.__dict__["forward"] = self._recording(
                path, owner, owner.forward, calls
            )
        around = Surroundings(self.module)
        generators = Generators(around.generators)
        try:
            with torch.random.fork_rng(gpus(self.module, inputs)), torch.enable_grad():
                model(*inputs[0], **inputs[1])
        finally:
            around.restore()
            generators.restore()
        return calls

    def _recording(
        self, path: str, owner: nn.Module, run: Any, calls: dict[str, LeafCall]
    ) -> Any:
        count = 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            key = f"{id(self)}/{path}/{count}"
            count += 1
            given = [a for a in tree_flatten((args, kwargs))[0] if _is_tensor(a)]
            parameters = dict(owner.named_parameters())
            before = [
                (storage_of(t), t._version) for t in (*given, *parameters.values())
            ]
            containers = Contents([args, kwargs])
            with OpWatch() as watch:
                result = run(*args, **kwargs)
            if containers.changed():
                raise CaptureError(
                    f"module '{path}' is kept whole{self._because(path)} and changes a container it is "
                    "given, which no stage would",
                    where=place_of(type(owner)),
                    hint=RETURN_IT,
                )
            if watch.split:
                raise SplitError(
                    f"a split point lies inside module '{path}', which is kept whole"
                    + self._because(path),
                    where=watch.split,
                    hint="move pipe_split() in front of or behind the module",
                )
            after = [
                (storage_of(t), t._version) for t in (*given, *parameters.values())
            ]
            wrote = [
                a != b or a[0] in watch.wrote
                for a, b in zip(after, before, strict=True)
            ]
            out_flat, out_spec = tree_flatten(opened(result))
            if (odd := next(filter(hides_tensors, out_flat), None)) is not None:
                raise CaptureError(
                    f"module '{path}' is kept whole{self._because(path)} and returns a "
                    f"{type(odd).__name__}, which hides tensors",
                    where=place_of(type(owner)),
                    hint="return tensors in tuples, lists, dicts or objects whose attributes are data",
                )
            views, drew = shared_with(out_flat, given), watch.drew
            if is_torchs(owner):
                other = in_other_mode(owner, run, args, kwargs)
                own = [home_of(tensor) for tensor in given]
                wrote[: len(given)] = [
                    was or home in other.wrote
                    for was, home in zip(wrote, own, strict=False)
                ]
                drew |= other.drew
                views = in_either_mode(views, other.homes, own)
            returned = [item for item in out_flat if _is_tensor(item)]
            for item, place in zip(returned, views, strict=True):
                there = given[place] if place is not None and wrote[place] else None
                if (
                    there is not None
                    and storage_of(item) == storage_of(there)
                    and item.requires_grad != there.requires_grad
                ):
                    raise CaptureError(
                        f"module '{path}' is kept whole{self._because(path)} and returns what it writes as "
                        "a tensor of another history",
                        where=place_of(type(owner)),
                        hint="return the tensor itself, or write and return a clone",
                    )
            out_flat = [
                item.detach() if _is_tensor(item) else item for item in out_flat
            ]
            calls[key] = LeafCall(
                path,
                [],
                out_spec,
                out_flat,
                out_spec,
                in_shapes=[tuple(t.shape) for t in given],
                views=views,
                written_inputs=tuple(i for i, w in enumerate(wrote[: len(given)]) if w),
                # another run may take another branch: every buffer counts as written
                written_state=(
                    *(
                        n
                        for n, w in zip(parameters, wrote[len(given) :], strict=True)
                        if w
                    ),
                    *(name for name, _ in owner.named_buffers()),
                ),
                random=drew,
            )
            return result

        return forward

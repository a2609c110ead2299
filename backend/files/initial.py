"""Initial values of tensors, as the model's own code gives them: on a copy of the model in which only the
wanted tensors are real.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stagecut.backend.files.checkpoint import check_fits
from stagecut.backend.stages.staged import Staged
from stagecut.backend.stages.state import held_tensors
from stagecut.ir.blame import raise_ours
from stagecut.ir.errors import StagecutError
from stagecut.ir.graph import StateEntry
from stagecut.ir.run.storage import storage_of, written_by

InitFn = Callable[[nn.Module], Any]


class MaterializeError(StagecutError):
    """A tensor of a stage has no value."""

    __module__ = "stagecut"


def initial(
    pipe: Staged,
    wanted: Sequence[StateEntry],
    init_fn: InitFn | None,
    device: torch.device,
    seed: int,
    in_order: bool = False,
) -> dict[StateEntry, torch.Tensor]:
    """The wanted tensors after `init_fn`, or for None the model's own code, was called for every module of
    the model, inner ones first. An entry that it leaves as it is has none.

    With `in_order`, random numbers are drawn as for the whole model on `device` after
    `torch.manual_seed(seed)`. Otherwise they depend on the seed and the name of the tensor, and nothing is
    drawn for others. The random state is as before.
    """
    if not wanted:
        return {}
    model = pipe._model() if pipe._model is not None else None
    if model is None:
        raise MaterializeError(
            "there is no model whose modules could be initialised",
            hint="keep it alive until then; a copy of a pipe, or one that was loaded, has none: values=",
        )
    twin = _on_meta(model) if in_order else deepcopy(model)
    names = {entry: _own_first(entry, model) for entry in wanted}
    real: dict[str, torch.Tensor] = {}
    for entry in wanted:
        real |= _make_real(twin, names[entry], device, entry.kind == "param")
    numbers = (_InOrder if in_order else _ByName)(real, seed, device)
    numbers.run(twin, init_fn or own_init(twin, numbers.lacks))
    tensors: dict[StateEntry, torch.Tensor] = {}
    for entry in wanted:
        for name in names[entry]:
            tensor = _set_tensor(twin, name, real, numbers.written)
            if tensor is not None:
                shape, held = tuple(tensor.shape), _current(pipe, entry)
                check_fits(entry.name, held, shape, tensor.dtype, "init_fn")
                tensors[entry] = tensor.detach().to(device)
                break
    return tensors


def _own_first(entry: StateEntry, model: Any) -> list[str]:
    """The names of a tensor. The first is that under which the model makes it, before it ties the others."""
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    return sorted(entry.names, key=lambda name: name in tied)


def _set_tensor(
    twin: nn.Module,
    name: str,
    real: Mapping[str, torch.Tensor],
    written: Collection[str],
) -> torch.Tensor | None:
    """The tensor of that name, where it was written, or replaced by another one."""
    _, last, holder = _slot(twin, name)
    tensor: torch.Tensor | None = None if holder is None else holder[last]
    if tensor is None or tensor.is_meta:
        return None
    if tensor is real.get(name) and name not in written:
        return None
    return tensor


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model whose plain parameters and buffers are on meta, and tied as the model's."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            bare = parameter.detach().to("meta")
            memo[id(parameter)] = nn.Parameter(bare, parameter.requires_grad)
    for buffer in model.buffers():
        if type(buffer) is torch.Tensor:
            memo[id(buffer)] = buffer.detach().to("meta")
    return deepcopy(model, memo)


# --- the model's own code -----------------------------------------------------------------------------


def own_init(model: nn.Module, lacks: Callable[[nn.Module], bool]) -> InitFn:
    """The function that initialises a module of `model` as the model's own code does: by `_init_weights` of
    the nearest module around it that has one; where that leaves tensors of the module as they are, by its own
    `reset_parameters`, `_reset_parameters` or `init_weights`.
    """
    around = dict(_initialisers(model, None))

    def initialise(module: nn.Module) -> None:
        by_outer = around[module]
        if by_outer is not None:
            by_outer(module)
            if not lacks(module):
                return
        for name in ("reset_parameters", "_reset_parameters", "init_weights"):
            own: Any = getattr(module, name, None)
            # `init_weights` of transformers is the whole of what is done here
            if _takes(own, 0) and not (name == "init_weights" and by_outer):
                own()
                return

    return initialise


def _initialisers(
    module: nn.Module, outer: InitFn | None
) -> Iterator[tuple[nn.Module, InitFn | None]]:
    """Each module with the `_init_weights` that is nearest around it."""
    own = getattr(module, "_init_weights", None)
    if _takes(own, 1):
        outer = own
    yield module, outer
    for child in module.children():
        yield from _initialisers(child, outer)


def _takes(function: Any, count: int) -> bool:
    """True for a function that can be called with so many arguments, and with no fewer."""
    if not callable(function) or isinstance(function, nn.Module):
        return False
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return False
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        parameter
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind not in kinds
    ]
    by_name = any(parameter.kind == parameter.KEYWORD_ONLY for parameter in needed)
    return len(needed) == count and not by_name


# --- slots --------------------------------------------------------------------------------------------


def _make_real(
    twin: nn.Module, names: Sequence[str], device: torch.device, is_parameter: bool
) -> dict[str, torch.Tensor]:
    """Name -> a tensor without values that the twin has there. Names that are tied have one each, so that
    none is initialised as the other is.
    """
    fresh: dict[str, torch.Tensor] = {}
    places: set[tuple[nn.Module, str]] = set()
    for name in names:
        owner, last, holder = _slot(twin, name)
        if holder is None or (owner, last) in places:
            continue
        places.add((owner, last))
        tensor = torch.empty_like(holder[last].detach(), device=device)
        if is_parameter:
            tensor = nn.Parameter(tensor, requires_grad=holder[last].requires_grad)
        fresh[name] = tensor
        setattr(owner, last, tensor)
    return fresh


def _current(pipe: Staged, entry: StateEntry) -> torch.Tensor:
    return next(held_tensors(pipe.program, [pipe.stages[entry.stages[0]]], entry))


def _slot(model: nn.Module, name: str) -> tuple[nn.Module, str, Any]:
    """The module that a tensor of the model belongs to, its name there, and the dict it is in; None for the
    dict where the model has no tensor of that name.
    """
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    holders = (owner._parameters, owner._buffers, owner.__dict__)
    for holder in holders:
        if isinstance(holder.get(last), torch.Tensor):
            return owner, last, holder
    return owner, last, None


# --- random numbers -----------------------------------------------------------------------------------


class _Numbers(TorchDispatchMode):
    """Watches which of the wanted tensors are written, and decides where random numbers come from.

    `written` are the names of the tensors that were written.
    """

    def __init__(
        self,
        real: Mapping[str, torch.Tensor],
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.written: set[str] = set()
        self._names = {storage_of(tensor): name for name, tensor in real.items()}
        self._seed = seed
        self._device = device

    def lacks(self, module: nn.Module) -> bool:
        """True when a wanted tensor of the module itself has not been written."""
        own = (*module._parameters.values(), *module._buffers.values())
        names = [
            self._names.get(storage_of(tensor)) for tensor in own if tensor is not None
        ]
        return any(name is not None and name not in self.written for name in names)

    def run(self, model: nn.Module, init_fn: InitFn) -> None:
        """`init_fn` has been called with every module of `model`, inner ones first. The random state is the
        same as before.
        """
        paths = {module: path for path, module in model.named_modules()}

        def call(module: nn.Module) -> None:
            self._begin(module, paths[module])
            try:
                init_fn(module)
            except StagecutError:
                raise
            except Exception as error:
                raise_ours(error)
                raise MaterializeError(
                    f"the initialisation of '{paths[module]}', a {type(module).__name__}, fails: {error}",
                    hint="it runs on a copy of the model, in which tensors of other stages have no values",
                ) from error
            self._end()

        with _own_random_state(self._device), torch.no_grad():
            self._start(model)
            with self:
                model.apply(call)

    def _start(self, model: nn.Module) -> None:
        """Before the first module."""

    def _begin(self, module: nn.Module, path: str) -> None:
        """Before the module at `path`."""

    def _end(self) -> None:
        """After each module."""

    def _draw(self, func: Any, args: Any, kwargs: Any, names: Sequence[str]) -> Any:
        """The result of a random op that writes these of the wanted tensors."""
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        names = [
            self._names[home]
            for home in written_by(func, args, kwargs)
            if home in self._names
        ]
        self.written.update(names)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        return self._draw(func, args, kwargs, names)


class _ByName(_Numbers):
    """Random numbers for each tensor separately, so that its values depend on the seed and its name, not on
    where the model is cut.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._draws: dict[str, int] = {}

    def _begin(self, module: nn.Module, path: str) -> None:
        torch.manual_seed(self._number(f"module {path}"))

    def _draw(self, func: Any, args: Any, kwargs: Any, names: Sequence[str]) -> Any:
        if not names:
            return func(*args, **kwargs)
        name = names[0]
        draw = self._draws.get(name, -1) + 1
        self._draws[name] = draw
        with _own_random_state(args[0].device):
            torch.manual_seed(self._number(f"{name} {draw}"))
            return func(*args, **kwargs)

    def _number(self, text: str) -> int:
        seeded = f"{self._seed} {text}"
        digest = hashlib.sha256(seeded.encode()).hexdigest()
        return int(digest[:15], 16)


class _InOrder(_Numbers):
    """The random numbers of the whole model. Its other tensors are real too, without memory except while a
    module is initialised that has them, and where code touches them, as many as the largest module has. Then
    their values are lost, and code that reads them is refused.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._others: dict[nn.Module, dict[str, torch.Tensor]] = {}
        self._storages: dict[int | None, tuple[str, torch.UntypedStorage, int]] = {}
        self._own: set[int | None] = set()
        """The storages of the module that is initialised."""
        self._touched: dict[int | None, int] = {}
        """Storages of others that have memory -> their bytes, those that were touched last at the end."""
        self._most = 0
        self._lost: set[int | None] = set()

    def _start(self, model: nn.Module) -> None:
        for path, owner in model.named_modules():
            for holder in (owner._parameters, owner._buffers):
                for last, tensor in holder.items():
                    if tensor is not None and tensor.is_meta:
                        other = self._other(f"{path}.{last}".removeprefix("."), tensor)
                        self._others.setdefault(owner, {})[last] = other
        for tensors in self._others.values():
            own = sum(self._storages[storage_of(t)][2] for t in tensors.values())
            self._most = max(self._most, own)
        self._restore()
        torch.manual_seed(self._seed)

    def _other(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A real tensor without memory in the place of one on meta."""
        other = torch.empty_like(tensor.detach(), device=self._device)
        storage = other.untyped_storage()
        self._storages[storage_of(other)] = name, storage, storage.nbytes()
        storage.resize_(0)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(other, tensor.requires_grad)
        return other

    def _begin(self, module: nn.Module, path: str) -> None:
        self._own = {*map(storage_of, self._others.get(module, {}).values())}
        for home in self._own:
            _, storage, size = self._storages[home]
            storage.resize_(size)

    def _end(self) -> None:
        self._lose([*self._own, *self._touched])
        self._own = set()
        self._restore()

    def _lose(self, homes: Iterable[int | None]) -> None:
        for home in homes:
            self._storages[home][1].resize_(0)
            self._touched.pop(home, None)
            self._lost.add(home)

    def _restore(self) -> None:
        """What the code of a module put in the place of a tensor is let go of."""
        for owner, tensors in self._others.items():
            for last, tensor in tensors.items():
                for holder in (owner._parameters, owner._buffers):
                    if last in holder:
                        holder[last] = tensor  # type: ignore[assignment]

    def _touch(self, homes: Collection[int | None]) -> None:
        """These storages have memory. Others lose theirs, where it would be too much."""
        for home in homes:
            if home not in self._storages or home in self._own:
                continue
            _, storage, size = self._storages[home]
            if home not in self._touched:
                storage.resize_(size)
            self._touched.pop(home, None)
            self._touched[home] = size
        older = [home for home in self._touched if home not in homes]
        while older and sum(self._touched.values()) > self._most:
            self._lose([older.pop(0)])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        written = written_by(func, args, kwargs or {})
        if not _reads_no_values(func):
            homes = [*map(storage_of, tensors)]
            self._touch(homes)
            for home in homes:
                if home in self._lost and home not in written:
                    raise self._lost_error(home)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if written and self._fills_whole(func, tensors[0]):
            self._lost.discard(written[0])
        return result

    def _fills_whole(self, func: Any, tensor: torch.Tensor) -> bool:
        """True when nothing is left in the storage of `tensor` that was there before."""
        is_fresh = torch.Tag.nondeterministic_seeded in func.tags or (
            func.overloadpacket in _OVERWRITE
        )
        return is_fresh and tensor.nbytes == tensor.untyped_storage().nbytes()

    def _lost_error(self, home: int | None) -> MaterializeError:
        return MaterializeError(
            f"code that initialises the model reads '{self._storages[home][0]}', of another stage, whose "
            "values are not kept",
            hint="initialise both stages in one call, or pipe.materialize(stages, values=...)",
        )

    def _draw(self, func: Any, args: Any, kwargs: Any, names: Sequence[str]) -> Any:
        return func(*args, **kwargs)


_aten = torch.ops.aten
_OVERWRITE = (_aten.fill_, _aten.zero_, _aten.copy_)


def _reads_no_values(func: Any) -> bool:
    """True for views, and for ops that ask a tensor for its sizes alone."""
    name = func.overloadpacket.__name__
    is_view = any(
        returned.alias_info is not None and not returned.alias_info.is_write
        for returned in func._schema.returns
    )
    return is_view or name.startswith("new_") or name.endswith("_like")


def _own_random_state(device: torch.device) -> Any:
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)

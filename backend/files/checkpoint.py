"""Checkpoints of a pipe that runs on many ranks: each rank saves its own stages, and anything may load them.

They are checkpoints of torch.distributed.checkpoint under the model's own names, `model.NAME`,
`optim.state.NAME.KEY` and `optim.param_groups.NAME.KEY`, as in torch's flattened optimizer state. So they
load into the unsplit model by torch's own functions, into a pipe with another number of stages by `load`, and
the other way round.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.optim import Optimizer

from stagecut.backend.files.adapters import load_adapter, save_adapter
from stagecut.backend.files.model_state import saved_state
from stagecut.backend.files.pretrained import save_pretrained
from stagecut.backend.files.together import (
    CheckpointError,
    clear,
    on_first,
    publish,
    together,
)
from stagecut.backend.progress import doing
from stagecut.backend.ranks.driver import Driver
from stagecut.backend.stages.state import (
    entries,
    held_tensors,
    persistent,
    refuse_meta,
)
from stagecut.ir.errors import StagecutError, nearest, wrong_kind
from stagecut.ir.graph import StateEntry
from stagecut.ir.keywords import near_names

__all__ = [
    "CheckpointError",
    "latest",
    "load",
    "load_adapter",
    "save",
    "save_adapter",
    "save_pretrained",
]

Optimizers = Optimizer | Sequence[Optimizer] | None
Copies = Mapping[str, Mapping[str, torch.Tensor]]
"""Name in the checkpoint -> name of the model's -> tensor."""
_RESERVED = ("model", "optim", "extra")
_PLAIN = (torch.Tensor, bool, int, float, complex, str, type(None))


@near_names
def save(
    driver: Driver,
    optimizer: Optimizers,
    folder: str | Path,
    extra: Mapping[str, Any] | None = None,
    copies: Copies = MappingProxyType({}),
    *,
    frozen: bool = True,
) -> None:
    """`folder` holds the model, the optimizers, the `copies` and the `extra` of rank 0. Every rank calls it;
    all see the same file system.

    driver: the Driver whose stages are saved. optimizer: that of this rank, several, or None for none.
    folder: a path that does not exist yet, such as "run/step-100".
    extra: what else to keep, such as the number of the step and the state of the data loader.
    copies: further tensors of the model's, such as averages over steps: {"ema": {"head.weight": tensor}}, on
    each rank under the names in its stages.
    frozen: whether parameters that are frozen are saved. Without them a checkpoint of an adapter is small;
    `load` needs a model that has them already. A frozen parameter with optimizer state is saved in any case.

    The folder appears whole or not at all: the ranks write aside, and rank 0 renames at the end. Replicas are
    saved once; all names of a tied tensor lead to it.

    Raises CheckpointError on every rank when the folder is there already or a rank cannot write.
    """
    folder = _folder(driver, folder)
    aside = folder.with_name(f".{folder.name}.partial")
    with doing(f"saving to {folder}"), driver.faults.together(agreed=(StagecutError,)):
        driver.calls.announce("checkpoint.save")
        state = together(
            driver.group, lambda: _state(driver, optimizer, extra, copies, frozen)
        )
        on_first(driver.group, lambda: clear(folder, aside))
        aliases = _aliases(driver, state["model"])
        try:
            state_dict_saver.save(
                state,
                storage_writer=_Writer(aside, aliases),
                process_group=driver.group,
            )
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise CheckpointError(
                f"checkpoint '{folder}' was not saved: rank {rank}: {type(cause).__name__}: {cause}"
            ) from error
        on_first(driver.group, lambda: publish(aside, folder))


@near_names
def load(
    driver: Driver,
    optimizer: Optimizers = None,
    folder: str | Path | None = None,
    copies: Copies = MappingProxyType({}),
    *,
    frozen: bool = True,
) -> dict[str, Any]:
    """The stages of this rank, its optimizers and the tensors of `copies` are as they were saved, bit for
    bit; returns the `extra` that was saved.

    driver: the Driver whose stages are loaded. optimizer: that of this rank, several, or None for none.
    folder: what `save` wrote, such as `latest(run)`.
    frozen: with False, a frozen parameter that was not saved stays as it is.

    Every rank calls it. The checkpoint may be of another number of stages or ranks, or of the unsplit model.
    It holds pickles: load only what you trust.

    Raises CheckpointError on every rank when a tensor is missing or has another shape or dtype.
    """
    path = _folder(driver, folder)
    told = doing(f"loading {path}")
    with told, driver.faults.together(agreed=(StagecutError,)):
        driver.calls.announce("checkpoint.load")
        return together(
            driver.group, lambda: _load(driver, optimizer, path, copies, frozen)
        )


def latest(folder: str | Path) -> Path | None:
    """The whole checkpoint in `folder` with the highest number at the end of its name, None when there is
    none.
    """
    if not isinstance(folder, str | Path):
        raise CheckpointError(f"{folder!r} is no folder", hint=_A_FOLDER)
    whole: list[tuple[int, Path]] = []
    for path in Path(folder).glob("*/"):
        number = re.search(r"\d+$", path.name)
        if number is None or path.name.startswith("."):
            continue
        if (path / ".metadata").is_file():
            whole.append((int(number[0]), path))
    if not whole:
        return None
    _, newest = max(whole)
    return newest


_A_FOLDER = 'a str or a Path, such as "run/step-100"'


def _folder(driver: Any, folder: Any) -> Path:
    """The folder of a checkpoint. Raises CheckpointError for what is no driver or no folder."""
    if not isinstance(driver, Driver):
        raise CheckpointError(
            f"a checkpoint is of a Driver, not of a {type(driver).__name__}",
            hint="checkpoint.load(driver, optimizer, folder); stagecut.load(folder) is for saved pipes",
        )
    if folder is None:
        raise CheckpointError(
            "there is no checkpoint: the folder is None",
            hint="checkpoint.latest(folder) gives None where none is: begin from the start then",
        )
    if not isinstance(folder, str | Path):
        raise CheckpointError(f"{folder!r:.60} is no folder", hint=_A_FOLDER)
    return Path(folder)


# --- writing ------------------------------------------------------------------------------------------


class _Writer(FileSystemWriter):
    """Writes each tensor once; the index leads to it from all its names."""

    def __init__(self, path: Path, aliases: Mapping[str, list[str]]) -> None:
        super().__init__(path)
        self._aliases = aliases

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        for written in results:
            written += [
                replace(result, index=replace(result.index, fqn=f"model.{alias}"))
                for result in written
                for alias in self._aliases.get(result.index.fqn, ())
            ]
        for name, others in self._aliases.items():
            for alias in others:
                metadata.state_dict_metadata[f"model.{alias}"] = (
                    metadata.state_dict_metadata[name]
                )
                metadata.planner_data[f"model.{alias}"] = ("model", alias)
        super().finish(metadata, results)


def _state(
    driver: Driver,
    optimizers: Optimizers,
    extra: Mapping[str, Any] | None,
    copies: Copies,
    frozen: bool,
) -> dict[str, Any]:
    """The state that this rank saves."""
    driver.pipe.refuse_changed_model()
    _refuse_no_copies(copies)
    if extra is not None and not isinstance(extra, Mapping):
        raise CheckpointError(
            wrong_kind("extra", extra), hint='extra={"step": 100}, by names of yours'
        )
    unsaved = set() if frozen else _untouched(driver, _listed(optimizers))
    state: dict[str, Any] = {"model": _model_state(driver, unsaved)}
    for optimizer in _listed(optimizers):
        own = _optimizer_state(driver, optimizer, unsaved)
        state["optim"] = state.get("optim", {}) | own
    for name in copies:
        state[name] = {
            persistent(entry)[0]: tensor.detach()
            for entry, tensor in _copied(driver, name, copies[name])
            if entry.stages[0] in driver.stage_indices
        }
    if extra is not None and dist.get_rank(driver.group) == 0:
        state["extra"] = _pickled_extra(extra)
    return state


def _untouched(driver: Driver, optimizers: Sequence[Optimizer]) -> set[StateEntry]:
    """The parameters of this rank that are frozen, and that no optimizer has ever stepped."""
    stages = [driver.pipe.stages[index] for index in driver.stage_indices]
    untouched: set[StateEntry] = set()
    for entry in entries(driver.pipe.program, driver.stage_indices):
        if entry.kind != "param":
            continue
        tensors = [*held_tensors(driver.pipe.program, stages, entry)]
        states = [each.state.get(t) for each in optimizers for t in tensors]
        if not any(states) and not any(tensor.requires_grad for tensor in tensors):
            untouched.add(entry)
    return untouched


def _aliases(driver: Driver, own: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Key -> the other names of its tensor, for all that any rank saves."""
    saved: list[Any] = [None] * dist.get_world_size(driver.group)
    dist.all_gather_object(saved, [*own], driver.group)
    keys: set[str] = set().union(*saved)
    aliases: dict[str, list[str]] = {}
    for entry in driver.pipe.program.state:
        names = persistent(entry)
        if names and names[0] in keys:
            aliases[f"model.{names[0]}"] = names[1:]
    return aliases


def _listed(optimizers: Optimizers) -> list[Optimizer]:
    if optimizers is None:
        return []
    listed: Any = optimizers
    if isinstance(optimizers, Optimizer) or not isinstance(optimizers, Sequence):
        listed = [optimizers]
    for each in listed:
        if not hasattr(each, "param_groups"):
            raise CheckpointError(
                wrong_kind("optimizer", each),
                hint="that of this rank, a list of several, or None",
            )
    return [*listed]


def _copied(
    driver: Driver, title: str, tensors: Mapping[str, torch.Tensor]
) -> list[tuple[StateEntry, torch.Tensor]]:
    """The state of this rank that has a copy, with the copy. Raises CheckpointError for other names."""
    if title in _RESERVED:
        raise CheckpointError(
            f"copies cannot be called '{title}'",
            hint=f"a checkpoint has {', '.join(_RESERVED)} of its own",
        )
    _refuse_no_tensors(title, tensors)
    own: dict[str, StateEntry] = {}
    for entry in entries(driver.pipe.program, driver.stage_indices):
        own |= dict.fromkeys(persistent(entry), entry)
    for name in tensors:
        if name not in own:
            raise CheckpointError(
                f"no stage of this rank has '{name}', of which '{title}' has a copy",
                hint=nearest(name, own),
            )
    return [(own[name], tensor) for name, tensor in tensors.items()]


_COPIES = 'copies={"ema": {"head.weight": tensor}}'


def _refuse_no_copies(copies: object) -> None:
    if not isinstance(copies, Mapping):
        raise CheckpointError(wrong_kind("copies", copies), hint=_COPIES)


def _refuse_no_tensors(title: str, tensors: Any) -> None:
    """Returns when the copies of this title are tensors by the names in the model."""
    if not isinstance(tensors, Mapping):
        raise CheckpointError(wrong_kind(f"copies: '{title}'", tensors), hint=_COPIES)
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"copies: '{title}' has a {type(tensor).__name__} for '{name}'",
                hint=_COPIES,
            )


def _model_state(
    driver: Driver, unsaved: Collection[StateEntry]
) -> dict[str, torch.Tensor]:
    """Name -> tensor, for the entries that this rank saves."""
    state = saved_state(driver.pipe, driver.stage_indices)
    return {
        persistent(entry)[0]: tensor
        for entry, tensor in state.items()
        if entry not in unsaved
    }


def _optimizer_state(
    driver: Driver, optimizer: Optimizer, unsaved: Collection[StateEntry]
) -> dict[str, Any]:
    """Torch's flattened optimizer state, for the parameters that this rank saves."""
    homes = _homes(driver)
    state: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            entry = _entry_of(parameter, homes)
            if entry.stages[0] not in driver.stage_indices or entry in unsaved:
                continue
            for key, value in group.items():
                if key not in ("params", "param_names"):
                    state[f"param_groups.{entry.name}.{key}"] = value
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, _PLAIN):
                    raise CheckpointError(
                        f"optimizer state '{key}' of '{entry.name}' is a {type(value).__name__}",
                        hint="only tensors and numbers are saved",
                    )
                state[f"state.{entry.name}.{key}"] = value
    return state


def _homes(driver: Driver) -> dict[int, StateEntry]:
    """id of a parameter -> its entry, for the parameters of this rank."""
    pipe = driver.pipe
    stages = [driver.pipe.stages[i] for i in driver.stage_indices]
    homes: dict[int, StateEntry] = {}
    for entry in entries(pipe.program, driver.stage_indices):
        if entry.kind == "param":
            for tensor in held_tensors(pipe.program, stages, entry):
                homes[id(tensor)] = entry
    return homes


def _entry_of(parameter: torch.Tensor, homes: Mapping[int, StateEntry]) -> StateEntry:
    entry = homes.get(id(parameter))
    if entry is None:
        raise CheckpointError(
            f"the optimizer has a parameter of shape {list(parameter.shape)} that no stage of this rank "
            "holds",
            hint="make it with driver.parameters(), after materialize()",
        )
    return entry


def _pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _pickled_extra(extra: Mapping[str, Any]) -> bytes:
    """Raises CheckpointError, with the name, for what cannot be pickled."""
    for name, part in extra.items():
        try:
            _pickled(part)
        except Exception as error:
            raise CheckpointError(
                f"extra['{name}'] cannot be pickled: {error}",
                hint="numbers, texts, tensors, and lists and dicts of them, such as loader.state_dict()",
            ) from error
    return _pickled(dict(extra))


# --- reading ------------------------------------------------------------------------------------------


class Reader:
    """A folder written by torch.distributed.checkpoint, read by this process alone.

    Raises CheckpointError when there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.contents: dict[str, Any] = (
                FileSystemReader(folder).read_metadata().state_dict_metadata
            )
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(
                f"there is no checkpoint in '{folder}'",
                hint="checkpoint.latest(folder) finds the last whole one",
            ) from None

    def key_for(
        self,
        names: Sequence[str],
        tensor: torch.Tensor,
        cast: bool = False,
        title: str = "",
    ) -> str:
        """The key of a tensor as `tensor` under any of the model's names for it: `model.NAME`, or the bare
        name; with a title, `TITLE.NAME`.

        Raises CheckpointError when there is none.
        """
        key = self._key(names, title)
        metadata = self.contents[key]
        if not isinstance(metadata, TensorStorageMetadata):
            raise CheckpointError(
                f"'{key}' is no tensor in the checkpoint", where=str(self.folder)
            )
        check_fits(
            names[0],
            tensor,
            tuple(metadata.size),
            metadata.properties.dtype,
            str(self.folder),
            cast,
        )
        return key

    def has(self, names: Sequence[str]) -> bool:
        """True where there is something under any of the model's names for a tensor."""
        keys = [*names, *(f"model.{name}" for name in names)]
        return any(key in self.contents for key in keys)

    def _key(self, names: Sequence[str], title: str) -> str:
        prefixes = (f"{title}.",) if title else ("model.", "")
        for name in names:
            for prefix in prefixes:
                if prefix + name in self.contents:
                    return prefix + name
        known: list[str] = []
        for key in self.contents:
            if not key.startswith(("optim.", "extra")):
                known.append(key.removeprefix("model."))
        name = f"{title}.{names[0]}" if title else names[0]
        raise CheckpointError(
            f"'{name}' is not in the checkpoint",
            where=str(self.folder),
            hint=nearest(names[0], known),
        )

    def read(self, into: dict[str, Any]) -> None:
        """Every tensor of `into` is filled, and everything else replaced, with the checkpoint's contents
        under its key.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            state_dict_loader.load(
                into, storage_reader=FileSystemReader(self.folder), no_dist=True
            )

    def template(self, key: str, device: torch.device) -> Any:
        """An object that `read` can fill under `key`."""
        metadata = self.contents[key]
        if not isinstance(metadata, TensorStorageMetadata):
            return None
        return torch.empty(
            metadata.size, dtype=metadata.properties.dtype, device=device
        )


def check_fits(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    where: str,
    cast: bool = False,
) -> None:
    """Returns when a tensor of that shape and dtype can be loaded into `tensor`; raises CheckpointError
    else.
    """
    if shape != tuple(tensor.shape):
        raise CheckpointError(
            f"'{name}' has shape {list(shape)}, that of the model {list(tensor.shape)}",
            where=where,
        )
    floats = (
        dtype is not None and dtype.is_floating_point and tensor.dtype.is_floating_point
    )
    if dtype != tensor.dtype and not (cast and floats):
        hint = "build the model in that dtype before it is cut" + (
            ", or materialize(..., cast=True)" if floats else ""
        )
        raise CheckpointError(
            f"'{name}' is {dtype}, that of the model {tensor.dtype}",
            where=where,
            hint=hint,
        )


def _load(
    driver: Driver,
    optimizers: Optimizers,
    folder: Path,
    copies: Copies,
    frozen: bool,
) -> dict[str, Any]:
    _refuse_no_copies(copies)
    reader = Reader(folder)
    tensors = _wanted(driver, reader, frozen)
    for name in copies:
        for entry, tensor in _copied(driver, name, copies[name]):
            key = reader.key_for(persistent(entry), tensor, title=name)
            tensors.setdefault(key, []).append(tensor.detach())
    slots = [
        _Slots(driver, optimizer, reader, frozen) for optimizer in _listed(optimizers)
    ]
    wanted: dict[str, Any] = {key: replicas[0] for key, replicas in tensors.items()}
    for slot in slots:
        wanted |= slot.templates(reader)
    if "extra" in reader.contents:
        wanted["extra"] = b""
    reader.read(wanted)
    for first, *others in tensors.values():
        for replica in others:
            replica.copy_(first)
    for slot in slots:
        slot.fill(wanted)
    if "extra" not in wanted:
        return {}
    extra = io.BytesIO(wanted["extra"])
    return dict(torch.load(extra, weights_only=False))


def _wanted(
    driver: Driver, reader: Reader, frozen: bool
) -> dict[str, list[torch.Tensor]]:
    """Key in the checkpoint -> the tensors of this rank that are read from it."""
    program = driver.pipe.program
    stages = [driver.pipe.stages[i] for i in driver.stage_indices]
    for stage in stages:
        refuse_meta(program, stage)
    wanted: dict[str, list[torch.Tensor]] = {}
    for entry in entries(program, driver.stage_indices):
        names = persistent(entry)
        if not names:
            continue
        replicas = [*held_tensors(program, stages, entry)]
        if not reader.has(names) and _is_frozen(entry, replicas[0]):
            if not frozen:
                continue
            raise _lacks_frozen(entry, reader.folder)
        key = reader.key_for(names, replicas[0])
        wanted[key] = [tensor.detach() for tensor in replicas]
    return wanted


def _is_frozen(entry: StateEntry, tensor: torch.Tensor) -> bool:
    return entry.kind == "param" and not tensor.requires_grad


def _lacks_frozen(entry: StateEntry, folder: Path) -> CheckpointError:
    return CheckpointError(
        f"'{entry.name}' is frozen, and is not in the checkpoint",
        where=str(folder),
        hint="if it was saved without what is frozen: load(..., frozen=False) leaves that as it is",
    )


class _Slots:
    """The keys of an optimizer's state of this rank in a checkpoint. Raises CheckpointError when it has no
    state for a parameter.
    """

    def __init__(
        self, driver: Driver, optimizer: Optimizer, reader: Reader, frozen: bool
    ) -> None:
        self.optimizer = optimizer
        self.groups: list[
            list[tuple[torch.Tensor, dict[str, str], dict[str, str]]]
        ] = []
        saved = _saved_optimizer(reader.contents)
        homes = _homes(driver)
        for group in optimizer.param_groups:
            self.groups.append([])
            for parameter in group["params"]:
                entry = _entry_of(parameter, homes)
                name = next(
                    (name for name in entry.names if ("param_groups", name) in saved),
                    None,
                )
                if name is None and not frozen and not parameter.requires_grad:
                    self.groups[-1].append((parameter, {}, {}))
                    continue
                if name is None:
                    raise CheckpointError(
                        f"there is no optimizer state of '{entry.name}' in the checkpoint",
                        where=str(reader.folder),
                        hint=nearest(
                            entry.name, (parameter_name for _, parameter_name in saved)
                        ),
                    )
                _refuse_other_kind(
                    optimizer, group, saved["param_groups", name], reader.folder
                )
                self.groups[-1].append(
                    (
                        parameter,
                        saved["param_groups", name],
                        saved.get(("state", name), {}),
                    )
                )

    def templates(self, reader: Reader) -> dict[str, Any]:
        """Key -> the object that `Reader.read` fills. As in torch, a step count is on the CPU unless a kernel
        reads it.
        """
        cpu = torch.device("cpu")
        templates: dict[str, Any] = {}
        for group, members in zip(
            self.optimizer.param_groups, self.groups, strict=True
        ):
            on_device = group.get("capturable") or group.get("fused")
            for parameter, settings, state in members:
                for full_key in settings.values():
                    templates[full_key] = reader.template(full_key, cpu)
                for key, full_key in state.items():
                    device = parameter.device
                    if key == "step" and not on_device:
                        device = cpu
                    templates[full_key] = reader.template(full_key, device)
        return templates

    def fill(self, read: Mapping[str, Any]) -> None:
        """The optimizer has the settings and the state that were read."""
        groups = []
        for group, members in zip(
            self.optimizer.param_groups, self.groups, strict=True
        ):
            saved = [
                _read_values(read, settings) for _, settings, _ in members if settings
            ]
            first = saved[0] if saved else {}
            for key, value in first.items():
                if any(settings.get(key) != value for settings in saved):
                    raise CheckpointError(
                        f"parameters of one group were saved with several values of '{key}'",
                        hint="group them as before",
                    )
            numbers = list(range(len(members)))
            own_settings = {key: group[key] for key in group if key != "params"}
            groups.append({**own_settings, **first, "params": numbers})
        self.optimizer.load_state_dict({"state": {}, "param_groups": groups})
        for parameter, _, state in (
            member for members in self.groups for member in members
        ):
            # set here, because load_state_dict casts to the parameter's dtype
            if state:
                self.optimizer.state[parameter] = _read_values(read, state)


def _read_values(
    read: Mapping[str, Any], full_keys: Mapping[str, str]
) -> dict[str, Any]:
    """Key -> the value that was read under its full key."""
    return {key: read[full_key] for key, full_key in full_keys.items()}


def _refuse_other_kind(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    settings: Collection[str],
    folder: Path,
) -> None:
    """Returns unless an optimizer of another kind was saved: it has settings that this one does not have, and
    lacks some that this one has. Kinds with the same settings, as Adam and AdamW, are not told apart.
    """
    theirs = {*settings}
    unknown = sorted(theirs - {*group} - _OF_SCHEDULERS)
    missing = sorted({*optimizer.defaults} - theirs)
    if not unknown or not missing:
        return
    raise CheckpointError(
        f"the checkpoint has an optimizer with {', '.join(unknown)}, and this one, "
        f"{type(optimizer).__name__}, has {', '.join(missing)} instead",
        where=str(folder),
        hint="load it into an optimizer of the same kind, or load the model alone: "
        "checkpoint.load(driver, None, folder)",
    )


_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
"""Settings that schedulers of the learning rate add to those of any optimizer."""


def _saved_optimizer(full_keys: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """('state' or 'param_groups', parameter name) -> key -> its full key in the checkpoint."""
    saved: dict[tuple[str, str], dict[str, str]] = {}
    for full_key in full_keys:
        for part in ("state", "param_groups"):
            if full_key.startswith(f"optim.{part}."):
                name, _, key = full_key.removeprefix(f"optim.{part}.").rpartition(".")
                saved.setdefault((part, name), {})[key] = full_key
    return saved

"""Stages of a model that was cut on the meta device become real: each process makes its own stages and
nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from stagecut.backend.files.checkpoint import Reader, check_fits
from stagecut.backend.files.conversions import Conversions, Read
from stagecut.backend.files.initial import InitFn, MaterializeError, initial
from stagecut.backend.files.together import CheckpointError
from stagecut.backend.files.writers import opened
from stagecut.backend.stages.modules import Stage, StageModule, find, put, stored
from stagecut.backend.stages.staged import Staged
from stagecut.backend.stages.state import entries, held_tensors, persistent
from stagecut.ir.errors import nearest
from stagecut.ir.graph import StateEntry
from stagecut.ir.run.storage import storage_of


class Source(Protocol):
    """A source from which tensors are read by name."""

    def key_for(self, names: Sequence[str], tensor: torch.Tensor, cast: bool) -> str:
        """The key of a tensor as `tensor` under any of these names. Raises CheckpointError when there is
        none.
        """
        ...

    def read(self, into: dict[str, Any]) -> None:
        """Every tensor of `into` holds the values under its key."""
        ...


def materialize(
    pipe: Staged,
    indices: Iterable[int],
    source: str | Path | None,
    device: torch.device,
    init_fn: InitFn | None,
    values: Mapping[str, torch.Tensor],
    rename: Callable[[str], str] | None,
    cast: bool,
    seed: int,
) -> None:
    """As `Pipe.materialize`. Everything is checked before anything is read, and everything is read before a
    stage changes.
    """
    stages = [pipe.get_stage_module(index) for index in sorted(set(indices))]
    wanted = entries(pipe.program, [stage.index for stage in stages])
    current = {
        entry: next(held_tensors(pipe.program, stages, entry)) for entry in wanted
    }
    _refuse_overlaps(current)
    from_values = _by_entry(pipe, values, current, cast)
    from_stages: dict[StateEntry, torch.Tensor] = {}
    for entry in wanted:
        if not current[entry].is_meta:
            continue
        tensor = _elsewhere(pipe, entry, device)
        if tensor is not None:
            from_stages[entry] = tensor
    reader: Source | None = None
    from_source: dict[StateEntry, str] = {}
    if source is not None:
        # where the caller says the names, no other names are looked for
        model = pipe._model() if pipe._model is not None and rename is None else None
        reader = open_source(Path(source), model)
        for entry in wanted:
            names = persistent(entry)
            if rename is not None:
                names = [rename(name) for name in names]
            if names and entry not in from_values and entry not in from_stages:
                from_source[entry] = reader.key_for(names, current[entry], cast)
    has_value = {*from_values, *from_stages, *from_source}
    lacking = [
        entry for entry in wanted if current[entry].is_meta and entry not in has_value
    ]
    tensors = from_stages | _from_init(pipe, lacking, source, init_fn, device, seed)
    for entry in (*from_values, *from_source):
        own = current[entry].detach()
        if own.is_meta:
            own = torch.empty_like(own, device=device)
        tensors[entry] = own
    for entry, tensor in from_values.items():
        tensors[entry].copy_(tensor)
    if reader is not None:
        _read_each(
            reader, [(key, tensors[entry]) for entry, key in from_source.items()]
        )
    _install(
        pipe,
        stages,
        {entry: tensor for entry, tensor in tensors.items() if current[entry].is_meta},
        current,
        device,
    )


def _from_init(
    pipe: Staged,
    lacking: Sequence[StateEntry],
    source: str | Path | None,
    init_fn: InitFn | None,
    device: torch.device,
    seed: int,
) -> dict[StateEntry, torch.Tensor]:
    """The values that `init_fn` gives to tensors that lack one; beside a source, those of the model's own
    code by default. Raises MaterializeError for a tensor that is left without one.
    """
    knows_model = pipe._model is not None and pipe._model() is not None
    if lacking and init_fn is None and (source is None or not knows_model):
        raise _no_value(lacking, source)
    tensors = initial(pipe, lacking, init_fn, device, seed)
    left = [entry for entry in lacking if entry not in tensors]
    if left and init_fn is None:
        raise _no_value(left, source)
    if left:
        raise MaterializeError(
            f"init_fn gave no value to '{left[0].name}'",
            hint="initialise it there, or give values={name: tensor}",
        )
    return tensors


def initialize(
    pipe: Staged, indices: Iterable[int], device: torch.device, seed: int
) -> None:
    """As `Pipe.initialize`. All values are there before a stage changes."""
    stages = [pipe.get_stage_module(index) for index in sorted(set(indices))]
    wanted = entries(pipe.program, [stage.index for stage in stages])
    current = {
        entry: next(held_tensors(pipe.program, stages, entry)) for entry in wanted
    }
    _refuse_overlaps(current)
    # a constant that is real belongs to the code
    fresh = [e for e in wanted if e.kind != "const" or current[e].is_meta]
    values = initial(pipe, fresh, None, device, seed, in_order=True)
    if left := [entry for entry in fresh if entry not in values]:
        raise _no_code(pipe, left)
    for stage in stages:
        if any(isinstance(p, DTensor) and p.is_meta for p in stage.parameters()):
            stage.to_empty(device=device)
    tensors: dict[StateEntry, torch.Tensor] = {}
    for entry, value in values.items():
        replicas = [*held_tensors(pipe.program, stages, entry)]
        elsewhere = _elsewhere(pipe, entry, device)
        if replicas[0].is_meta:
            tensors[entry] = value if elsewhere is None else elsewhere
        for replica in (*replicas, elsewhere):
            if replica is not None and not replica.is_meta:
                _fill(replica, value)
    _install(pipe, stages, tensors, current, device)


def _fill(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`tensor` has the values, or its shards of them."""
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            mesh, placements = tensor.device_mesh, tensor.placements
            value = distribute_tensor(value, mesh, placements, src_data_rank=None)
        tensor.copy_(value)


def _no_code(pipe: Staged, left: Sequence[StateEntry]) -> MaterializeError:
    """No code of the model sets these tensors; the message names the first, and the class of its module."""
    entry = left[0]
    path = entry.name.rpartition(".")[0]
    kind = pipe.program.name
    model = pipe._model() if pipe._model is not None else None
    if model is not None:
        kind = type(model.get_submodule(path)).__name__
    more = f", nor {len(left) - 1} more" if len(left) > 1 else ""
    return MaterializeError(
        f"no code that initialises '{entry.name}' was found{more}",
        where=f"module '{path}', a {kind}",
        hint=(
            f"give {kind} a reset_parameters() that sets its parameters and buffers, as torch.nn has, or "
            "pipe.materialize(stages, init_fn=..., values=...)"
        ),
    )


def _read_each(reader: Source, wanted: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Every tensor has the values under its key, also where several have one key."""
    by_key: dict[str, list[torch.Tensor]] = {}
    for key, tensor in wanted:
        by_key.setdefault(key, []).append(tensor)
    reader.read({key: tensors[0] for key, tensors in by_key.items()})
    for first, *others in by_key.values():
        for other in others:
            other.copy_(first)


def _install(
    pipe: Staged,
    stages: Sequence[Stage],
    tensors: Mapping[StateEntry, torch.Tensor],
    current: Mapping[StateEntry, torch.Tensor],
    device: torch.device,
) -> None:
    """The stages hold these tensors, each under all its names, and are on `device` as a whole."""
    for entry, tensor in tensors.items():
        if entry.kind == "param" and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=current[entry].requires_grad)
        for stage in stages:
            for name in pipe.program.stages[stage.index].state.get(entry, ()):
                put(stage, name, tensor)
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, StageModule):
                module.__dict__["_here"] = torch.empty(0, device=device)
        stage.to(device)


def _refuse_overlaps(current: Mapping[StateEntry, torch.Tensor]) -> None:
    """Raises MaterializeError for two tensors in one storage, because they would become two: a write to one
    would not show in the other.
    """
    seen: dict[int | None, StateEntry] = {}
    for entry, tensor in current.items():
        first = seen.setdefault(storage_of(tensor), entry)
        if tensor.is_meta and first is not entry:
            raise MaterializeError(
                f"'{first.name}' and '{entry.name}' lie in one storage",
                hint="make one from the other in forward, not in __init__",
            )


def _by_entry(
    pipe: Staged,
    values: Mapping[str, torch.Tensor],
    current: Mapping[StateEntry, torch.Tensor],
    cast: bool,
) -> dict[StateEntry, torch.Tensor]:
    """The given tensors of these stages. Raises MaterializeError for a name that no stage has, and for a
    tensor without values.
    """
    owners: dict[str, StateEntry] = {}
    for name, entry in pipe.program.name_owners().items():
        for alias in (name, stored(name)):
            owners[alias] = entry
    tensors: dict[StateEntry, torch.Tensor] = {}
    for name, tensor in values.items():
        if name not in owners:
            raise MaterializeError(
                f"values has '{name}', which the model does not have",
                hint=nearest(name, owners),
            )
        if tensor.is_meta:
            raise MaterializeError(f"values['{name}'] is on the meta device itself")
        entry = owners[name]
        if entry in current:
            shape = tuple(tensor.shape)
            check_fits(name, current[entry], shape, tensor.dtype, "values", cast)
            tensors[entry] = tensor.detach()
    return tensors


def _elsewhere(
    pipe: Staged, entry: StateEntry, device: torch.device
) -> torch.Tensor | None:
    """The tensor that another stage of this process has for `entry` already."""
    tensors = (
        find(pipe.stages[index], pipe.program.stages[index].state[entry][0])
        for index in entry.stages
    )
    for tensor in tensors:
        if tensor is None or tensor.is_meta:
            continue
        if tensor.device == _indexed(device):
            return tensor
    return None


def _indexed(device: torch.device) -> torch.device:
    return torch.empty(0, device=device).device


def _no_value(
    lacking: Sequence[StateEntry], source: str | Path | None
) -> MaterializeError:
    names = ", ".join(f"'{entry.name}'" for entry in lacking[:5])
    if len(lacking) > 5:
        names += f" and {len(lacking) - 5} more"
    if source is None:
        return MaterializeError(
            f"nothing gives values to {names}",
            hint=(
                "give a checkpoint, init_fn=..., or values={name: tensor}; or, for a new model, "
                "pipe.initialize(stages)"
            ),
        )
    categories = dict.fromkeys(
        "constants" if entry.kind == "const" else "non-persistent buffers"
        for entry in lacking
    )
    return MaterializeError(
        f"no checkpoint holds {' and '.join(categories)}, and these were made on meta: {names}",
        hint=(
            "values={name: tensor}, or an init_fn that computes them in their module; a tensor that forward "
            "makes must not be on meta"
        ),
    )


# --- checkpoints --------------------------------------------------------------------------------------


def open_source(path: Path, model: nn.Module | None = None) -> Source:
    """The tensors of a checkpoint, under the names that they have in `model`. Raises CheckpointError where
    there is none.
    """
    if (path / ".metadata").is_file():
        return Reader(path)
    return _Safetensors(path, model)


class _Safetensors:
    """A .safetensors file, or a folder with `model.safetensors` or `model.safetensors.index.json` and the
    files it names.
    """

    def __init__(self, path: Path, model: nn.Module | None) -> None:
        self.path = path
        self.files = _files_of(path)
        self._conversions = Conversions(model, self.files)

    def key_for(self, names: Sequence[str], tensor: torch.Tensor, cast: bool) -> str:
        """As `Source` says."""
        for name in names:
            if name in self._conversions.renamed:
                key = self._conversions.renamed[name]
                return self._fitting(key, self._tensor(key), tensor, cast)
            if name in self._conversions.made:
                made = self._made(name, lambda key: self._tensor(key).to("meta"))
                return self._fitting(name, made[name], tensor, cast)
        raise CheckpointError(
            f"'{names[0]}' is not in the checkpoint",
            where=str(self.path),
            hint=nearest(names[0], self.files),
        )

    def _fitting(
        self, key: str, saved: torch.Tensor, tensor: torch.Tensor, cast: bool
    ) -> str:
        where = str(self.files.get(key, self.path))
        check_fits(key, tensor, tuple(saved.shape), saved.dtype, where, cast)
        return key

    def read(self, into: dict[str, Any]) -> None:
        """As `Source` says."""
        converted: dict[str, torch.Tensor] = {}
        for key, tensor in into.items():
            if key not in self._conversions.made:
                tensor.copy_(self._tensor(key))
                continue
            if key not in converted:
                converted |= self._made(key, self._tensor)
            tensor.copy_(converted.pop(key))

    def _made(self, name: str, read: Read) -> dict[str, torch.Tensor]:
        """Name in the model -> tensor, for `name` and what is made with it."""
        made = self._conversions.made[name]
        try:
            tensors = made.tensors(self._conversions.model, read)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise _not_made(name, made.sources, self.path, error) from error
        if name not in tensors:
            raise _not_made(name, made.sources, self.path, None)
        return tensors

    def _tensor(self, key: str) -> torch.Tensor:
        """A tensor in the mapped file; nothing is read yet. Each tensor has a map of its own, because
        otherwise the values that were read would stay in memory.
        """
        with opened(self.files[key]) as handle:
            if key not in handle.keys():  # noqa: SIM118  # it is no mapping
                raise CheckpointError(
                    f"'{key}' is not where the index says",
                    where=str(self.files[key]),
                    hint="load the checkpoint again",
                )
            tensor: torch.Tensor = handle.get_tensor(key)
            return tensor


def _files_of(path: Path) -> dict[str, Path]:
    """Key -> the file that has its tensor."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return _files_in(index)
    file = path if path.is_file() else path / "model.safetensors"
    if not file.is_file():
        hint = "model.safetensors, model.safetensors.index.json or .metadata of a distributed one"
        if next(path.glob("pytorch_model*.bin"), None) is not None:
            hint = "pickled .bin files are not read: save the model again by its own save_pretrained"
        raise CheckpointError(f"there is no checkpoint in '{path}'", hint=hint)
    with opened(file) as handle:
        return dict.fromkeys(handle.keys(), file)


def _files_in(index: Path) -> dict[str, Path]:
    """Key -> the file that has its tensor, as an index says. Raises CheckpointError for what is no index."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: index.parent / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"'{index.name}' cannot be read: {error}",
            where=str(index),
            hint="load it again",
        ) from error


def _not_made(
    name: str, sources: Sequence[tuple[str, str]], path: Path, error: Exception | None
) -> CheckpointError:
    keys = ", ".join(f"'{key}'" for key, _ in sources[:3])
    rest = f" and {len(sources) - 3} more" if len(sources) > 3 else ""
    return CheckpointError(
        f"transformers makes no '{name}' of {keys}{rest}: {error or 'it makes others'}",
        where=str(path),
        hint="load it again: some tensors of the folder are missing or of another shape",
    )

"""An adapter in the format of peft, of a pipe whose stages are on many ranks: `PeftModel.from_pretrained`
reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stagecut.backend.files.model_state import saved_state
from stagecut.backend.files.together import CheckpointError, clear, publish
from stagecut.backend.files.writers import (
    Ranks,
    Tensors,
    folder_of,
    opened,
    refuse_unplain,
    stages_of,
    without_values,
    write_all,
)
from stagecut.backend.ranks.driver import Driver
from stagecut.backend.stages.staged import Staged
from stagecut.backend.stages.state import (
    entries,
    held_tensors,
    persistent,
    refuse_meta,
)
from stagecut.ir.errors import nearest
from stagecut.ir.keywords import near_names

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""Before the names of every model that `get_peft_model` made, and before every key in a file of peft."""

_WHERE = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "feedforward_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "r",
    "rank_pattern",
)
"""Settings that say where adapters are and how large; the names and shapes of the tensors say it too."""

_OF_A_RUN = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_ia3_weights",
    "init_lora_weights",
    "init_weights",
    "lora_dropout",
    "peft_version",
    "revision",
    "task_type",
)
"""Settings that may differ between two models which compute the same with the same tensors."""


@near_names
def save_adapter(
    driver_or_pipe: Driver | Staged,
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    adapter: str | None = None,
) -> None:
    """`folder` is an adapter of peft: `PeftModel.from_pretrained(base, folder)` has the tensors of the
    stages, bit for bit. Every rank of the driver calls it; all see the same file system. A pipe is written by
    this process alone, and all its stages must be real.

    driver_or_pipe: the Driver or the Pipe whose stages have the adapter.
    model: the model that was cut, or one like it on meta, where the pipe does not know it any more. From it
        come the config and the names.
    adapter: the name of the adapter, for a model that has several.

    The folder appears whole or not at all. Raises CheckpointError on every rank when it is there already, a
    rank cannot write, or the model has no adapter of peft.
    """
    ranks = Ranks.of(driver_or_pipe)
    with ranks.watched("save_adapter"):
        pipe, indices = ranks.together(lambda: stages_of(driver_or_pipe))
        found = ranks.together(lambda: _adapter(pipe, model, adapter))
        # peft may ask the hub which tensors are saved, and hear another answer on each rank
        found = replace(found, names=ranks.gather(found.names)[0])
        own = ranks.together(lambda: _own_tensors(pipe, indices, found))
        _write(ranks, found, own, folder_of(folder))


@near_names
def load_adapter(
    driver_or_pipe: Driver | Staged,
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    adapter: str | None = None,
) -> None:
    """The adapter in the stages of this process is that in `folder`, bit for bit, as `save_adapter` or peft
    wrote it, from any number of stages and ranks. Every rank of the driver calls it.

    driver_or_pipe, model, adapter: as for `save_adapter`.

    Raises CheckpointError, on every rank and before a tensor changes, when the folder is not whole, or its
    adapter is another one: of other modules, other shapes, or settings with which the same tensors compute
    something else.
    """
    ranks = Ranks.of(driver_or_pipe)
    with ranks.watched("load_adapter"):
        pipe, indices = ranks.together(lambda: stages_of(driver_or_pipe))
        found = ranks.together(lambda: _adapter(pipe, model, adapter, auto=False))
        source = folder_of(folder)
        pairs = ranks.together(lambda: _pairs(pipe, indices, found, source))
        with torch.no_grad():
            for tensor, saved in pairs:
                tensor.copy_(saved)


@dataclass(frozen=True)
class _Adapter:
    """An adapter of peft in a model.

    names: key in the files of peft -> name of the tensor in the model. optional: keys that peft saves in some
    cases only.
    """

    model: Any
    name: str
    config: Any
    names: Mapping[str, str]
    optional: frozenset[str] = frozenset()


def _adapter(pipe: Staged, model: Any, name: str | None, auto: bool = True) -> _Adapter:
    """The adapter of the model that was cut. With `auto`, its keys are those that peft would save now.

    Raises CheckpointError where there is none, or where the stages do not have its tensors.
    """
    if model is None and pipe._model is not None:
        model = pipe._model()
    if model is None:
        raise CheckpointError(
            "the model that was cut is gone, and with it the config of its adapter",
            hint="model=...: the model, or one like it on meta",
        )
    found = _in_model(model, name, auto)
    _refuse_unknown(pipe, found.names)
    return found


def _in_model(model: Any, name: str | None, auto: bool) -> _Adapter:
    configs = getattr(model, "peft_config", None) or {}
    if not configs:
        raise CheckpointError(
            f"{type(model).__name__} has no adapter of peft",
            hint="peft.get_peft_model(model, config) before the cut; checkpoint.save(..., frozen=False) "
            "saves what is trained of any model",
        )
    if name is None and len(configs) > 1:
        raise CheckpointError(
            f"the model has the adapters {', '.join(configs)}",
            hint='adapter=...: the name of one, such as adapter="default"',
        )
    name = name or next(iter(configs))
    if name not in configs:
        raise CheckpointError(
            f"the model has no adapter '{name}'", hint=nearest(name, configs)
        )
    names = _names(model, name, "auto" if auto else True)
    optional: set[str] = set()
    if not auto:
        optional = {*names} - {*_names(model, name, False)}
    return _Adapter(model, name, configs[name], names, frozenset(optional))


def _names(model: Any, name: str, embeddings: bool | str) -> dict[str, str]:
    """Key in the files of peft -> name of the tensor in the model."""
    peft = import_module("peft")
    state: Tensors = {}
    for tensor_name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            state[tensor_name] = without_values(tensor)
    saved = peft.get_peft_model_state_dict(
        model, state_dict=state, adapter_name=name, save_embedding_layers=embeddings
    )
    name_of = {id(tensor): tensor_name for tensor_name, tensor in state.items()}
    prefix = "" if any(each.startswith(_PREFIX) for each in state) else _PREFIX
    names: dict[str, str] = {}
    for key, tensor in saved.items():
        if id(tensor) not in name_of:
            raise CheckpointError(
                f"peft computes '{key}' when it saves a {model.peft_config[name].peft_type.value}",
                hint="checkpoint.save(driver, optimizer, folder) saves the parameters themselves",
            )
        names[prefix + key] = name_of[id(tensor)]
    return names


def _refuse_unknown(pipe: Staged, names: Mapping[str, str]) -> None:
    known: set[str] = set()
    for entry in pipe.program.state:
        known.update(persistent(entry))
    for name in names.values():
        if name not in known:
            raise CheckpointError(
                f"the stages have no '{name}', which the adapter of the model has",
                hint=nearest(name, known),
            )


# --- writing ------------------------------------------------------------------------------------------


def _own_tensors(pipe: Staged, indices: Any, adapter: _Adapter) -> Tensors:
    """Key -> tensor, for the part of the adapter that this process saves."""
    state: Tensors = {}
    for entry, tensor in saved_state(pipe, indices).items():
        state |= dict.fromkeys(persistent(entry), tensor)
    own = {key: state[name] for key, name in adapter.names.items() if name in state}
    refuse_unplain(own)
    return own


def _write(ranks: Ranks, adapter: _Adapter, own: Tensors, folder: Path) -> None:
    """`folder` holds the tensors of all ranks in one file, and the config."""
    aside = folder.with_name(f".{folder.name}.partial")
    written: set[str] = set().union(*ranks.gather({*own}))
    ranks.together(lambda: _refuse_gaps(adapter, written))
    ranks.first(lambda: _prepare(folder, aside))
    part = f"part-{ranks.rank}.safetensors"
    ranks.together(lambda: write_all({part: own}, aside))
    ranks.first(lambda: _finish(adapter, aside, folder))


def _refuse_gaps(adapter: _Adapter, written: set[str]) -> None:
    for key, name in adapter.names.items():
        if key not in written:
            raise CheckpointError(f"no rank has '{name}': it would be lost")


def _prepare(folder: Path, aside: Path) -> None:
    clear(folder, aside)
    aside.mkdir()


def _finish(adapter: _Adapter, aside: Path, folder: Path) -> None:
    """The parts are one file beside the config, and the folder has its name."""
    parts = [*aside.glob("part-*.safetensors")]
    joined: Tensors = {}
    for part in parts:
        joined |= _read(part)  # mapped: nothing is read before it is written
    write_all({TENSORS: joined}, aside)
    for part in parts:
        part.unlink()
    config = deepcopy(adapter.config)
    for setting, value in vars(config).items():
        if isinstance(value, set):  # the same file whatever the order in a set
            setattr(config, setting, sorted(value))
    config.inference_mode = True
    base = _base_of(adapter.model)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    mapping = None
    if config.task_type is None:
        cls = type(base)
        mapping = {
            "base_model_class": cls.__name__,
            "parent_library": cls.__module__,
        }
    config.save_pretrained(str(aside), auto_mapping_dict=mapping)
    publish(aside, folder)


def _base_of(model: Any) -> Any:
    """The model below its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _read(file: Path) -> Tensors:
    with opened(file) as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118


# --- reading ------------------------------------------------------------------------------------------


def _pairs(
    pipe: Staged, indices: Any, adapter: _Adapter, folder: Path
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each tensor of this process that the folder has a value for, with the value."""
    saved = _read_checked(folder, adapter.config)
    _refuse_others(adapter, saved, folder)
    stages = [pipe.stages[index] for index in indices]
    for stage in stages:
        refuse_meta(pipe.program, stage)
    held: dict[str, list[torch.Tensor]] = {}
    for entry in entries(pipe.program, indices):
        tensors = [*held_tensors(pipe.program, stages, entry)]
        held |= dict.fromkeys(persistent(entry), tensors)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for key, value in saved.items():
        for tensor in held.get(adapter.names[key], []):
            _refuse_misfit(key, tensor, value, folder)
            pairs.append((tensor, value))
    return pairs


def adapter_tensors(model: Any, folder: Path) -> Tensors:
    """Name in a model of peft -> tensor in the folder. Raises CheckpointError where the folder has no
    adapter, or another one.
    """
    adapter = _in_model(model, None, auto=False)
    saved = _read_checked(folder, adapter.config)
    _refuse_others(adapter, saved, folder)
    return {adapter.names[key]: tensor for key, tensor in saved.items()}


def _read_checked(folder: Path, wanted: Any) -> Tensors:
    """The tensors in a folder of peft, mapped, under the keys that they have there. Raises CheckpointError
    where there are none, or the config is not `wanted`.
    """
    file = folder / TENSORS
    if not file.is_file():
        hint = f"a folder with {CONFIG} and {TENSORS}"
        if (folder / "adapter_model.bin").is_file():
            hint = "pickled .bin files are not read: save the adapter again by peft's save_pretrained"
        raise CheckpointError(f"there is no adapter in '{folder}'", hint=hint)
    _refuse_other_config(config_in(folder), wanted, folder)
    return _read(file)


def config_in(folder: Path) -> Any:
    """The config of peft in a folder. Raises CheckpointError where there is none."""
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"there is no {CONFIG} in '{folder}'",
            hint="a folder that save_adapter or peft's save_pretrained wrote",
        )
    try:
        return import_module("peft").PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"'{CONFIG}' cannot be read: {error}", where=str(file), hint="load it again"
        ) from error


def _refuse_other_config(saved: Any, own: Any, folder: Path) -> None:
    """Returns when the same tensors compute the same with both configs."""
    where = str(folder / CONFIG)
    if type(saved) is not type(own):
        raise CheckpointError(
            f"the adapter is a {saved.peft_type.value}, that of the model a {own.peft_type.value}",
            where=where,
            hint=_CUT_WITH_IT,
        )
    there, here = asdict(saved), asdict(own)
    for setting in there.keys() | here.keys():
        if setting in _WHERE or setting in _OF_A_RUN:
            continue
        if _listed(there.get(setting)) != _listed(here.get(setting)):
            raise CheckpointError(
                f"the adapter has {setting}={there.get(setting)!r}, that of the model {here.get(setting)!r}: "
                "the same tensors would compute something else",
                where=where,
                hint=_CUT_WITH_IT,
            )


_CUT_WITH_IT = (
    "before the cut: PeftModel.from_pretrained(base, folder, is_trainable=True)"
)


def _listed(setting: Any) -> Any:
    """A setting as a file has it."""
    return (
        sorted(setting, key=str) if isinstance(setting, set | list | tuple) else setting
    )


def _refuse_others(adapter: _Adapter, saved: Tensors, folder: Path) -> None:
    """Returns when the folder has the tensors of the adapter and no others."""
    where = str(folder / TENSORS)
    missing = [
        key for key in adapter.names if key not in saved and key not in adapter.optional
    ]
    if missing:
        raise CheckpointError(
            f"'{missing[0]}'{_more(missing)} is not in the adapter",
            where=where,
            hint=nearest(missing[0], saved) or "it is of another base, or not whole",
        )
    unknown = [key for key in saved if key not in adapter.names]
    if unknown:
        raise CheckpointError(
            f"the adapter has '{unknown[0]}'{_more(unknown)}, and the model does not: it is of another base, "
            "or of other modules",
            where=where,
            hint=_CUT_WITH_IT,
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _refuse_misfit(
    key: str, tensor: torch.Tensor, saved: torch.Tensor, folder: Path
) -> None:
    where = str(folder / TENSORS)
    if tensor.shape != saved.shape:
        raise CheckpointError(
            f"'{key}' has shape {list(saved.shape)}, that of the model {list(tensor.shape)}",
            where=where,
            hint="it is of another base, or of another rank",
        )
    if torch.promote_types(tensor.dtype, saved.dtype) != tensor.dtype:
        raise CheckpointError(
            f"'{key}' is {saved.dtype}, that of the model {tensor.dtype}, which cannot hold it",
            where=where,
            hint="make the adapter of the model in that dtype before the cut",
        )

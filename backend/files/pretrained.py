"""A folder as transformers writes it, of a pipe whose stages are on many ranks: `from_pretrained` gives the
unsplit model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stagecut.backend.files.conversions import as_saved, is_pretrained
from stagecut.backend.files.model_state import saved_state
from stagecut.backend.files.together import CheckpointError, clear, publish
from stagecut.backend.files.writers import (
    Ranks,
    Tensors,
    folder_of,
    refuse_unplain,
    stages_of,
    without_values,
    write_all,
)
from stagecut.backend.progress import doing
from stagecut.backend.ranks.driver import Driver
from stagecut.backend.stages.staged import Staged
from stagecut.backend.stages.state import persistent
from stagecut.ir.keywords import near_names

INDEX = "model.safetensors.index.json"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@near_names
def save_pretrained(
    driver_or_pipe: Driver | Staged,
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    max_shard_size: int | str = "5GB",
    save_original_format: bool = True,
) -> None:
    """`folder` is one of transformers: `from_pretrained(folder)` gives the unsplit model bit for bit, with
    its ties. Every rank of the driver calls it, and writes its own stages; all see the same file system. A
    pipe is written by this process alone, and all its stages must be real.

    driver_or_pipe: the Driver or the Pipe whose stages are written.
    model: the model that was cut, or one like it on meta, where the pipe does not know it any more. From it
        come the config and the names.
    max_shard_size: the most bytes of a file, unless one tensor is larger: a number, or a text as "5GB".
    save_original_format: as in transformers: names and forms are those of the hub, where the class of the
        model has others. With False they are the model's own, which `from_pretrained` reads too.

    The folder appears whole or not at all. Raises CheckpointError on every rank when it is there already, a
    rank cannot write, or a tensor would be lost.
    """
    ranks = Ranks.of(driver_or_pipe)
    with doing(f"saving to {folder}"), ranks.watched("save_pretrained"):
        content = ranks.together(
            lambda: _content(
                driver_or_pipe, model, max_shard_size, save_original_format
            )
        )
        _write(ranks, content, folder_of(folder))


@dataclass(frozen=True)
class _Content:
    """What this process writes: shards of tensors; and the names that all processes together must write."""

    model: Any
    shards: list[Tensors]
    expected: Collection[str]


def _content(
    of: Any,
    model: nn.Module | None,
    max_shard_size: int | str,
    original: bool,
) -> _Content:
    pipe, indices = stages_of(of)
    model = _model(pipe, model)
    state = _state(pipe, indices, model)
    if original:
        state = as_saved(model, state)
    own = {name: tensor for name, tensor in state.items() if not tensor.is_meta}
    refuse_unplain(own)
    return _Content(model, _shards(own, _bytes(max_shard_size)), state.keys())


def _model(pipe: Staged, model: nn.Module | None) -> nn.Module:
    """The model of transformers that was cut. Raises CheckpointError where there is none."""
    if model is None and pipe._model is not None:
        model = pipe._model()
    if model is None:
        raise CheckpointError(
            "the model that was cut is gone, and with it its config",
            hint="save_pretrained(..., model=...): the model, or one like it on meta",
        )
    if not is_pretrained(model):
        hint = "checkpoint.save(driver, optimizer, folder) saves any model"
        if hasattr(model, "peft_config"):
            hint = _ADAPTED
        raise CheckpointError(
            f"{type(model).__name__} is no model of transformers", hint=hint
        )
    if getattr(model, "peft_config", None):
        raise CheckpointError(
            f"{type(model).__name__} has an adapter, whose tensors no class of transformers has",
            hint=_ADAPTED,
        )
    return model


_ADAPTED = (
    "checkpoint.save_adapter(driver, folder); in one process, merge_and_unload() makes it a model of "
    "transformers"
)


def _state(pipe: Staged, indices: Collection[int], model: Any) -> Tensors:
    """Every tensor of the model's state dict that is saved, once: with values where this process saves it,
    otherwise on meta.

    Raises CheckpointError where the model and the stages have not the same tensors.
    """
    kept: dict[str, str] = {}
    for entry in pipe.program.state:
        names = persistent(entry)
        kept |= {name: _kept_name(names, model) for name in names}
    own = {
        kept[persistent(entry)[0]]: tensor
        for entry, tensor in saved_state(pipe, indices).items()
    }
    model_state = model.state_dict()
    _refuse_another(model, model_state, kept, own)
    state: Tensors = {}
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for name, tensor in model_state.items():
        if kept[name] == name and name not in unsaved:
            state[name] = own.get(name, without_values(tensor))
    return state


def _refuse_another(
    model: Any, model_state: Tensors, kept: Collection[str], own: Tensors
) -> None:
    """Returns when the stages have the tensors of `model`. Raises CheckpointError otherwise."""
    other = next(iter(model_state.keys() ^ set(kept)), None)
    if other is None:
        shapes = {name: tensor.shape for name, tensor in own.items()}
        other = next(
            (n for n, shape in shapes.items() if shape != model_state[n].shape), None
        )
    if other is not None:
        raise CheckpointError(
            f"{type(model).__name__} and the stages have not the same '{other}'",
            hint="save the pipe with the model that was cut, as it was then",
        )


def _is_tied(name: str, model: Any) -> bool:
    """True for a name of a tensor that transformers saves under another name."""
    return name in model.all_tied_weights_keys


def _kept_name(names: list[str], model: Any) -> str:
    """The one of a tensor's names under which transformers saves it."""
    kept = [name for name in names if not _is_tied(name, model)] or sorted(names)[-1:]
    if len(kept) > 1:
        raise CheckpointError(
            f"'{kept[0]}' and '{kept[1]}' are one tensor, and {type(model).__name__} does not say so: "
            "from_pretrained would make two",
            hint=f"_tied_weights_keys = {{{kept[1]!r}: {kept[0]!r}}} in the class, or untie them",
        )
    return kept[0]


def _bytes(size: int | str) -> int:
    """A number of bytes. Raises CheckpointError for what is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]B|)", str(size).upper())
    if match is None or float(match[1]) <= 0:
        raise CheckpointError(
            f"max_shard_size={size!r} is no size", hint='a number, or such as "5GB"'
        )
    return int(float(match[1]) * _UNITS[match[2]])


def _shards(tensors: Mapping[str, torch.Tensor], most: int) -> list[Tensors]:
    """The tensors in their order, in parts of at most so many bytes, or of one tensor."""
    shards: list[Tensors] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append({})
            room = most
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


# --- files --------------------------------------------------------------------------------------------


def _write(ranks: Ranks, content: _Content, folder: Path) -> None:
    """`folder` holds the shards of all ranks, their index, and the config."""
    aside = folder.with_name(f".{folder.name}.partial")
    counts = ranks.gather(len(content.shards))
    names = _file_names(sum(counts))[sum(counts[: ranks.rank]) :]
    own = dict(zip(names, content.shards, strict=False))
    files: dict[str, Tensors] = {}
    for listed in ranks.gather(_on_meta(own)):
        files |= listed
    ranks.together(lambda: _refuse_gaps(files, content.expected))
    ranks.first(lambda: _prepare(folder, aside))
    ranks.together(lambda: write_all(own, aside))
    ranks.first(lambda: _finish(content.model, files, aside, folder))


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    numbers = range(1, count + 1)
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in numbers]


def _on_meta(files: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """What the files hold, without values."""
    return {
        file: {name: tensor.to("meta") for name, tensor in tensors.items()}
        for file, tensors in files.items()
    }


def _refuse_gaps(files: Mapping[str, Tensors], expected: Collection[str]) -> None:
    names: set[str] = set().union(*files.values())
    lacking = [name for name in expected if name not in names]
    if lacking:
        raise CheckpointError(f"no rank has '{lacking[0]}': it would be lost")


def _prepare(folder: Path, aside: Path) -> None:
    clear(folder, aside)
    aside.mkdir()


def _finish(
    model: Any, files: Mapping[str, Tensors], aside: Path, folder: Path
) -> None:
    """The index and the config are beside the shards, and the folder has its name."""
    if len(files) > 1:
        text = json.dumps(_index(model, files), indent=2, sort_keys=True)
        (aside / INDEX).write_text(f"{text}\n", encoding="utf-8")
    config = deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(aside)
    if model.can_generate():
        model.generation_config.save_pretrained(aside)
    publish(aside, folder)


def _index(model: Any, files: Mapping[str, Tensors]) -> dict[str, Any]:
    weight_map: dict[str, str] = {}
    total = 0
    for file, tensors in files.items():
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    metadata = {"total_parameters": model.num_parameters(), "total_size": total}
    return {"metadata": metadata, "weight_map": weight_map}

"""A folder of transformers becomes a pipe, without a whole model in any process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from stagecut.adapted import Adapted, adapted
from stagecut.backend.files.checkpoint import CheckpointError
from stagecut.backend.ranks.placement import own_device, placement, schedule_class
from stagecut.frontend.markers import SplitPoint
from stagecut.ir.errors import InputError
from stagecut.ir.keywords import near_names_or
from stagecut.pipe import OF_SEARCH, Pipe, pipeline


@near_names_or(OF_SEARCH)
def from_pretrained(
    folder: str | Path,
    mb_args: tuple[Any, ...] = (),
    mb_kwargs: dict[str, Any] | None = None,
    split_spec: dict[str, SplitPoint] | None = None,
    split_policy: Callable[..., Any] | None = None,
    *,
    stages: int | None = None,
    model_class: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    schedule: str = "1F1B",
    group: dist.ProcessGroup | None = None,
    dynamic_shapes: Any = None,
    leaf_modules: Sequence[str] = (),
    routes: Mapping[str, str] | None = None,
    tied: str | Mapping[str, str] = "replicate",
    adapter: Any = None,
) -> Pipe:
    """The model that `save_pretrained` wrote to `folder`, cut into stages as by `pipeline`. Its model is on
    meta, in eval mode, and lives as long as the pipe.

    In a process group, the stages that a Driver with this `schedule` gives to this rank are real and on
    `device`; without one, all are. The others stay on meta.

    mb_args, mb_kwargs: example inputs, of which only sizes and dtypes count.
    model_class: the class of the model, or an auto class; by default the one that `config.json` names.
    model_kwargs: what the class is given beside its config, such as {"attn_implementation": "eager"}.
    dtype: of the parameters, by default the one in `config.json`. With it, floats of another dtype in the
        files become it.
    split_spec, split_policy, stages, dynamic_shapes, leaf_modules, routes, tied: as for `pipeline`.
    adapter: a config of peft, for a new adapter on the frozen model, or a folder with an adapter, to go on
        training it. The model that is cut is then the one of `peft.get_peft_model`, with its names.

    Raises CheckpointError for a folder without config or tensors, and for tensors that do not fit; and what
    `pipeline` raises.
    """
    config = _config(folder)
    model = _on_meta(
        config, _class(config, model_class, folder), dtype, model_kwargs or {}
    )
    if (Path(folder) / "generation_config.json").is_file() and model.can_generate():
        made = type(model.generation_config).from_pretrained(folder)
        model.generation_config = made
    base = model
    added: Adapted | None = None
    if adapter is not None:
        added = adapted(lambda: deepcopy(base), folder, adapter, dtype is not None)
        model = added.model
    pipe = pipeline(
        model,
        _without_values(mb_args),
        _without_values(mb_kwargs or {}),
        split_spec,
        split_policy,
        dynamic_shapes=dynamic_shapes,
        stages=stages,
        leaf_modules=leaf_modules,
        routes=routes,
        tied=tied,
        check=None,
    )
    pipe._model = lambda: model  # nobody else keeps it
    pipe.materialize(
        _own_stages(pipe, schedule, group),
        folder,
        device=_device(device, group),
        values=None if added is None else added.values,
        rename=None if added is None else added.rename,
        cast=dtype is not None,
    )
    return pipe


def _config(folder: str | Path) -> Any:
    """The config in `folder`. Raises CheckpointError where there is none that can be followed."""
    if not isinstance(folder, str | Path):
        raise CheckpointError(f"{folder!r} is no folder", hint="a str or a Path")
    if not Path(folder).is_dir():
        raise CheckpointError(
            f"'{folder}' is no folder",
            hint="huggingface_hub.snapshot_download(name) makes one of a model of the hub",
        )
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(
            f"there is no config.json in '{folder}'",
            hint="build the model on meta, then pipeline(model, ...) and pipe.materialize(stages, folder)",
        )
    config = _transformers().AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"the tensors in '{folder}' are quantized",
            hint="dequantize the model, and save it again",
        )
    return config


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError:
        raise CheckpointError(
            "transformers is not installed", hint="pip install 'transformers>=5'"
        ) from None


def _class(config: Any, wanted: Any, folder: str | Path) -> Any:
    """The class of the model. Raises CheckpointError where the config names none of transformers."""
    if wanted is not None:
        if not hasattr(wanted, "_from_config") and not hasattr(wanted, "from_config"):
            raise InputError(
                f"model_class={wanted!r} is no class of transformers",
                hint="such as transformers.LlamaForCausalLM, or AutoModelForCausalLM",
            )
        return wanted
    names = config.architectures or ["nothing"]
    named = getattr(_transformers(), names[0], None)
    if named is None:
        raise CheckpointError(
            f"config.json names {names[0]}, which transformers does not have",
            where=str(folder),
            hint="from_pretrained(..., model_class=...)",
        )
    return named


def _on_meta(
    config: Any, cls: Any, dtype: torch.dtype | None, options: Mapping[str, Any]
) -> Any:
    make = getattr(cls, "from_config", None) or cls._from_config
    with torch.device("meta"):
        model = make(config, dtype=dtype or config.dtype or torch.float32, **options)
    return model.eval()


def _without_values(inputs: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), inputs)


def _own_stages(
    pipe: Pipe, schedule: str, group: dist.ProcessGroup | None
) -> list[int]:
    indices = range(pipe.num_stages)
    if not _in_group():
        return [*indices]
    ranks = dist.get_world_size(group)
    homes = placement(pipe.num_stages, ranks, schedule_class(schedule))
    return [index for index in indices if homes[index] == dist.get_rank(group)]


def _device(
    device: torch.device | str | None, group: dist.ProcessGroup | None
) -> torch.device:
    if device is not None:
        return torch.device(device)
    return own_device(group) if _in_group() else torch.device("cpu")


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()

"""An adapter of peft on a model that is on meta: where its values, and those of the base, come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stagecut.backend.files.adapters import adapter_tensors, config_in
from stagecut.backend.files.materialize import open_source
from stagecut.backend.files.together import CheckpointError

PREFIX = "base_model.model."
"""Before the names of a model in a model of peft."""


@dataclass(frozen=True)
class Adapted:
    """A model of peft, on meta.

    values: name -> tensor, for all that the adapter adds. rename: a name of this model -> the key of its
    tensor in the files of the base.
    """

    model: Any
    values: Mapping[str, torch.Tensor]
    rename: Callable[[str], str]


def adapted(
    make: Callable[[], nn.Module], folder: str | Path, adapter: Any, cast: bool
) -> Adapted:
    """The model that `make` makes on meta, with an adapter: a new one for a config of peft, with the values
    that `get_peft_model` would draw now, or the one in a folder of peft.

    Raises CheckpointError for a folder that has none or another one, and for a new adapter whose values
    depend on those of the base.
    """
    peft = import_module("peft")
    is_new = not isinstance(adapter, str | Path)
    config = deepcopy(adapter) if is_new else config_in(Path(adapter))
    config.inference_mode = False
    base = make()
    with torch.device("meta"):
        model = peft.get_peft_model(make(), deepcopy(config))
    if is_new:
        values = _drawn(make, config, {*base.state_dict()})
    else:
        values = adapter_tensors(model, Path(adapter))
    return Adapted(model.eval(), values, _renaming(base, folder, cast))


def _drawn(
    make: Callable[[], nn.Module], config: Any, of_base: set[str]
) -> dict[str, torch.Tensor]:
    """The tensors of a new adapter as peft draws them. Raises CheckpointError where they depend on the base,
    or where peft changes the base.
    """
    with torch.random.fork_rng([]):
        others = _made_on(make, config, 1.0)
    values = _made_on(make, config, 0.0)
    own: dict[str, torch.Tensor] = {}
    for name, tensor in values.items():
        if base_name(name) not in of_base:
            own[name] = tensor
        unlike = not torch.equal(tensor, others[name])
        if unlike == (name in own):
            raise CheckpointError(
                f"the first value of '{name}' is computed from the weights of the base",
                hint="make the adapter in one process, save_pretrained, and give its folder",
            )
    return own


def _made_on(
    make: Callable[[], nn.Module], config: Any, fill: float
) -> dict[str, torch.Tensor]:
    """The state of a model of peft whose base is one number everywhere, and takes no memory."""
    base = make()
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                number = torch.full((), fill, dtype=parameter.dtype)
                whole = number.expand(parameter.shape)
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)
    made = import_module("peft").get_peft_model(base, deepcopy(config))
    state: dict[str, torch.Tensor] = made.state_dict()
    return {name: tensor for name, tensor in state.items() if not tensor.is_meta}


def base_name(name: str) -> str:
    """A name in a model of peft -> that of the same tensor, or of the one that it begins as, in its base."""
    parts = name.removeprefix(PREFIX).split(".")
    if "modules_to_save" in parts:
        place = parts.index("modules_to_save")
        del parts[place : place + 2]  # and the name of the adapter
    kept = [part for part in parts if part not in ("base_layer", "original_module")]
    return ".".join(kept)


def _renaming(base: nn.Module, folder: str | Path, cast: bool) -> Callable[[str], str]:
    source = open_source(Path(folder), base)
    state = base.state_dict()

    def rename(name: str) -> str:
        own = base_name(name)
        return source.key_for([own], state[own], cast) if own in state else name

    return rename

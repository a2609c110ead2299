"""Names and forms of a model's tensors in files of transformers, where they are not the model's own.

A class of transformers may call its tensors otherwise than the hub's files do, and may hold as one tensor
what a file has as many, such as the experts of Mixtral. transformers knows how they become each other
(`transformers.conversion_mapping`); here each process does so for the tensors of its own stages only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stagecut.backend.files.together import CheckpointError

Read = Callable[[str], torch.Tensor]
"""Key in the files -> its tensor."""


def is_pretrained(model: nn.Module | None) -> bool:
    """True for a model of transformers."""
    return any(
        base.__name__ == "PreTrainedModel"
        and base.__module__.startswith("transformers.")
        for base in type(model).__mro__
    )


@dataclass
class Made:
    """A tensor of the model that is made of several of the files, or one of several that are made of one."""

    target: str
    converter: Any
    sources: list[tuple[str, str]] = field(default_factory=list)
    """Key in the files, and the pattern of the converter that it matches."""

    def tensors(self, model: Any, read: Read) -> dict[str, torch.Tensor]:
        """Name in the model -> tensor, as the converter of transformers makes it."""
        converter = deepcopy(self.converter)
        for key, pattern in self.sources:
            converter.add_tensor(self.target, key, pattern, read(key))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: _only(value) for name, value in made.items()}


def _only(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = value[0] if isinstance(value, list) else value
    return tensor


class Conversions:
    """How the tensors of a folder become those of `model`, as in `from_pretrained` of transformers.

    `renamed`: name in the model -> key in the files, for tensors that are the same. `made`: for the others.
    """

    def __init__(self, model: nn.Module | None, keys: Collection[str]) -> None:
        self.model = model
        self.renamed: dict[str, str] = {}
        self.made: dict[str, Made] = {}
        loading = _loading() if is_pretrained(model) else None
        if loading is None:
            self.renamed = {key: key for key in keys}
        else:
            self._follow(loading, keys)

    def _follow(self, loading: Loading, keys: Collection[str]) -> None:
        model: Any = self.model
        expected = model.state_dict()
        renamings, converters = loading.transforms(model)
        converter_of: dict[str, Any] = {}
        for converter in converters:
            converter_of |= dict.fromkeys(converter.source_patterns, converter)

        def name_of(key: str, *transforms: Any) -> tuple[str, str | None]:
            prefix = model.base_model_prefix
            name, pattern = loading.rename(key, *transforms, prefix, expected)
            return str(name), pattern

        for key in sorted(keys, key=loading.in_order):
            name, pattern = name_of(key, renamings, converters)
            if name not in expected and key in expected:
                # a name of the model's own, which looks like one of the hub's
                name, pattern = name_of(key, [], [])
            if pattern is None:
                self.renamed[name] = key
            else:
                self._add(name, converter_of[pattern], key, pattern)

    def _add(self, target: str, converter: Any, key: str, pattern: str) -> None:
        if target not in self.made:
            made = Made(target, converter)
            first = converter.target_patterns[0]
            for other in converter.target_patterns:
                self.made[target.replace(first, other)] = made
        self.made[target].sources.append((key, pattern))


@dataclass(frozen=True)
class Loading:
    """The functions of transformers that are used here."""

    rename: Callable[..., Any]
    revert: Callable[..., Any]
    in_order: Callable[[str], Any]
    mapping: Callable[..., list[Any]]
    renaming: type
    converter: type

    def transforms(self, model: nn.Module) -> tuple[list[Any], list[Any]]:
        """The renamings and the converters for files of `model`."""
        return self._sorted(self.mapping(model))

    def reversed_converters(self, model: nn.Module) -> list[Any]:
        """The converters by which transformers saves `model`."""
        transforms = getattr(model, "_weight_conversions", None)
        if transforms is None:
            transforms = self.mapping(model, add_legacy=False)
        _, converters = self._sorted(transforms)
        return [each.reverse_transform() for each in reversed(converters)]

    def _sorted(self, transforms: Iterable[Any]) -> tuple[list[Any], list[Any]]:
        transforms = list(transforms)
        return (
            [each for each in transforms if isinstance(each, self.renaming)],
            [each for each in transforms if isinstance(each, self.converter)],
        )


def _loading() -> Loading | None:
    """None where transformers is older than 5, which converts nothing."""
    try:
        from transformers import conversion_mapping, core_model_loading
    except ImportError:
        return None
    return Loading(
        core_model_loading.rename_source_key,
        core_model_loading.revert_weight_conversion,
        core_model_loading.dot_natural_key,
        conversion_mapping.get_model_conversion_mapping,
        core_model_loading.WeightRenaming,
        core_model_loading.WeightConverter,
    )


def as_saved(
    model: nn.Module, state: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`state` under the names and in the form in which transformers saves it. What is on meta, because other
    ranks have it, stays there.

    Raises CheckpointError where a tensor of the files would be made of some that are here and some that are
    not.
    """
    loading = _loading()
    if loading is None:
        raise CheckpointError(
            "transformers is older than 5", hint="pip install 'transformers>=5'"
        )
    _refuse_divided(loading.reversed_converters(model), state)
    saved: dict[str, torch.Tensor] = loading.revert(model, dict(state))
    return saved


def _refuse_divided(
    converters: Iterable[Any], state: Mapping[str, torch.Tensor]
) -> None:
    first: dict[str, str] = {}
    for name, tensor in state.items():
        for converter in converters:
            target, pattern = converter.rename_source_key(name)
            if pattern is None:
                continue
            other = first.setdefault(target, name)
            if state[other].is_meta != tensor.is_meta:
                raise CheckpointError(
                    f"'{other}' and '{name}' are one tensor in the files of transformers, and are on several "
                    "ranks",
                    hint="cut between modules that hold both, or save_original_format=False: the names of "
                    "the model, which from_pretrained reads too",
                )
            break

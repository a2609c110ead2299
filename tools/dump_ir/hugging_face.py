"""`hf:NAME`: an architecture of transformers with random weights, from a small config or a given one, and
inputs for it.

Only a model's own code says which sizes fit each other. So there are a few rules for making a config small,
from the smallest result to the largest, and a few shapes of inputs; the first ones with which the model runs
are taken.
"""

from __future__ import annotations

import inspect
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import Any

import torch
from torch import nn

from stagecut.ir.errors import InputError, nearest
from stagecut.tools.dump_ir.sources import settings

_SIZES = {
    64: (
        "hidden_size d_model n_embd dim hidden_dim word_embed_proj_dim encoder_hidden_size "
        "projection_dim embedding_size"
    ),
    128: (
        "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner "
        "moe_intermediate_size max_position_embeddings n_positions"
    ),
    256: "vocab_size",
    4: (
        "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers "
        "num_decoder_layers num_attention_heads n_head n_heads num_heads "
        "encoder_attention_heads decoder_attention_heads num_local_experts num_experts "
        "n_routed_experts"
    ),
    2: "num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts",
    1: "n_group topk_group",
    16: "head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim",
    32: "image_size",
    8: "patch_size",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
"""Settings of a config by these names get these small values."""
_LAYERS = re.compile(r"(num|n|encoder|decoder)(_\w+)?_layers?|depth")
_NO_WIDTH = re.compile(
    r"token|image|patch|kernel|stride|window|index|position|length|mel|channels|bins|rate|theta|frames|vocab|label|heads"
)
_FOLLOWS = ("stage_names", "out_features", "out_indices", "id2label", "label2id")
"""Settings that follow from the others."""
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
_MOST = 100_000_000
"""The most parameters of a model that is made to test whether it runs."""

Rule = Callable[[str, Any], Any]
"""Name and value of a setting -> its small value."""


def _by_name(key: str, value: Any) -> Any:
    return min(SMALL.get(key, value), value) if type(value) is int else value


def _divided(factor: int) -> Rule:
    """Few layers; every width is divided by `factor`, so that a divisor of another width still divides it."""

    def rule(key: str, value: Any) -> Any:
        if isinstance(value, list):
            least = 1 if key.endswith("section") else 64  # those are parts of a head
            return [_divided_part(key, part, least, factor) for part in value]
        if type(value) is not int or _LAYERS.fullmatch(key):
            return _shallow(key, value)
        if key == "vocab_size":
            return min(value, SMALL[key])
        is_width = value >= 64 and value % factor == 0 and not _NO_WIDTH.search(key)
        return value // factor if is_width else value

    return rule


def _divided_part(key: str, part: Any, least: int, factor: int) -> Any:
    """A part of a list in a config, divided by `factor` where it is a width of at least `least`."""
    is_width = type(part) is int and part >= least and not _NO_WIDTH.search(key)
    return part // factor if is_width else part


def _shallow(key: str, value: Any) -> Any:
    return min(value, 4) if type(value) is int and _LAYERS.fullmatch(key) else value


_RULES: tuple[Rule, ...] = (_by_name, _divided(16), _divided(4), _shallow)


def make(
    name: str, options: Namespace
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model called `name` (a class or a model type) and its example call. Raises InputError for an
    unknown one, and for one that no small config runs.
    """
    model, inputs = _model_and_inputs(_class(name), options)
    reads_tokens = any(argument.endswith("input_ids") for argument in inputs)
    if "length" in options.named and not reads_tokens:
        raise InputError(
            f"--length is how many tokens a row has, and {type(model).__name__} reads none",
            hint="leave it out",
        )
    return model, (), {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _model_and_inputs(
    cls: Any, options: Namespace
) -> tuple[Any, dict[str, torch.Tensor]]:
    chosen = settings(options.config)
    _check_names(cls.config_class, chosen)
    # a whole config, of any size: taken as it is, and not tried
    if "model_type" in chosen:
        model = _model(cls, _config(cls.config_class, chosen), options.meta)
        return model, next(_calls(model, options))
    why: Exception | None = None
    for rule in _RULES:
        try:
            config = _small_config(cls.config_class, rule, chosen)
            if rule is not _by_name and _parameters(cls, config) > _MOST:
                continue
            model = _model(cls, config, options.meta)
            for inputs in _calls(model, options):
                error = _failure(model, inputs)
                if error is None:
                    return model, inputs
                why = why or error
        except InputError:
            raise
        except Exception as error:
            # whatever the code of a model raises about its config
            why = why or error
    raise InputError(
        f"no small config of {cls.__name__} runs: {type(why).__name__}: {' '.join(str(why).split())[:200]}",
        hint="say what it needs with --config KEY=VALUE, or give a whole one: --config config.json",
    )


def _small_config(config_class: Any, rule: Rule, chosen: dict[str, Any]) -> Any:
    """The default config of a class, made small by a rule, with the settings that are chosen."""
    data = config_class().to_dict()
    return _config(config_class, _small(data, rule, config_class.attribute_map, chosen))


def _parameters(cls: Any, config: Any) -> int:
    """The number of parameters of a model with this config; the model is made on meta."""
    return sum(
        parameter.numel() for parameter in _model(cls, config, True).parameters()
    )


def _model(cls: Any, config: Any, meta: bool) -> Any:
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        return cls(config).eval()


def _failure(model: Any, inputs: dict[str, Any]) -> Exception | None:
    """The error that the model raises when it is called. On meta, an operation that only values can decide is
    no failure.
    """
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), torch.device(device):
            model(**{name: tensor.to(device) for name, tensor in inputs.items()})
    except Exception as error:
        needs_values = isinstance(error, NotImplementedError) or "meta" in str(error)
        return None if needs_values and device.type == "meta" else error
    return None


def _class(name: str) -> Any:
    try:
        import transformers
        from transformers.models.auto import modeling_auto
    except ImportError:
        raise InputError(
            "hf: needs the package transformers", hint="pip install transformers"
        ) from None
    transformers.logging.set_verbosity_error()
    by_type = {
        **modeling_auto.MODEL_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    names: Any = by_type.get(name, name)
    class_name = names[0] if isinstance(names, tuple) else names
    is_there = class_name in dir(transformers)
    cls = getattr(transformers, class_name, None) if is_there else None
    if (
        isinstance(cls, type)
        and issubclass(cls, transformers.PreTrainedModel)
        and cls.config_class
    ):
        return cls
    endings = ("Model", "LM", "Generation", "Classification")
    classes = [
        candidate for candidate in dir(transformers) if candidate.endswith(endings)
    ]
    raise InputError(
        f"transformers has no architecture '{name}'",
        hint=nearest(name, [*classes, *by_type]),
    )


def _check_names(config_class: Any, chosen: dict[str, Any]) -> None:
    default = config_class()
    for name in chosen:
        if not hasattr(default, name):
            raise InputError(
                f"{config_class.__name__} has no '{name}'",
                hint=nearest(name, [key for key in vars(default) if key[0] != "_"]),
            )


def _config(config_class: Any, data: dict[str, Any]) -> Any:
    config = config_class(**data)
    config.use_cache = False  # a cache is state that no module holds
    return config


def _small(
    data: dict[str, Any], rule: Rule, aliases: dict[str, str], chosen: dict[str, Any]
) -> dict[str, Any]:
    """The settings of a config and of its parts: as chosen, else made small. Lists with an entry for each
    layer have as many entries as there are layers now.
    """
    names = {name: alias for alias, name in aliases.items() if alias in SMALL}
    chosen = {aliases.get(key, key): value for key, value in chosen.items()}
    data = {key: value for key, value in data.items() if key not in _FOLLOWS}
    small: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            small[key] = _small(value, rule, {}, {})
        else:
            small[key] = rule(names.get(key, str(key)), value)
    small |= chosen
    layers = {
        data[key]: small[key]
        for key in data
        if type(data[key]) is int and _LAYERS.fullmatch(names.get(key, str(key)))
    }
    for key, value in data.items():
        if layers and _is_by_layer(value):
            kept = [number for number in value if int(number) < min(layers.values())]
            small[key] = {number: small[key][number] for number in kept}
        is_list = isinstance(value, list) and value and key not in chosen
        if is_list and len(value) in layers:
            small[key] = small[key][max(0, len(value) - layers[len(value)]) :]
    vocabulary = _vocabulary(small)
    if rule is _shallow or vocabulary is None:
        return small
    return _tokens(small, vocabulary) | chosen


def _is_by_layer(value: Any) -> bool:
    """True for a dict by the number of the layer."""
    if not isinstance(value, dict) or not value:
        return False
    return all(str(key).isdigit() for key in value)


def _vocabulary(data: dict[str, Any]) -> int | None:
    """The size of the vocabulary in a config or one of its parts, None for none."""
    for part in (data, *_parts(data)):
        if type(part.get("vocab_size")) is int:
            return int(part["vocab_size"])
    return None


def _parts(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (value for value in data.values() if isinstance(value, dict))


def _tokens(data: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Special tokens outside of the small vocabulary are moved into it: the common ones to its beginning,
    others to its end.
    """
    far = [
        key
        for key, value in data.items()
        if str(key).endswith(("token_id", "token_index"))
        and type(value) is int
        and value >= vocabulary
    ]
    return data | {
        key: _SPECIAL.index(key) if key in _SPECIAL else vocabulary - 1 - place
        for place, key in enumerate(far)
    }


# --- inputs -------------------------------------------------------------------------------------------


def _calls(model: Any, options: Namespace) -> Iterator[dict[str, Any]]:
    """Random inputs for the arguments of the model's forward, in the shapes that each may have, the likeliest
    ones first.

    Raises InputError where the arguments are not known.
    """
    for names in _argument_names(model):
        choices = {
            name: [*_shapes(name, model.config, options.batch, options.length)]
            for name in sorted(names)
        }
        for name, shapes in choices.items():
            if not shapes:
                raise InputError(
                    f"what to pass as '{name}' to {type(model).__name__} is not known",
                    hint="write a file with a function that returns (module, args, kwargs): FILE.py:FACTORY",
                )
        for chosen in islice(product(*choices.values()), 8):
            torch.manual_seed(0)
            inputs = {
                name: _tensor(name, shape, model.config)
                for name, shape in zip(choices, chosen, strict=True)
            }
            yield from _with_images(model, inputs)
            yield inputs


def _argument_names(model: Any) -> list[frozenset[str]]:
    """The sets of arguments with which to call a model, the likeliest one first."""
    taken, config = inspect.signature(model.forward).parameters, model.config
    needed = {
        name
        for name, parameter in taken.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    needed |= {model.main_input_name} & taken.keys()
    if getattr(config, "is_encoder_decoder", False):
        needed |= {"decoder_input_ids"} & taken.keys()
    more: set[str] = set()
    if hasattr(config, "vision_config"):
        more |= {"pixel_values"}
    if hasattr(config, "audio_config"):
        more |= {"input_features", "input_values"}
    sets = (
        needed | (more & taken.keys()),
        needed,
        needed | ({"bbox"} & taken.keys()),
    )
    return [*dict.fromkeys(map(frozenset, sets))]


def _shapes(
    name: str, config: Any, batch: int, length: int
) -> Iterator[tuple[int, ...]]:
    """The shapes that an input of that name may have, the likeliest one first; none for an unknown name."""
    vision, audio = (
        getattr(config, f"{part}_config", config) for part in ("vision", "audio")
    )
    if name.endswith(("input_ids", "attention_mask", "position_ids")):
        yield batch, length
    elif name == "bbox":
        yield batch, length, 4
    elif name in ("inputs_embeds", "hidden_states", "query_embeds", "inputs"):
        yield batch, length, _first(config, "hidden_size", "d_model", default=64)
    elif name.startswith("pixel_values"):
        channels = _first(vision, "num_channels", "in_channels", "in_chans", default=3)
        frames = _first(vision, "num_frames", default=4)
        size = getattr(vision, "image_size", None) or 64
        high, wide = size if isinstance(size, list | tuple) else (size, size)
        yield from (
            (batch, channels, high, wide),
            (batch, frames, channels, high, wide),
            (batch, channels, 224, 224),
        )
    elif name == "input_values":
        yield from (
            (batch, 8000),
            (batch, 1, 8000),
            (
                batch,
                _first(audio, "max_length", default=128),
                _first(audio, *_BANDS, default=128),
            ),
        )
    elif name == "input_features":
        bands = _first(audio, *_BANDS, default=80)
        most = _first(audio, "max_source_positions", default=64)
        yield from (
            (batch, bands, 2 * most),
            (batch, 128, bands),
            (batch, bands, 128),
            (batch, 1, 128, bands),
        )
    elif name == "past_values":
        yield (
            batch,
            _first(config, "context_length", default=32),
            _first(config, "num_input_channels", default=1),
        )


def _with_images(
    model: Any, inputs: dict[str, torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """The inputs with as many image tokens in front of each row of text as the model has features of its
    image, because the model checks their number.
    """
    token = getattr(model.config, "image_token_id", None)
    if token is None or not {"input_ids", "pixel_values"} <= inputs.keys():
        return
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    try:
        with torch.no_grad():
            output = model.get_image_features(pixels.to(model.device))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return
    features = getattr(output, "pooler_output", output)
    tensors = [features] if isinstance(features, torch.Tensor) else list(features)
    vectors = sum(tensor.numel() // tensor.shape[-1] for tensor in tensors)
    images = torch.full((len(ids), vectors // len(pixels)), token)
    yield inputs | {"input_ids": torch.cat([images, ids], dim=1)}


_BANDS = (
    "num_mel_bins",
    "n_mels",
    "feature_size",
    "input_feat_per_channel",
    "input_size",
    "feature_projection_input_dim",
    "mel_bins",
)


def _first(config: Any, *names: str, default: int) -> int:
    """The first number that a config has by one of these names."""
    for name in names:
        value = getattr(config, name, None)
        if type(value) is int:
            return value
    return default


def _tensor(name: str, shape: tuple[int, ...], config: Any) -> torch.Tensor:
    if name.endswith("input_ids"):
        most = _first(getattr(config, "text_config", config), "vocab_size", default=256)
        # special tokens may stand at the end
        return torch.randint(3, max(4, most - most // 4), shape)
    if name.endswith("mask"):
        return torch.ones(shape, dtype=torch.long)
    if name == "bbox":
        return torch.tensor([1, 2, 3, 4]).expand(shape).contiguous()
    if name == "position_ids":
        return torch.arange(shape[-1]).expand(shape).contiguous()
    return torch.randn(shape)

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
            return [
                item // factor
                if type(item) is int and item >= least and not _NO_WIDTH.search(key)
                else item
                for item in value
            ]
        if type(value) is not int or _LAYERS.fullmatch(key):
            return _shallow(key, value)
        if key == "vocab_size":
            return min(value, SMALL[key])
        return (
            value // factor
            if value >= 64 and value % factor == 0 and not _NO_WIDTH.search(key)
            else value
        )

    return rule


def _shallow(key: str, value: Any) -> Any:
    return min(value, 4) if type(value) is int and _LAYERS.fullmatch(key) else value


_RULES: tuple[Rule, ...] = (_by_name, _divided(16), _divided(4), _shallow)


def make(
    name: str, options: Namespace
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model called `name` (a class or a model type) and its example call. Raises InputError for an
    unknown one, and for one that no small config runs.
    """
    model, inputs = _made(_class(name), options)
    if "length" in options.given and not any(
        name.endswith("input_ids") for name in inputs
    ):
        raise InputError(
            f"--length is how many tokens a row has, and {type(model).__name__} reads none",
            hint="leave it out",
        )
    return model, (), {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _made(kind: Any, options: Namespace) -> tuple[Any, dict[str, torch.Tensor]]:
    given = settings(options.config)
    _check_names(kind.config_class, given)
    # a whole config, of any size: taken as it is, and not tried
    if "model_type" in given:
        model = _model(kind, _config(kind.config_class, given), options.meta)
        return model, next(_calls(model, options))
    why: Exception | None = None
    for rule in _RULES:
        try:
            config = _config(
                kind.config_class,
                _small(
                    kind.config_class().to_dict(),
                    rule,
                    kind.config_class.attribute_map,
                    given,
                ),
            )
            if (
                rule is not _by_name
                and sum(p.numel() for p in _model(kind, config, True).parameters())
                > _MOST
            ):
                continue
            model = _model(kind, config, options.meta)
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
        f"no small config of {kind.__name__} runs: {type(why).__name__}: {' '.join(str(why).split())[:200]}",
        hint="say what it needs with --config KEY=VALUE, or give a whole one: --config config.json",
    )


def _model(kind: Any, config: Any, meta: bool) -> Any:
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        return kind(config).eval()


def _failure(model: Any, inputs: dict[str, Any]) -> Exception | None:
    """The error that the model raises when it is called. On meta, an operation that only values can decide is
    no failure.
    """
    try:
        with torch.no_grad(), torch.device(next(model.parameters()).device):
            model(
                **{
                    name: tensor.to(next(model.parameters()).device)
                    for name, tensor in inputs.items()
                }
            )
    except NotImplementedError as error:
        return None if next(model.parameters()).is_meta else error
    except Exception as error:
        return (
            None if "meta" in str(error) and next(model.parameters()).is_meta else error
        )
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
    wanted = by_type.get(name, name)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    found = getattr(transformers, wanted, None) if wanted in dir(transformers) else None
    if not (
        isinstance(found, type)
        and issubclass(found, transformers.PreTrainedModel)
        and found.config_class
    ):
        classes = [
            n
            for n in dir(transformers)
            if n.endswith(("Model", "LM", "Generation", "Classification"))
        ]
        raise InputError(
            f"transformers has no architecture '{name}'",
            hint=nearest(name, [*classes, *by_type]),
        )
    return found


def _check_names(kind: Any, given: dict[str, Any]) -> None:
    default = kind()
    if unknown := [name for name in given if not hasattr(default, name)]:
        raise InputError(
            f"{kind.__name__} has no '{unknown[0]}'",
            hint=nearest(unknown[0], [n for n in vars(default) if n[0] != "_"]),
        )


def _config(kind: Any, data: dict[str, Any]) -> Any:
    made = kind(**data)
    made.use_cache = False  # a cache is state that no module holds
    return made


def _small(
    data: dict[str, Any], rule: Rule, aliases: dict[str, str], given: dict[str, Any]
) -> dict[str, Any]:
    """The settings of a config and of its parts: as given, else made small. Lists with an item for each layer
    have as many items as there are layers now.
    """
    real = {name: alias for alias, name in aliases.items() if alias in SMALL}
    given = {aliases.get(key, key): item for key, item in given.items()}
    data = {key: item for key, item in data.items() if key not in _FOLLOWS}
    made: dict[str, Any] = {}
    for key, item in data.items():
        made[key] = (
            _small(item, rule, {}, {})
            if isinstance(item, dict)
            else rule(real.get(key, str(key)), item)
        )
    made |= given
    layers = {
        data[key]: made[key]
        for key in data
        if type(data[key]) is int and _LAYERS.fullmatch(real.get(key, str(key)))
    }
    for key, item in data.items():
        # by the number of the layer
        if (
            isinstance(item, dict)
            and layers
            and item
            and all(str(place).isdigit() for place in item)
        ):
            made[key] = {
                place: made[key][place]
                for place in item
                if int(place) < min(layers.values())
            }
        if isinstance(item, list) and item and len(item) in layers and key not in given:
            made[key] = made[key][max(0, len(item) - layers[len(item)]) :]
    vocabulary = next(
        (
            part["vocab_size"]
            for part in (made, *_parts(made))
            if type(part.get("vocab_size")) is int
        ),
        None,
    )
    return (
        made
        if rule is _shallow or vocabulary is None
        else _tokens(made, vocabulary) | given
    )


def _parts(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (item for item in data.values() if isinstance(item, dict))


def _tokens(data: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Special tokens outside of the small vocabulary are moved into it: the common ones to its beginning,
    others to its end.
    """
    far = [
        key
        for key, item in data.items()
        if str(key).endswith(("token_id", "token_index"))
        and type(item) is int
        and item >= vocabulary
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
    taken, config = inspect.signature(model.forward).parameters, model.config
    needed = {
        n
        for n, p in taken.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    }
    needed |= {model.main_input_name} & taken.keys()
    needed |= (
        {"decoder_input_ids"} & taken.keys()
        if getattr(config, "is_encoder_decoder", False)
        else set()
    )
    more = {"pixel_values"} if hasattr(config, "vision_config") else set()
    more |= (
        {"input_features", "input_values"} if hasattr(config, "audio_config") else set()
    )
    for names in dict.fromkeys(
        [
            frozenset(needed | (more & taken.keys())),
            frozenset(needed),
            frozenset(needed | ({"bbox"} & taken.keys())),
        ]
    ):
        choices = {
            name: [*_shapes(name, config, options.batch, options.length)]
            for name in sorted(names)
        }
        if unknown := [name for name, found in choices.items() if not found]:
            raise InputError(
                f"what to pass as '{unknown[0]}' to {type(model).__name__} is not known",
                hint="write a file with a function that returns (module, args, kwargs): FILE.py:FACTORY",
            )
        for chosen in islice(product(*choices.values()), 8):
            torch.manual_seed(0)
            inputs = {
                name: _tensor(name, shape, config)
                for name, shape in zip(choices, chosen, strict=True)
            }
            yield from _with_images(model, inputs)
            yield inputs


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
            made = model.get_image_features(pixels.to(model.device))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return
    features = getattr(made, "pooler_output", made)
    tensors = [features] if isinstance(features, torch.Tensor) else list(features)
    rows = sum(t.numel() // t.shape[-1] for t in tensors) // len(pixels)
    yield inputs | {
        "input_ids": torch.cat([torch.full((len(ids), rows), token), ids], dim=1)
    }


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
    return next(
        (
            item
            for item in (getattr(config, name, None) for name in names)
            if type(item) is int
        ),
        default,
    )


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

"""`hf:NAME`: an architecture of transformers with random weights, from a small config or a given one, and inputs for it."""

from __future__ import annotations

import inspect
import math
from argparse import Namespace
from typing import Any

import torch
from torch import nn

from stagecut.ir.errors import InputError, nearest
from stagecut.tools.sources import settings

_SIZES = {
    64: "hidden_size d_model n_embd dim hidden_dim word_embed_proj_dim encoder_hidden_size projection_dim embedding_size",
    128: "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner moe_intermediate_size max_position_embeddings n_positions",
    256: "vocab_size",
    4: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers num_attention_heads n_head n_heads "
    "num_heads encoder_attention_heads decoder_attention_heads num_local_experts num_experts n_routed_experts",
    2: "num_key_value_heads",
    16: "head_dim d_kv",
    32: "image_size",
    8: "patch_size",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
"""What a config has by these names is made so small."""

IMAGE = 2
"""The token that stands for a part of an image where the vocabulary is too small for the usual one. No text that is drawn has it."""

_BY_HAND = "write a file with a function that returns (module, args, kwargs): FILE.py:FACTORY"


def make(name: str, options: Namespace) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model called `name` (a class or a model type) and its example call. Raises InputError for an unknown one."""
    kind = _class(name)
    config = _config(kind.config_class, settings(options.config))
    torch.manual_seed(0)
    with torch.device("meta" if options.meta else "cpu"):
        model = kind(config).eval()
    inputs = _inputs(model, options.batch, options.length)
    if "length" in options.given and not any(name.endswith("input_ids") for name in inputs):
        raise InputError(f"--length is how many tokens a row has, and {type(model).__name__} reads none", hint="leave it out")
    return model, (), {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _class(name: str) -> Any:
    try:
        import transformers
        from transformers.models.auto import modeling_auto
    except ImportError:
        raise InputError("hf: needs the package transformers", hint="pip install transformers") from None
    transformers.logging.set_verbosity_error()
    by_type = {**modeling_auto.MODEL_MAPPING_NAMES, **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    wanted = by_type.get(name, name)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    found = getattr(transformers, wanted, None) if wanted in dir(transformers) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.config_class):
        classes = [n for n in dir(transformers) if n.endswith(("Model", "LM", "Generation", "Classification"))]
        raise InputError(f"transformers has no architecture '{name}'", hint=nearest(name, [*classes, *by_type]))
    return found


def _config(kind: Any, given: dict[str, Any]) -> Any:
    """A config of class `kind`: as given, and small in what is not."""
    default = kind()
    small = {name: size for name, size in SMALL.items() if isinstance(getattr(default, name, None), int)} if not _whole(given) else {}
    parts = {name: _config(type(part), {}).to_dict() for name, part in vars(default).items() if hasattr(part, "to_dict")}
    if unknown := [name for name in given if not hasattr(default, name)]:
        raise InputError(f"{kind.__name__} has no '{unknown[0]}'", hint=nearest(unknown[0], [n for n in vars(default) if n[0] != "_"]))
    made = kind(**{**parts, **_tokens(default, small), **small, **given})
    made.use_cache = False  # a cache is state that no module holds
    if (getattr(made, "image_token_id", None) or 0) >= _vocabulary(made):
        made.image_token_id = IMAGE
    return made


def _vocabulary(config: Any) -> float:
    """How many tokens the text of a model has; no bound where that is not known."""
    size: float = getattr(getattr(config, "text_config", config), "vocab_size", math.inf)
    return size


def _whole(given: dict[str, Any]) -> bool:
    """True for a whole config file, which is taken as it is."""
    return "model_type" in given


def _tokens(default: Any, small: dict[str, Any]) -> dict[str, int]:
    """Special tokens that lie outside of the small vocabulary move into it."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    most = small.get("vocab_size")
    return {n: i for i, n in enumerate(names) if most and isinstance(getattr(default, n, None), int) and getattr(default, n) >= most}


def _inputs(model: Any, batch: int, length: int) -> dict[str, Any]:
    """Random inputs for what the model's forward asks for. Raises InputError where that is not known."""
    taken = inspect.signature(model.forward).parameters
    config = model.config
    text, vision = (getattr(config, f"{part}_config", config) for part in ("text", "vision"))
    wanted = {model.main_input_name} | ({"pixel_values"} if vision is not config else set())
    wanted |= {"decoder_input_ids"} if getattr(config, "is_encoder_decoder", False) else set()
    found: dict[str, Any] = {}
    for name in wanted & taken.keys():
        if name in ("input_ids", "decoder_input_ids"):
            found[name] = torch.randint(3, text.vocab_size, (batch, length))
        elif name == "pixel_values" and isinstance(getattr(vision, "image_size", 64), int):
            size = getattr(vision, "image_size", 64)
            found[name] = torch.randn(batch, getattr(vision, "num_channels", 3), size, size)
        elif name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
            found[name] = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions)
        else:
            raise InputError(
                f"what to pass as '{name}' to {type(model).__name__} is not known",
                hint=_BY_HAND,
            )
    if {"input_ids", "pixel_values"} <= found.keys() and getattr(config, "image_token_id", None) is not None:
        found["input_ids"] = _with_images(model, found["input_ids"], found["pixel_values"])
    return dict(sorted(found.items()))


def _with_images(model: Any, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """The ids of each row behind those of its image: a model checks that there is one for each row of features of the image."""
    try:
        with torch.no_grad():
            made = model.get_image_features(pixels.to(model.device))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"what {type(model).__name__} wants to know of its images is not known: {error}", hint=_BY_HAND) from None
    features = getattr(made, "pooler_output", made)
    tensors = [features] if isinstance(features, torch.Tensor) else list(features)
    rows = sum(t.numel() // t.shape[-1] for t in tensors) // len(pixels)
    token = model.config.image_token_id
    return torch.cat([torch.full((len(ids), rows), token), torch.where(ids == token, token - 1, ids)], dim=1)

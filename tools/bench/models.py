"""Models at the sizes they are trained at, on the meta device: what the comparison of ways to balance is made
with.

The sizes are those of the published configurations, written out: nothing is downloaded. A model is in train
mode and float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn


class Example(NamedTuple):
    """A model on the meta device, one micro-batch for it, and the paths of its layers in the order they run
    in.

    The layers are those that a person would count to cut the model by hand: blocks, without embeddings, stem
    and head.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layers: list[str]


def _hugging(
    name: str, inputs: dict[str, torch.Tensor], layers: list[str], **config: Any
) -> Example:
    """The class `name` of transformers with this config."""
    import transformers

    cls = getattr(transformers, name)
    with torch.device("meta"):
        model: nn.Module = cls(cls.config_class(**config))
    return Example(model, (), dict(inputs), layers)


def _tokens(length: int) -> torch.Tensor:
    return torch.empty(1, length, dtype=torch.long, device="meta")


def _images(batch: int, size: int) -> torch.Tensor:
    return torch.empty(batch, 3, size, size, device="meta")


def _numbered(path: str, count: int) -> list[str]:
    return [f"{path}.{index}" for index in range(count)]


def _nested(outer: str, inner: str, depths: Sequence[int]) -> list[str]:
    return [
        path
        for index, depth in enumerate(depths)
        for path in _numbered(f"{outer}.{index}.{inner}", depth)
    ]


def _gpt2(width: int, layers: int, heads: int) -> Example:
    return _hugging(
        "GPT2LMHeadModel",
        {"input_ids": _tokens(1024)},
        _numbered("transformer.h", layers),
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        use_cache=False,
    )


def _decoder(
    name: str,
    width: int,
    inner: int,
    layers: int,
    heads: int,
    groups: int,
    vocabulary: int,
    **config: Any,
) -> Example:
    return _hugging(
        name,
        {"input_ids": _tokens(2048)},
        _numbered("model.layers", layers),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        use_cache=False,
        **config,
    )


def _t5(width: int, inner: int, layers: int, heads: int) -> Example:
    """Version 1.1, whose head is no copy of the embedding; transformers 5 ties the two even when the config
    does not.
    """
    example = _hugging(
        "T5ForConditionalGeneration",
        {"input_ids": _tokens(512), "decoder_input_ids": _tokens(128)},
        _numbered("encoder.block", layers) + _numbered("decoder.block", layers),
        d_model=width,
        d_ff=inner,
        d_kv=64,
        num_layers=layers,
        num_heads=heads,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        use_cache=False,
    )
    example.model.lm_head = nn.Linear(width, 32128, bias=False, device="meta")
    return example


def _whisper(width: int, layers: int, heads: int) -> Example:
    frames = torch.empty(1, 80, 3000, device="meta")
    return _hugging(
        "WhisperForConditionalGeneration",
        {"input_features": frames, "decoder_input_ids": _tokens(128)},
        _numbered("model.encoder.layers", layers)
        + _numbered("model.decoder.layers", layers),
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        vocab_size=51865,
        num_mel_bins=80,
        use_cache=False,
    )


def _vit(width: int, layers: int, heads: int, patch: int) -> Example:
    return _hugging(
        "ViTForImageClassification",
        {"pixel_values": _images(8, 224)},
        _numbered("vit.layers", layers),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=224,
        num_labels=1000,
    )


def _swin(width: int, depths: Sequence[int], heads: Sequence[int]) -> Example:
    """The model was called once, because the first call sets the shift of the last blocks, where one window
    is the whole image, to 0 for good.
    """
    example = _hugging(
        "SwinForImageClassification",
        {"pixel_values": _images(8, 224)},
        _nested("swin.encoder.layers", "blocks", depths),
        embed_dim=width,
        depths=list(depths),
        num_heads=list(heads),
        window_size=7,
        image_size=224,
        num_labels=1000,
    )
    with torch.no_grad():
        example.model(**example.kwargs)
    return example


def _resnet(depths: Sequence[int]) -> Example:
    return _hugging(
        "ResNetForImageClassification",
        {"pixel_values": _images(16, 224)},
        _nested("resnet.encoder.stages", "layers", depths),
        depths=list(depths),
        hidden_sizes=[256, 512, 1024, 2048],
        layer_type="bottleneck",
        num_labels=1000,
    )


def _unet(width: int, levels: int) -> Example:
    layers = [*_numbered("down", levels - 1), "middle", *_numbered("up", levels - 1)]
    with torch.device("meta"):
        return Example(UNet(width, levels), (_images(4, 512),), {}, layers)


class UNet(nn.Module):
    """A UNet as first published, but padded and with BatchNorm: each level halves the image and doubles the
    channels.
    """

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(
            _double(given, made)
            for given, made in zip([3, *widths], widths[:-1], strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.middle = _double(widths[-2], widths[-1])
        self.up = nn.ModuleList(Up(made) for made in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for block in self.down:
            skips.append(block(x))
            x = self.pool(skips[-1])
        x = self.middle(x)
        for block in self.up:
            x = block(x, skips.pop())
        return self.head(x)  # type: ignore[no-any-return]


class Up(nn.Module):
    """Twice the size, half the channels, joined with the result of the level going down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lift = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.convs = _double(2 * width, width)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.convs(torch.cat([skip, self.lift(x)], dim=1))  # type: ignore[no-any-return]


def _double(given: int, made: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(given, made, 3, padding=1, bias=False),
        nn.BatchNorm2d(made),
        nn.ReLU(inplace=True),
        nn.Conv2d(made, made, 3, padding=1, bias=False),
        nn.BatchNorm2d(made),
        nn.ReLU(inplace=True),
    )


_llama = partial(
    _decoder,
    "LlamaForCausalLM",
    vocabulary=128256,
    bos_token_id=128000,
    eos_token_id=128001,
)

MODELS: dict[str, Callable[[], Example]] = {
    "GPT-2 XL": lambda: _gpt2(1600, 48, 25),
    "Llama 8B": lambda: _llama(4096, 14336, 32, 32, 8),
    "Llama 70B": lambda: _llama(8192, 28672, 80, 64, 8),
    "Llama 405B": lambda: _llama(16384, 53248, 126, 128, 8),
    "Gemma 7B": lambda: _decoder(
        "GemmaForCausalLM", 3072, 24576, 28, 16, 16, 256000, head_dim=256
    ),
    "Mixtral 8x7B": lambda: _decoder(
        "MixtralForCausalLM",
        4096,
        14336,
        32,
        32,
        8,
        32000,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "T5-XL": lambda: _t5(2048, 5120, 24, 32),
    "Whisper-large": lambda: _whisper(1280, 32, 20),
    "ViT-H/14": lambda: _vit(1280, 32, 16, 14),
    "Swin-L": lambda: _swin(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    "ResNet-152": lambda: _resnet((3, 8, 36, 3)),
    "UNet": lambda: _unet(64, 5),
}

"""Vision-language models at small sizes: three prompts, each with one picture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from zoo.models import Architecture, Inputs

IMAGE, ROWS = 90, 3
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EYE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "image_size": 16,
    "patch_size": 8,
}
FINE = EYE | {"patch_size": 4}
CLIP = EYE | {"model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = EYE | {"model_type": "siglip_vision_model"}
QWEN_EYE: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
OPT: dict[str, Any] = TEXT | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
TOKEN = {"image_token_index": IMAGE}
ID = {"image_token_id": IMAGE}
QWEN_IDS = ID | {"video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
GLM_IDS = ID | {
    "video_token_id": 91,
    "image_start_token_id": 92,
    "image_end_token_id": 93,
    "video_start_token_id": 94,
    "video_end_token_id": 95,
}
TILED = {"image_grid_pinpoints": [[16, 16]]}


def text(kind: str, **others: Any) -> dict[str, Any]:
    """The config of a decoder of that type."""
    return TEXT | {"model_type": kind} | others


def rope(**others: Any) -> dict[str, Any]:
    """Positions in three dims."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **others}}


def pixels(*shape: int) -> torch.Tensor:
    """Pictures, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def prompts(places: int, around: tuple[int, ...] = ()) -> Inputs:
    """Three prompts, two of them padded on the left, with so many places for the parts of a picture."""
    torch.manual_seed(1)
    body = torch.tensor([*around[:1], *[IMAGE] * places, *around[1:]], dtype=torch.long)
    ids = torch.cat([torch.randint(5, 80, (ROWS, 2)), body.expand(ROWS, -1), torch.randint(5, 80, (ROWS, 3))], 1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[1, :1] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def seen(*shape: int, places: int = 4, marks: str = "", **others: Any) -> Inputs:
    """Prompts and pictures of that shape each; `marks` names an input that says where the places are."""
    inputs = prompts(places) | {"pixel_values": pixels(ROWS, *(shape or (3, 16, 16)))} | others
    if marks:
        inputs[marks] = (inputs["input_ids"] == IMAGE).long()
    return inputs


def tiled() -> Inputs:
    """Each picture as a whole and as one tile."""
    return seen(2, 3, 16, 16, places=10, image_sizes=torch.tensor([[16, 16]] * ROWS))


def grids() -> Inputs:
    """Pictures as rows of patches."""
    inputs = prompts(4, around=(92, 93)) | {"image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS), "pixel_values": pixels(ROWS * 16, 96)}
    return inputs | {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}


def crossed() -> Inputs:
    """Pictures that some layers look at."""
    ones = torch.ones(ROWS, 1, dtype=torch.long)
    inputs = seen(1, 1, 3, 16, 16, places=1, aspect_ratio_ids=ones, aspect_ratio_mask=ones[..., None])
    return inputs | {"cross_attention_mask": torch.ones(*inputs["input_ids"].shape, 1, 1, dtype=torch.long)}


def _model(name: str, inputs: Any, decoder: Mapping[str, Any], eye: Mapping[str, Any], **others: Any) -> Architecture:
    config = {"text_config": dict(decoder), "vision_config": dict(eye), **others}
    return Architecture(f"{name}ForConditionalGeneration", "vision-language", inputs, config)


VISION: list[Architecture] = [
    _model("Llava", seen, text("llama"), CLIP, **TOKEN),
    _model("VipLlava", seen, text("llama"), CLIP, vision_feature_layers=[-1, -2], **TOKEN),
    _model("LlavaNext", tiled, text("llama"), CLIP, **TOKEN, **TILED),
    _model("LlavaOnevision", tiled, text("qwen2"), SIGLIP, video_token_index=91, vision_feature_layer=-1, **TOKEN, **TILED),
    _model(
        "VideoLlava",
        lambda: (given := seen()) | {"pixel_values_images": given.pop("pixel_values")},
        text("llama"),
        CLIP,
        video_token_index=91,
        image_seq_length=4,
        **TOKEN,
    ),
    _model(
        "PaliGemma", seen, text("gemma", head_dim=8), SIGLIP | {"projection_dim": 32, "vision_use_head": False}, projection_dim=32, **TOKEN
    ),
    _model(
        "Gemma3",
        partial(seen, marks="token_type_ids"),
        text("gemma3_text", head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        SIGLIP | {"vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=91,
        eoi_token_index=92,
        **TOKEN,
    ),
    _model("Qwen2VL", grids, text("qwen2_vl_text", **rope()), QWEN_EYE | {"embed_dim": 32, "mlp_ratio": 2}, **QWEN_IDS),
    _model(
        "Qwen2_5_VL", grids, text("qwen2_5_vl_text", **rope()), QWEN_EYE | {"window_size": 16, "fullatt_block_indexes": [1]}, **QWEN_IDS
    ),
    _model(
        "Qwen3VL",
        grids,
        text("qwen3_vl_text", head_dim=8, **rope(mrope_interleaved=True)),
        QWEN_EYE | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **QWEN_IDS,
    ),
    _model("Glm4v", grids, text("glm4v_text", **rope(partial_rotary_factor=1.0)), QWEN_EYE | {"image_size": 16}, **GLM_IDS),
    _model(
        "Idefics2",
        partial(seen, 1, 3, 16, 16),
        text("mistral", sliding_window=None),
        EYE,
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        **ID,
    ),
    _model("Idefics3", partial(seen, 1, 3, 16, 16), text("llama"), FINE, scale_factor=2, **ID),
    _model("SmolVLM", partial(seen, 1, 3, 16, 16), text("llama"), FINE, scale_factor=2, **ID),
    _model("InternVL", seen, text("qwen2"), FINE | {"image_size": [16, 16], "patch_size": [4, 4]}, downsample_ratio=0.5, **ID),
    _model(
        "AyaVision",
        seen,
        text("cohere2", sliding_window=8),
        SIGLIP | {"patch_size": 4},
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
        vision_feature_layer=-1,
        **TOKEN,
    ),
    _model(
        "Cohere2Vision",
        seen,
        text("cohere2", sliding_window=8),
        SIGLIP | {"patch_size": 4},
        downsample_factor=2,
        alignment_intermediate_size=64,
        **ID,
    ),
    _model(
        "Mistral3",
        partial(seen, image_sizes=torch.tensor([[16, 16]] * ROWS)),
        text("mistral", sliding_window=None),
        FINE | {"model_type": "pixtral", "head_dim": 8},
        spatial_merge_size=2,
        vision_feature_layer=-1,
        **TOKEN,
    ),
    _model(
        "GotOcr2",
        partial(seen, 3, 64, 64, places=1),
        text("qwen2"),
        EYE | {"output_channels": 32, "image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48},
        **TOKEN,
    ),
    Architecture(
        "ChameleonForConditionalGeneration",
        "vision-language",
        partial(seen, places=64),
        TEXT
        | {
            "vq_config": {
                "embed_dim": 16,
                "num_embeddings": 20,
                "latent_channels": 16,
                "resolution": 16,
                "base_channels": 32,
                "channel_multiplier": [1, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [],
            },
            "vocabulary_map": {"<image>": IMAGE} | {f"IMGIMG{chr(65 + n // 10)}{chr(65 + n % 10)}Z": 20 + n for n in range(20)},
        },
    ),
    _model(
        "Mllama",
        crossed,
        text(
            "mllama_text_model",
            num_hidden_layers=4,
            cross_attention_layers=[1, 3],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "attention_heads": 4,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "image_size": 16,
            "patch_size": 8,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
        **TOKEN,
    ),
    _model(
        "Llama4",
        seen,
        text("llama4_text", head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8),
        FINE
        | {
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "pixel_shuffle_ratio": 0.5,
        },
        boi_token_index=91,
        eoi_token_index=92,
        **TOKEN,
    ),
    _model(
        "Lfm2Vl",
        partial(seen, 16, 48, spatial_shapes=torch.tensor([[4, 4]] * ROWS), pixel_attention_mask=torch.ones(ROWS, 16, dtype=torch.long)),
        text("lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8),
        FINE | {"model_type": "siglip2_vision_model", "num_patches": 16, "vision_use_head": False},
        downsample_factor=2,
        projector_hidden_size=32,
        **ID,
    ),
    _model(
        "Aria",
        seen,
        text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        EYE | {"model_type": "idefics3_vision"},
        projector_patch_to_query_dict={4: 4},
        **TOKEN,
    ),
    Architecture(
        "FuyuForCausalLM",
        "vision-language",
        lambda: prompts(4) | {"image_patches": pixels(ROWS, 4, 48)},
        TEXT | ID | {"text_config": text("persimmon"), "image_size": 16, "patch_size": 4},
    ),
    _model("DeepseekVL", seen, text("llama"), SIGLIP | {"vision_use_head": False}, **ID),
    _model(
        "Janus",
        seen,
        text("llama"),
        EYE | {"projection_dim": 32, "mlp_ratio": 2.0},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 20,
            "latent_channels": 32,
            "image_token_embed_dim": 32,
            "projection_dim": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 4,
        },
        **ID,
    ),
    Architecture(
        "GitForCausalLM", "vision-language", partial(seen, places=0), TEXT | {"vision_config": EYE, "max_position_embeddings": 64}
    ),
    _model(
        "Florence2",
        partial(seen, 3, 64, 64, places=5),
        {
            "model_type": "bart",
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "vocab_size": 100,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "max_position_embeddings": 64,
        },
        {
            "embed_dim": [16, 16, 32, 32],
            "num_heads": [2, 2, 4, 4],
            "num_groups": [2, 2, 4, 4],
            "depths": [1, 1, 1, 1],
            "projection_dim": 32,
            "window_size": 4,
            "max_position_embeddings": 50,
        },
        **ID,
    ),
    _model("Blip2", seen, OPT, EYE, qformer_config=EYE | {"encoder_hidden_size": 32, "vocab_size": 50}, num_query_tokens=4, **TOKEN),
    _model(
        "InstructBlip",
        partial(seen, qformer_input_ids=torch.arange(5, 10).repeat(ROWS, 1)),
        OPT,
        EYE,
        qformer_config=EYE | {"encoder_hidden_size": 32, "vocab_size": 100},
        num_query_tokens=4,
        **TOKEN,
    ),
    _model(
        "Kosmos2",
        partial(seen, marks="image_embeds_position_mask"),
        {
            "embed_dim": 32,
            "ffn_dim": 48,
            "attention_heads": 4,
            "layers": 2,
            "vocab_size": 100,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
        EYE,
        latent_query_num=4,
    ),
]

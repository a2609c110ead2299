"""The zoo: architectures of every family at small sizes with random weights.

Most are classes of `transformers`, by name; those of family "unet" are written by hand in `nets.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from zoo import nets

Inputs = dict[str, Any]
_BATCH, _LENGTH, _VOCABULARY, _PIXELS = 2, 16, 100, 32


@dataclass(frozen=True)
class Place:
    """Where models run, and in which type of numbers; None leaves them in theirs."""

    device: str = "cpu"
    dtype: torch.dtype | None = None

    def put(self, inputs: Inputs) -> Inputs:
        """The inputs there, whole numbers as they are."""
        moved: Inputs = tree_map_only(torch.Tensor, self._moved, inputs)
        return moved

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)


HERE = Place()
"""The CPU, in the types of the models."""


@dataclass(frozen=True)
class Architecture:
    """A model class by name, the family it belongs to, example keyword arguments, its config, the modes that can be trained,
    modules to keep whole (they define their own backward), and whether it must be called once before, for its first call changes it.

    `name` may end in a variant: "FalconForCausalLM alibi". A config key whose value is `...` is left out.
    """

    name: str
    family: str
    inputs: Callable[[], Inputs]
    config: Mapping[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = ("eval", "train")
    leaves: tuple[str, ...] = ()
    warm: bool = False

    def make(self) -> nn.Module:
        """A new model with random weights, in train mode."""
        name = self.name.partition(" ")[0]
        if self.family == "unet":
            return getattr(nets, name)(**self.config).train()  # type: ignore[no-any-return]
        import transformers

        transformers.logging.set_verbosity_error()
        cls = getattr(transformers, name)
        config = cls.config_class(**{key: deepcopy(value) for key, value in self.config.items() if value is not ...})
        config._attn_implementation = self.config.get("attn_implementation", "sdpa" if cls._supports_sdpa else "eager")
        return cls(config).train()


def tokens(length: int = _LENGTH) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(5, _VOCABULARY, (_BATCH, length))


def _causal() -> Inputs:
    return {"input_ids": tokens(), "labels": tokens()}


def _plain() -> Inputs:
    return {"input_ids": tokens(), "labels": tokens()}


def _uncached() -> Inputs:
    return {"input_ids": tokens(), "labels": tokens(), "use_cache": False}


def _brief() -> Inputs:
    """For what takes one token after the other: its trace is as long as they are."""
    return {"input_ids": tokens(5), "labels": tokens(5)}


def _padded() -> Inputs:
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.long)
    mask[1, _LENGTH // 2 :] = 0
    return {"input_ids": tokens(), "attention_mask": mask, "labels": tokens()}


def _classified() -> Inputs:
    return {"input_ids": tokens(), "labels": torch.tensor([0, 1])}


def _translated() -> Inputs:
    mask = torch.ones(_BATCH, _LENGTH, dtype=torch.long)
    return {"input_ids": tokens(), "attention_mask": mask, "decoder_input_ids": tokens(12), "labels": tokens(12)}


def _boxed() -> Inputs:
    return _padded() | {"bbox": torch.arange(_BATCH * _LENGTH * 4).view(_BATCH, _LENGTH, 4) % 60}


def _image() -> Inputs:
    return _pixels() | {"labels": torch.tensor([0, 1])}


def _large() -> Inputs:
    return _pixels(64) | {"labels": torch.tensor([0, 1])}


def _pixels(size: int = _PIXELS) -> Inputs:
    return {"pixel_values": torch.randn(_BATCH, 3, size, size)}


def _segmented() -> Inputs:
    return _pixels() | {"labels": torch.randint(0, 2, (_BATCH, _PIXELS, _PIXELS))}


def _waved() -> Inputs:
    return {"input_values": torch.randn(_BATCH, 800), "labels": torch.tensor([0, 1])}


def _spectral() -> Inputs:
    return {"input_values": torch.randn(_BATCH, 32, 16)}


def _transcribed() -> Inputs:
    return {"input_features": torch.randn(_BATCH, 16, 32), "labels": tokens(12)}


def _spoken() -> Inputs:
    return {"input_features": torch.randn(_BATCH, 32, 16), "labels": tokens(12)}


def _paired() -> Inputs:
    return _pictured() | {"return_loss": True}


def _captioned() -> Inputs:
    return _pictured() | {"labels": tokens()}


def _pictured() -> Inputs:
    return {"input_ids": tokens()} | _pixels()


_TEXT: Inputs = {
    "vocab_size": _VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = _TEXT | {"num_key_value_heads": 2, "head_dim": 8}
_SEQ2SEQ: Inputs = {
    "vocab_size": _VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
_T5: Inputs = {
    "vocab_size": _VOCABULARY, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
_VISION: Inputs = {
    "image_size": _PIXELS, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_channels": 3,
}  # fmt: skip
_WAVE: Inputs = _TEXT | {
    "conv_dim": (16, 16, 16), "conv_kernel": (5, 3, 3), "conv_stride": (4, 2, 2), "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0, "apply_spec_augment": False, "classifier_proj_size": 16,
}  # fmt: skip
_SMALL_TEXT = _TEXT | {"num_hidden_layers": 2}
_SMALL_VISION = _VISION | {"num_hidden_layers": 2}
_EXPERTS: Inputs = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _decoder(name: str, inputs: Callable[[], Inputs] = _causal, **config: Any) -> Architecture:
    return Architecture(name, "decoder", inputs, _GROUPED | config)


def _moe(name: str, **config: Any) -> Architecture:
    return Architecture(name, "moe", _causal, _GROUPED | _EXPERTS | config)


def _recurrent(name: str, inputs: Callable[[], Inputs] = _causal, **config: Any) -> Architecture:
    return Architecture(name, "recurrent", inputs, _GROUPED | config)


def _encoder(name: str, inputs: Callable[[], Inputs] = _padded, **config: Any) -> Architecture:
    return Architecture(name, "encoder", inputs, _TEXT | config)


def _seq2seq(name: str, inputs: Callable[[], Inputs] = _translated, **config: Any) -> Architecture:
    return Architecture(name, "encoder-decoder", inputs, _SEQ2SEQ | config)


def _t5(name: str, **config: Any) -> Architecture:
    return Architecture(name, "encoder-decoder", _translated, _T5 | config)


def _vision(name: str, inputs: Callable[[], Inputs] = _image, **config: Any) -> Architecture:
    return Architecture(name, "vision", inputs, _VISION | config)


def _conv(name: str, inputs: Callable[[], Inputs] = _image, **config: Any) -> Architecture:
    return Architecture(name, "vision", inputs, {"num_channels": 3} | config)


def _audio(name: str, inputs: Callable[[], Inputs] = _waved, **config: Any) -> Architecture:
    return Architecture(name, "audio", inputs, _WAVE | config)


def _towers(name: str, text: Inputs | None = None, vision: Inputs | None = None, **config: Any) -> Architecture:
    both = {"text_config": _SMALL_TEXT | (text or {}), "vision_config": _SMALL_VISION | (vision or {}), "projection_dim": 16}
    return Architecture(name, "multimodal", _paired, both | config)


def _unet(name: str, shape: tuple[int, ...], **config: Any) -> Architecture:
    return Architecture(name, "unet", lambda: {"x": torch.randn(shape)}, config)


ARCHITECTURES = (
    _decoder("LlamaForCausalLM"),
    _decoder("LlamaForCausalLM no cache", _uncached),
    _decoder("LlamaForCausalLM eager", attn_implementation="eager"),
    _decoder("MistralForCausalLM", sliding_window=8),
    _decoder("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=8, max_window_layers=2),
    _decoder("Qwen3ForCausalLM"),
    _decoder("GemmaForCausalLM"),
    _decoder("Gemma2ForCausalLM", sliding_window=8, query_pre_attn_scalar=8),
    _decoder("Gemma3ForCausalLM", sliding_window=8, query_pre_attn_scalar=8),
    _decoder("Gemma3nForCausalLM", vocab_size_per_layer_input=_VOCABULARY, hidden_size_per_layer_input=8, num_kv_shared_layers=2,
             layer_types=["sliding_attention", "full_attention"] * 2, laurel_rank=8, intermediate_size=[64] * 4, sliding_window=8,
             activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0]),
    _decoder("PhiForCausalLM"),
    _decoder("Phi3ForCausalLM"),
    _decoder("GPT2LMHeadModel"),
    _decoder("GPTNeoForCausalLM", _causal, attention_types=[[["global", "local"], 2]], window_size=8),
    _decoder("GPTNeoXForCausalLM"),
    _decoder("GPTJForCausalLM", rotary_dim=4, n_inner=64),
    _decoder("GPTBigCodeForCausalLM"),
    _decoder("OPTForCausalLM", ffn_dim=64, word_embed_proj_dim=16),
    _decoder("BloomForCausalLM"),
    _decoder("FalconForCausalLM", head_dim=..., alibi=False),
    _decoder("FalconForCausalLM alibi", head_dim=..., alibi=True, new_decoder_architecture=False, multi_query=False, parallel_attn=False),
    _decoder("MptForCausalLM", d_model=32, n_heads=4, n_layers=4, max_seq_len=64, expansion_ratio=2),
    _decoder("StableLmForCausalLM"),
    _decoder("OlmoForCausalLM"),
    _decoder("Olmo2ForCausalLM"),
    _decoder("Olmo3ForCausalLM", sliding_window=8),
    _decoder("CohereForCausalLM"),
    _decoder("Cohere2ForCausalLM", sliding_window=8),
    _decoder("Starcoder2ForCausalLM"),
    _decoder("GraniteForCausalLM"),
    _decoder("PersimmonForCausalLM"),
    _decoder("CodeGenForCausalLM", rotary_dim=4, n_inner=64),
    _decoder("XGLMForCausalLM", d_model=32, num_layers=4, attention_heads=4, ffn_dim=64),
    _decoder("BioGptForCausalLM"),
    _decoder("NemotronForCausalLM"),
    _decoder("GlmForCausalLM"),
    _decoder("Glm4ForCausalLM"),
    _decoder("SmolLM3ForCausalLM"),
    _decoder("DiffLlamaForCausalLM"),
    _decoder("HeliumForCausalLM"),
    _decoder("ModernBertDecoderForCausalLM", local_attention=8),
    _decoder("CTRLLMHeadModel", dff=64),
    _decoder("OpenAIGPTLMHeadModel", _plain),
    _decoder("XLNetLMHeadModel", _plain, max_position_embeddings=..., d_head=8, d_inner=64),
    _decoder("NanoChatForCausalLM"),
    _moe("MixtralForCausalLM"),
    _moe("Qwen2MoeForCausalLM", shared_expert_intermediate_size=16),
    _moe("Qwen3MoeForCausalLM"),
    _moe("OlmoeForCausalLM"),
    _moe("PhimoeForCausalLM"),
    _moe("GraniteMoeForCausalLM"),
    _moe("GptOssForCausalLM", sliding_window=8),
    _moe("DbrxForCausalLM", d_model=32, n_heads=4, n_layers=4, max_seq_len=64,
         attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
         ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}),
    _moe("DeepseekV2ForCausalLM", head_dim=..., num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
         qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1,
         first_k_dense_replace=1),
    _moe("DeepseekV3ForCausalLM", head_dim=..., num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
         qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1,
         first_k_dense_replace=1),
    _moe("JetMoeForCausalLM", kv_channels=8),
    _moe("Glm4MoeForCausalLM", n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1),
    _recurrent("MambaForCausalLM", _brief, state_size=4),
    _recurrent("Mamba2ForCausalLM", state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    _recurrent("FalconMambaForCausalLM", _brief, state_size=4),
    _recurrent("RecurrentGemmaForCausalLM", lru_width=32, attention_window_size=8),
    replace(_recurrent("RwkvForCausalLM", context_length=64, attention_hidden_size=32, use_cache=False), warm=True),  # no backward with one
    _recurrent("JambaForCausalLM", mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False, num_experts=2, attn_layer_period=2,
               attn_layer_offset=1),
    _recurrent("BambaForCausalLM", mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8, attn_layer_indices=[1]),
    _recurrent("Zamba2ForCausalLM", mamba_d_state=8, n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=1, chunk_size=8,
               layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], use_mamba_kernels=False),
    _recurrent("Qwen3NextForCausalLM", **_EXPERTS, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
               linear_num_value_heads=4, shared_expert_intermediate_size=16),
    _recurrent("Lfm2ForCausalLM", full_attn_idxs=[1, 3], block_multiple_of=16),
    _encoder("BertForMaskedLM"),
    _encoder("BertForSequenceClassification", _classified),
    _encoder("RobertaForMaskedLM"),
    _encoder("ElectraForMaskedLM", embedding_size=16),
    _encoder("AlbertForMaskedLM", embedding_size=16),
    _encoder("AlbertForMaskedLM groups", embedding_size=16, num_hidden_groups=2),
    _encoder("DistilBertForMaskedLM", dim=32, hidden_dim=64, n_layers=4, n_heads=4),
    _encoder("DebertaForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16),
    _encoder("DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, share_att_key=True,
             norm_rel_ebd="layer_norm", conv_kernel_size=3),
    _encoder("MPNetForMaskedLM"),
    _encoder("FNetForMaskedLM", _plain),
    _encoder("FunnelForMaskedLM", num_hidden_layers=..., block_sizes=[2, 2], num_decoder_layers=2, d_model=32, n_head=4, d_head=8,
             d_inner=64),
    _encoder("ConvBertForMaskedLM", embedding_size=16, conv_kernel_size=3),
    _encoder("SqueezeBertForMaskedLM", embedding_size=32),
    _encoder("LayoutLMForMaskedLM", _boxed, max_2d_position_embeddings=64),
    _encoder("MobileBertForMaskedLM", embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=2),
    _encoder("LongformerForMaskedLM", attention_window=[4, 4, 4, 4]),
    _encoder("BigBirdForMaskedLM", attention_type="original_full"),
    _encoder("BigBirdForMaskedLM sparse", attention_type="block_sparse", block_size=2, num_random_blocks=1),
    _encoder("NystromformerForMaskedLM", num_landmarks=16, segment_means_seq_len=16),
    _encoder("ModernBertForMaskedLM", local_attention=8),
    _encoder("EsmForMaskedLM", mask_token_id=4, position_embedding_type="rotary"),
    _encoder("RoFormerForMaskedLM", embedding_size=16),
    _encoder("XLMWithLMHeadModel", emb_dim=32, n_layers=4, n_heads=4),
    _encoder("FlaubertWithLMHeadModel", emb_dim=32, n_layers=4, n_heads=4),
    _encoder("RemBertForMaskedLM", input_embedding_size=16, output_embedding_size=16),
    _encoder("MegatronBertForMaskedLM"),
    _encoder("IBertForMaskedLM", quant_mode=False),
    _encoder("CanineForSequenceClassification", _classified, downsampling_rate=2, num_hash_functions=2, num_hash_buckets=16,
             local_transformer_stride=4),
    Architecture("YosoForMaskedLM", "encoder", _padded, _TEXT | {"use_expectation": True, "hash_code_len": 4, "num_hash": 4},
                 leaves=tuple(f"yoso.encoder.layer.{i}.attention.self" for i in range(4))),
    Architecture("ReformerForMaskedLM", "encoder", _plain, _TEXT | {
        "attn_layers": ["local"] * 4, "axial_pos_shape": (4, 4), "local_attn_chunk_length": 4, "axial_pos_embds_dim": (16, 16),
        "attention_head_size": 8, "feed_forward_size": 64, "is_decoder": False, "hash_seed": 0,
        "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0}, ("train",), ("reformer.encoder",)),
    _encoder("PerceiverForMaskedLM", max_position_embeddings=_LENGTH, d_model=32, num_latents=8, d_latents=16, num_blocks=1,
             num_self_attends_per_block=4, num_self_attention_heads=2, num_cross_attention_heads=2, qk_channels=16, v_channels=16),
    _t5("T5ForConditionalGeneration"),
    _t5("MT5ForConditionalGeneration"),
    _t5("UMT5ForConditionalGeneration"),
    _t5("LongT5ForConditionalGeneration", local_radius=4, encoder_attention_type="transient-global", global_block_size=4),
    _t5("SwitchTransformersForConditionalGeneration", num_experts=4, expert_capacity=16, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1),
    _seq2seq("BartForConditionalGeneration"),
    _seq2seq("MBartForConditionalGeneration"),
    _seq2seq("PegasusForConditionalGeneration"),
    _seq2seq("PegasusXForConditionalGeneration", block_size=4, num_global_tokens=4),
    _seq2seq("MarianMTModel"),
    _seq2seq("BlenderbotForConditionalGeneration"),
    _seq2seq("LEDForConditionalGeneration", attention_window=4, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
    _seq2seq("M2M100ForConditionalGeneration", encoder_layerdrop=0.0, decoder_layerdrop=0.0),
    _seq2seq("M2M100ForConditionalGeneration layerdrop", use_cache=False),  # in its cache each call leaves out other layers
    _seq2seq("ProphetNetForConditionalGeneration", encoder_layers=..., decoder_layers=..., hidden_size=32, num_encoder_layers=2,
             num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4, ngram=2, disable_ngram_loss=False),
    _seq2seq("FSMTForConditionalGeneration", langs=["en", "de"], src_vocab_size=_VOCABULARY, tgt_vocab_size=_VOCABULARY),
    _seq2seq("WhisperForConditionalGeneration", _transcribed, num_mel_bins=16, max_source_positions=16, max_target_positions=32),
    _vision("ViTForImageClassification"),
    _vision("DeiTForImageClassification"),
    _vision("BeitForImageClassification"),
    _vision("BeitForImageClassification relative", use_relative_position_bias=True, use_shared_relative_position_bias=False,
            use_absolute_position_embeddings=True),
    _vision("Dinov2ForImageClassification"),
    _vision("ViTMAEForPreTraining", _pixels, decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
            decoder_intermediate_size=32),
    _vision("YolosForObjectDetection", _pixels, image_size=[_PIXELS, _PIXELS], num_detection_tokens=4),
    _vision("DPTForSemanticSegmentation", _pixels, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=8, is_hybrid=False, auxiliary_loss_weight=0.0),
    _conv("SwinForImageClassification", image_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4),
    _conv("Swinv2ForImageClassification", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    _conv("ConvNextForImageClassification", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 2, 1]),
    _conv("ConvNextV2ForImageClassification", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 2, 1]),
    _conv("ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 2, 1]),
    _conv("RegNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 2, 1], groups_width=4),
    _conv("MobileNetV1ForImageClassification", depth_multiplier=0.25, image_size=32, min_depth=8),
    _conv("MobileNetV2ForImageClassification", depth_multiplier=0.25, image_size=32),
    _conv("EfficientNetForImageClassification", width_coefficient=0.25, depth_coefficient=0.3, image_size=32, hidden_dim=320),
    _conv("PvtForImageClassification", image_size=32, hidden_sizes=[8, 16, 16, 32],
          depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4]),
    _conv("PvtV2ForImageClassification", image_size=32, hidden_sizes=[8, 16, 16, 32],
          depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4]),
    _conv("SegformerForSemanticSegmentation", _segmented, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1],
          num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16),
    _conv("LevitForImageClassification", image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
          key_dim=[4, 4, 4], attention_ratio=[2, 2, 2], inputs=_large),
    _conv("PoolFormerForImageClassification", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 2, 1], inputs=_large),
    _conv("MobileViTForImageClassification", hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32], image_size=64,
          inputs=_large),
    _conv("MobileViTV2ForImageClassification", width_multiplier=0.25, image_size=64, inputs=_large),
    _conv("CvtForImageClassification", embed_dim=[8, 16, 16], num_heads=[1, 2, 2], depth=[1, 2, 3]),
    _conv("FocalNetForImageClassification", image_size=32, patch_size=4, embed_dim=16, depths=[1, 2], focal_levels=[1, 1],
          focal_windows=[3, 3], hidden_sizes=[16, 32]),
    _conv("BitForImageClassification", embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 2, 1], num_groups=2),
    _conv("SwiftFormerForImageClassification", image_size=64, embed_dims=[8, 16, 16, 32], depths=[1, 1, 2, 1], inputs=_large),
    _conv("HieraForImageClassification", image_size=[32, 32], patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], embed_dim=8,
          depths=[1, 2, 1], num_heads=[1, 2, 4], embed_dim_multiplier=2.0, num_query_pool=2, query_stride=[2, 2], masked_unit_size=[4, 4],
          masked_unit_attention=[True, True, False]),
    _conv("GLPNForDepthEstimation", _pixels, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4],
          decoder_hidden_size=16),
    _audio("Wav2Vec2ForSequenceClassification"),
    _audio("HubertForSequenceClassification"),
    _audio("WavLMForSequenceClassification", num_buckets=32, max_bucket_distance=64),
    _audio("SEWForSequenceClassification", squeeze_factor=2),
    _audio("UniSpeechForSequenceClassification"),
    _audio("Data2VecAudioForSequenceClassification", num_conv_pos_embeddings=3, conv_pos_kernel_size=3),
    _audio("Wav2Vec2ConformerForSequenceClassification", position_embeddings_type="rotary"),
    Architecture("ASTForAudioClassification", "audio", _spectral, _VISION | {"max_length": 32, "num_mel_bins": 16}),
    Architecture("Speech2TextForConditionalGeneration", "audio", _spoken, _SEQ2SEQ | {
        "input_feat_per_channel": 16, "conv_channels": 16, "max_source_positions": 64, "max_target_positions": 64,
        "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}),
    _towers("CLIPModel"),
    _towers("SiglipModel"),
    _towers("ChineseCLIPModel"),
    _towers("BlipForConditionalGeneration"),
    Architecture("VisionTextDualEncoderModel", "multimodal", _paired, {
        "vision_config": _SMALL_VISION | {"model_type": "vit"}, "text_config": _SMALL_TEXT | {"model_type": "bert"},
        "projection_dim": 16}),
    Architecture("ViltModel", "multimodal", _pictured, _TEXT | _VISION),
    Architecture("FlavaModel", "multimodal", _pictured, {
        "image_config": _SMALL_VISION, "text_config": _SMALL_TEXT, "multimodal_config": _SMALL_TEXT, "hidden_size": 32,
        "projection_dim": 16}),
    _unet("UNet2d", (2, 3, 32, 32)),
    _unet("UNet1d", (2, 2, 64)),
    _unet("DenseNet", (2, 3, 16, 16)),
    _unet("RecurrentNet", (2, 5, 8)),
)  # fmt: skip

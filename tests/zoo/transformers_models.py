"""Models of transformers with small configs, as lines of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdkit import Auto, Kronecker, TTMatrix
from tdkit.decompositions.stacked import Stacked
from tests.zoo.architecture import Architecture, Inputs

LENGTH = 8  # of the token sequences
VOCABULARY = 96


def ids(length: int = LENGTH) -> Tensor:
    return torch.randint(2, VOCABULARY - 1, (2, length))


def text() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def texts() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids(6)}


def image(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def video(frames: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, frames, 3, 32, 32)}


def sound() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 400)}


def _pretrained(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    import transformers

    def built(value: Any) -> Any:  # {"LlamaConfig": {...}} stands for the config of a part
        if isinstance(value, dict) and len(value) == 1 and next(iter(value)).endswith("Config"):
            ((name, options),) = value.items()
            return getattr(transformers, name)(**options)
        return value

    kind = getattr(transformers, class_name)
    model: nn.Module = kind(kind.config_class(**{name: built(value) for name, value in config.items()}))
    return model


def hf(name: str, class_name: str, inputs: Callable[[], Inputs], config: Mapping[str, Any], **row: Any) -> Architecture:
    """A model class of transformers with a config."""
    return Architecture(name, partial(_pretrained, class_name, config), inputs, **row)


SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
BERT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
LLAMA = {**BERT, **SPECIAL, "num_key_value_heads": 2}
WIDE = {**LLAMA, "head_dim": 16}
GPT = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32, **SPECIAL}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "experts_implementation": "eager"}  # others lack float64
T5 = {"vocab_size": VOCABULARY, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
COUNTS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDTHS = {**COUNTS, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
BART = {**WIDTHS, **SPECIAL, "vocab_size": VOCABULARY, "d_model": 48, "max_position_embeddings": 32}
LONG = {"max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32}
SPECTRUM = {"num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 16}
CONVOLUTIONS = {"conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
AUDIO = {**BERT, **CONVOLUTIONS, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
AUDIO |= {"apply_spec_augment": False, "layerdrop": 0.0}
VIT = {**SIZES, "image_size": 32, "patch_size": 8, "num_labels": 10}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 10}
PYRAMID = {**STAGES, "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
CONVNEXT = {"hidden_sizes": [16, 32, 48], "depths": [1, 1, 1], "num_stages": 3, "num_labels": 10}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1] * 4, "layer_type": "basic"}
UPERNET = {"hidden_sizes": [16, 24, 32, 40], "depths": [1] * 4, "out_features": [f"stage{i}" for i in range(1, 5)]}
DPT = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 16}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
SHARED = {"shared_expert_intermediate_size": 64}
DEEPSEEK = {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
DEEPSEEK |= {"q_lora_rank": 24, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
SPARSE = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
PERCEIVER = {"d_model": 48, "d_latents": 48, "num_latents": 8, "num_blocks": 1, "num_self_attends_per_block": 2}
PERCEIVER |= {"num_self_attention_heads": 4, "num_cross_attention_heads": 4, "qk_channels": 48, "v_channels": 48}
VITS = {"flow_size": 32, "spectrogram_bins": 16, "upsample_initial_channel": 32, "upsample_rates": [4, 2]}
VITS |= {"upsample_kernel_sizes": [8, 4], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]}
VITS |= {f"{part}_num_wavenet_layers": 1 for part in ("prior_encoder", "posterior_encoder")}
VITS |= {"hidden_size": 32, "layerdrop": 0.0, "num_hidden_layers": 1, "ffn_dim": 64, "duration_predictor_num_flows": 1}

TRANSFORMERS = [
    # decoders
    hf("GPT-2", "GPT2LMHeadModel", text, GPT),
    hf("GPT-2, Kronecker", "GPT2LMHeadModel", text, GPT, kind=Kronecker()),
    hf("GPT-2, TT matrix", "GPT2LMHeadModel", text, GPT, kind=TTMatrix()),
    hf("GPT-2, Auto", "GPT2LMHeadModel", text, GPT, kind=Auto()),
    hf("LLaMA", "LlamaForCausalLM", text, LLAMA),
    hf("Mistral", "MistralForCausalLM", text, WIDE),
    hf("Gemma", "GemmaForCausalLM", text, WIDE),
    hf("Gemma 2", "Gemma2ForCausalLM", text, {**WIDE, "query_pre_attn_scalar": 16}),
    hf("Gemma 3", "Gemma3ForCausalLM", text, {**WIDE, "query_pre_attn_scalar": 16}),
    hf("Qwen2", "Qwen2ForCausalLM", text, LLAMA),
    hf("Qwen3", "Qwen3ForCausalLM", text, WIDE),
    hf("OLMo 2", "Olmo2ForCausalLM", text, LLAMA),
    hf("Granite", "GraniteForCausalLM", text, LLAMA),
    hf("Cohere", "CohereForCausalLM", text, LLAMA),
    hf("StableLM", "StableLmForCausalLM", text, {**LLAMA, "hidden_size": 64}),
    hf("StarCoder2", "Starcoder2ForCausalLM", text, LLAMA),
    hf("Falcon", "FalconForCausalLM", text, {**BERT, **SPECIAL}),
    hf("Phi", "PhiForCausalLM", text, LLAMA),
    hf("Phi-3", "Phi3ForCausalLM", text, LLAMA),
    hf("OPT", "OPTForCausalLM", text, {**BERT, **SPECIAL, "ffn_dim": 96, "word_embed_proj_dim": 32}),
    hf("BLOOM", "BloomForCausalLM", text, {**BERT, **SPECIAL, "n_layer": 2, "n_head": 4}),
    hf("GPT-NeoX", "GPTNeoXForCausalLM", text, {**BERT, **SPECIAL}),
    hf("GPT-Neo", "GPTNeoForCausalLM", text, {**BERT, **SPECIAL, "attention_types": [[["global", "local"], 1]]}),
    hf("GPT-J", "GPTJForCausalLM", text, {**GPT, "rotary_dim": 8}),
    hf("CodeGen", "CodeGenForCausalLM", text, {**GPT, "rotary_dim": 8}),
    hf("MPT", "MptForCausalLM", text, {"vocab_size": VOCABULARY, "d_model": 48, "n_layers": 2, "n_heads": 4}),
    hf("CTRL", "CTRLLMHeadModel", text, {**GPT, "dff": 96}),
    hf("Mamba", "MambaForCausalLM", text, {**BERT, **SPECIAL, "state_size": 8}),
    hf("Mamba-2", "Mamba2ForCausalLM", text, {**BERT, "num_heads": 6, "head_dim": 16, "n_groups": 2, "chunk_size": 4}),
    hf("RWKV", "RwkvForCausalLM", lambda: {**text(), "use_cache": False},
       {**BERT, **SPECIAL, "attention_hidden_size": 48, "context_length": 32}),
    # mixtures of experts
    hf("Mixtral", "MixtralForCausalLM", text, {**LLAMA, **MOE, "num_local_experts": 4}),
    hf("Mixtral, shared bases", "MixtralForCausalLM", text, {**LLAMA, **MOE, "num_local_experts": 4},
       kind=Stacked(shared=True), match="*.experts.*"),
    hf("Qwen2-MoE", "Qwen2MoeForCausalLM", text, {**LLAMA, **MOE, **SHARED, "num_experts": 4}),
    hf("Qwen3-MoE", "Qwen3MoeForCausalLM", text, {**WIDE, **MOE, "num_experts": 4}),
    hf("DeepSeek-V3", "DeepseekV3ForCausalLM", text, {**LLAMA, **MOE, **DEEPSEEK}),
    hf("GPT-OSS", "GptOssForCausalLM", text, {**WIDE, **MOE, "num_local_experts": 4}),
    hf("OLMoE", "OlmoeForCausalLM", text, {**LLAMA, **MOE, "num_experts": 4}),
    hf("Phi-3.5-MoE", "PhimoeForCausalLM", text, {**LLAMA, **MOE, "num_local_experts": 4}),
    hf("Granite MoE", "GraniteMoeForCausalLM", text, {**LLAMA, **MOE, "num_local_experts": 4}),
    hf("GLM-4-MoE", "Glm4MoeForCausalLM", text, {**WIDE, **MOE, "n_routed_experts": 4, "first_k_dense_replace": 1}),
    hf("Llama 4", "Llama4ForCausalLM", text, {**WIDE, "num_local_experts": 4, "intermediate_size_mlp": 96}),
    hf("Jamba", "JambaForCausalLM", text, {**LLAMA, **MOE, **JAMBA, "num_experts": 4, "mamba_d_state": 8}),
    hf("Switch", "SwitchTransformersForConditionalGeneration", texts,
       {**T5, **SPARSE, "num_experts": 4, "num_decoder_layers": 2}),
    # encoders
    hf("BERT", "BertForMaskedLM", text, BERT),
    hf("BERT, Kronecker", "BertForSequenceClassification", text, BERT, kind=Kronecker()),
    hf("RoBERTa", "RobertaForMaskedLM", text, BERT),
    hf("XLM-R", "XLMRobertaForTokenClassification", text, BERT),
    hf("DistilBERT", "DistilBertForMaskedLM", text, {**GPT, "dim": 48, "hidden_dim": 96}),
    hf("ALBERT", "AlbertForMaskedLM", text, {**BERT, "embedding_size": 24}),
    hf("ELECTRA", "ElectraForPreTraining", text, {**BERT, "embedding_size": 24}),
    hf("DeBERTa", "DebertaForMaskedLM", text, DEBERTA),
    hf("DeBERTa-v2", "DebertaV2ForMaskedLM", text, DEBERTA),
    hf("XLNet", "XLNetLMHeadModel", text, {"vocab_size": VOCABULARY, "d_model": 48, "n_layer": 2, "d_inner": 96}),
    hf("MPNet", "MPNetForMaskedLM", text, BERT),
    hf("ModernBERT", "ModernBertForMaskedLM", text, {**BERT, **SPECIAL, "cls_token_id": 0, "sep_token_id": 1}),
    hf("Longformer", "LongformerForMaskedLM", text, {**BERT, "attention_window": 4, "sep_token_id": 1}),
    hf("SqueezeBERT", "SqueezeBertForMaskedLM", text, {**BERT, "embedding_size": 48}),
    hf("ConvBERT", "ConvBertForMaskedLM", text, {**BERT, "embedding_size": 24}),
    hf("MobileBERT", "MobileBertForMaskedLM", text, {**BERT, "embedding_size": 24, "intra_bottleneck_size": 32}),
    hf("FNet", "FNetForMaskedLM", text, {**BERT, "tpu_short_seq_length": 8}),
    hf("Funnel", "FunnelForMaskedLM", text,
       {"vocab_size": VOCABULARY, "d_model": 48, "n_head": 4, "d_head": 12, "d_inner": 96, "block_sizes": [1, 1]}),
    hf("Perceiver", "PerceiverForMaskedLM", lambda: {"inputs": ids(32)}, {**BERT, **PERCEIVER}),
    # encoder-decoders
    hf("T5", "T5ForConditionalGeneration", texts, T5),
    hf("T5 1.1", "T5ForConditionalGeneration", texts, {**T5, "feed_forward_proj": "gated-gelu"}),
    hf("BART", "BartForConditionalGeneration", texts, BART),
    hf("mBART", "MBartForConditionalGeneration", texts, BART),
    hf("Pegasus", "PegasusForConditionalGeneration", texts, BART),
    hf("Marian", "MarianMTModel", texts, {**BART, "decoder_start_token_id": 0}),
    hf("M2M-100", "M2M100ForConditionalGeneration", texts, BART),
    hf("LED", "LEDForConditionalGeneration", texts, {**BART, **LONG, "attention_window": 4}),
    # sound
    hf("Whisper", "WhisperForConditionalGeneration",
       lambda: {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": ids(6)}, {**BART, **SPECTRUM}),
    hf("Wav2Vec2", "Wav2Vec2ForCTC", sound, AUDIO),
    hf("HuBERT", "HubertForCTC", sound, AUDIO),
    hf("WavLM", "WavLMForCTC", sound, AUDIO),
    hf("AST", "ASTForAudioClassification", lambda: {"input_values": torch.randn(2, 32, 16)},
       {**SIZES, "patch_size": 8, "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16}),
    hf("SpeechT5", "SpeechT5ForSpeechToText", lambda: {**sound(), "decoder_input_ids": ids(6)},
       {**AUDIO, **WIDTHS, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "max_text_positions": 32}),
    hf("VITS", "VitsModel", text, {**VITS, "vocab_size": VOCABULARY, "prior_encoder_num_flows": 1}),
    hf("EnCodec", "EncodecModel", lambda: {"input_values": torch.randn(2, 1, 200)},
       {"hidden_size": 32, "num_filters": 8, "upsampling_ratios": [4, 2], "codebook_size": 32, "codebook_dim": 32}),
    # images
    hf("ViT", "ViTForImageClassification", image, VIT),
    hf("DeiT", "DeiTForImageClassificationWithTeacher", image, VIT),
    hf("BEiT", "BeitForImageClassification", image, {**VIT, "use_relative_position_bias": True}),
    hf("DINOv2", "Dinov2ForImageClassification", image, VIT),
    hf("Swin", "SwinForImageClassification", image, SWIN),
    hf("Swin v2", "Swinv2ForImageClassification", image, SWIN),
    hf("SegFormer", "SegformerForSemanticSegmentation", image,
       {**PYRAMID, "sr_ratios": [2, 1], "num_attention_heads": [1, 2], "decoder_hidden_size": 32}),
    hf("PVT", "PvtForImageClassification", image, {**PYRAMID, "image_size": 32, "num_attention_heads": [1, 2],
       "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]}),
    hf("DETR", "DetrForObjectDetection", partial(image, 64), {**WIDTHS, "d_model": 48, "num_queries": 6,
       "backbone": None, "backbone_config": {"ResNetConfig": {**RESNET, "out_features": ["stage4"]}}}),
    hf("DPT", "DPTForDepthEstimation", image, {**VIT, **DPT, "num_hidden_layers": 4}),
    hf("YOLOS", "YolosForObjectDetection", image, {**VIT, "image_size": [32, 32], "num_detection_tokens": 5}),
    hf("UPerNet", "UperNetForSemanticSegmentation", partial(image, 64), {"backbone_config": {"ConvNextConfig": UPERNET},
       "hidden_size": 32, "auxiliary_channels": 16, "auxiliary_in_channels": 32}),
    hf("ConvNeXt", "ConvNextForImageClassification", image, CONVNEXT),
    hf("ConvNeXt V2", "ConvNextV2ForImageClassification", image, CONVNEXT),
    hf("ResNet", "ResNetForImageClassification", image, {**STAGES, "embedding_size": 16}),
    hf("ResNet, Auto", "ResNetForImageClassification", image, {**STAGES, "embedding_size": 16}, kind=Auto()),
    hf("RegNet", "RegNetForImageClassification", image, {**STAGES, "embedding_size": 16, "groups_width": 16}),
    hf("MobileNetV1", "MobileNetV1ForImageClassification", image, {"depth_multiplier": 0.125, "num_labels": 10}),
    hf("MobileNetV2", "MobileNetV2ForImageClassification", image, {"depth_multiplier": 0.125, "num_labels": 10}),
    hf("EfficientNet", "EfficientNetForImageClassification", image,
       {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, "num_labels": 10}),
    hf("MobileViT", "MobileViTForImageClassification", image, {"image_size": 32, "hidden_sizes": [24, 32, 40],
       "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 48], "num_labels": 10}),
    hf("PoolFormer", "PoolFormerForImageClassification", image, {**PYRAMID, "padding": [2, 1]}),
    hf("LeViT", "LevitForImageClassification", partial(image, 64), {"image_size": 64, "hidden_sizes": [16, 24, 32],
       "num_attention_heads": [2] * 3, "depths": [1] * 3, "key_dim": [8] * 3, "num_labels": 10}),
    hf("TimeSformer", "TimesformerForVideoClassification", partial(video, 2), {**VIT, "num_frames": 2}),
    hf("VideoMAE", "VideoMAEForVideoClassification", partial(video, 4), {**VIT, "num_frames": 4}),
    # images and text
    hf("CLIP", "CLIPModel", lambda: {**text(), **image()},
       {"text_config": {**BERT, **SPECIAL}, "vision_config": VIT, "projection_dim": 32}),
    hf("SigLIP", "SiglipModel", lambda: {"input_ids": ids(32), **image()}, {"text_config": BERT, "vision_config": VIT}),
    hf("LLaVA", "LlavaForConditionalGeneration",
       lambda: {"input_ids": torch.cat([torch.full((2, 16), VOCABULARY - 1), ids()], 1), **image()},
       {"text_config": {"LlamaConfig": LLAMA}, "vision_config": {"CLIPVisionConfig": VIT}, "vision_feature_layer": -1,
        "image_token_index": VOCABULARY - 1}),
    hf("BLIP", "BlipForConditionalGeneration", lambda: {**text(), **image()},
       {"text_config": {**BERT, **SPECIAL, "sep_token_id": 1}, "vision_config": VIT, "projection_dim": 32}),
    # series
    hf("PatchTST", "PatchTSTForPrediction", lambda: {"past_values": torch.randn(2, 32, 2)},
       {"num_input_channels": 2, "context_length": 32, "patch_length": 4, "patch_stride": 4, "d_model": 32}),
]  # fmt: skip

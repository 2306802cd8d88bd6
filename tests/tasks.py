"""Small random models of many kinds, each with batches of the kind that its users have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Task = tuple[nn.Module, list[Any]]

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
SEQ2SEQ = {
    "vocab_size": 60,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    """Token ids (rows, length) of a vocabulary of 60, none of them special."""
    return torch.randint(3, 60, (rows, length))


def bert() -> Task:
    """A masked language model; a quarter of the tokens have labels."""
    from transformers import BertConfig, BertForMaskedLM

    def batch() -> dict[str, Tensor]:
        ids = tokens()
        labels = ids.masked_fill(torch.rand(ids.shape) > 0.25, -100)
        labels[:, 0] = ids[:, 0]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    model = BertForMaskedLM(BertConfig(vocab_size=60, max_position_embeddings=32, **SIZES))
    return model.eval(), [batch() for _ in range(3)]


def t5() -> Task:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=60, decoder_start_token_id=0, **sizes))
    return model.eval(), [{"input_ids": tokens(), "labels": tokens(length=5)} for _ in range(3)]


def bart() -> Task:
    from transformers import BartConfig, BartForConditionalGeneration

    model = BartForConditionalGeneration(BartConfig(max_position_embeddings=32, **SEQ2SEQ))
    return model.eval(), [{"input_ids": tokens(), "labels": tokens(length=5)} for _ in range(3)]


def whisper() -> Task:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    positions = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
    model = WhisperForConditionalGeneration(WhisperConfig(**positions, **SEQ2SEQ))
    return model.eval(), [{"input_features": torch.randn(2, 8, 40), "labels": tokens(length=5)} for _ in range(3)]


def wav2vec2() -> Task:
    """A model that is trained by CTC: its labels are shorter than its frames."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=20, **convolutions, **positions, **SIZES))
    batches = [{"input_values": torch.randn(2, 800), "labels": torch.randint(1, 20, (2, 6))} for _ in range(3)]
    return model.eval(), batches


def vit() -> Task:
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=5, **SIZES))
    return model.eval(), [images(16, as_dictionary=True) for _ in range(3)]


def resnet() -> Task:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_labels=5, **sizes))
    return model.eval(), [images(32, as_dictionary=True) for _ in range(3)]


def cnn() -> Task:
    """A plain network, with one activation that is used twice and changes its input in place."""
    torch.manual_seed(0)
    relu = nn.ReLU(inplace=True)
    first = [nn.Conv2d(3, 8, 3, padding=1), relu, nn.Conv2d(8, 8, 3, padding=1), relu]
    last = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), relu, nn.Linear(16, 5)]
    return nn.Sequential(*first, *last).eval(), [images(16) for _ in range(3)]


def images(size: int, *, as_dictionary: bool = False, rows: int = 4) -> Any:
    """Images (rows, 3, size, size) and one of five classes each: (inputs, labels) or a dictionary."""
    pixels, labels = torch.randn(rows, 3, size, size), torch.randint(5, (rows,))
    return {"pixel_values": pixels, "labels": labels} if as_dictionary else [pixels, labels]


TASKS: dict[str, Callable[[], Task]] = {
    task.__name__: task for task in (bert, t5, bart, whisper, wav2vec2, vit, resnet, cnn)
}

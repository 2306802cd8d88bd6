"""Writes the folders beside this file, which tests load: run it once with the version that they are to stand for.

    python -m tests.models.golden.make FOLDER

``format-1`` and ``format-1-module`` were written by tdkit 0.1.0 at commit ccc1f98, before its modules moved into
packages; ``format-2``, ``format-2-module`` and ``calibration-2`` by the version that calibrations have digests since.
``calibration-1`` is ``calibration-2`` without them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tdkit
from tdkit import Kronecker, LowRank, PermutedKronecker, Policy, Rule, TTMatrix
from tests.conftest import TiedModel

TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
IDS = torch.arange(12).reshape(1, 12)


def transformers_model(folder: Path) -> None:
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
    with torch.inference_mode():
        logits = model(IDS).logits
    (folder / "logits.json").write_text(json.dumps(logits[0, :, :8].tolist()) + "\n", encoding="utf-8")


def module(folder: Path) -> None:
    """A tied module of one's own, and its outputs."""
    torch.manual_seed(0)
    model = TiedModel(12, 8).eval()
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=3))]))
    tdkit.save(model, folder)
    with torch.inference_mode():
        outputs = model(IDS)
    (folder / "outputs.json").write_text(json.dumps(outputs[0].tolist()) + "\n", encoding="utf-8")


def calibrations(folder: Path, earlier: Path) -> None:
    """The moments of the same module."""
    torch.manual_seed(0)
    tdkit.calibrate(TiedModel(12, 8).eval(), [IDS], progress=False).save(folder)
    shutil.copytree(folder, earlier)
    path = earlier / "calibration.json"
    form = json.loads(path.read_text(encoding="utf-8"))
    form["version"] = 1
    del form["digests"]
    path.write_text(json.dumps(form, indent=2) + "\n", encoding="utf-8")


def main(folder: Path) -> None:
    transformers_model(folder / "format-2")
    module(folder / "format-2-module")
    calibrations(folder / "calibration-2", folder / "calibration-1")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

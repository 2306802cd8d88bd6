"""Models of many architectures are opened with their weights left in files, or the reason why not is told."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tdkit.errors import CheckpointError
from tdkit.models import huggingface
from tdkit.models.sites import survey
from tdkit.sources.on_disk import open_model
from tests.zoo.architecture import Architecture
from tests.zoo.transformers_models import TRANSFORMERS

MERGED = {
    *("Mixtral", "Mixtral, shared bases", "Qwen2-MoE", "Qwen3-MoE", "DeepSeek-V3", "OLMoE", "Phi-3.5-MoE"),
    *("GLM-4-MoE", "Jamba"),
}
COMPUTED = {"Marian"}


def ties(state: dict[str, Tensor]) -> set[frozenset[str]]:
    return {frozenset(name for name in state if state[name] is tensor) for tensor in state.values()}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TRANSFORMERS, ids=lambda each: each.name)
def test_an_architecture_is_built_without_weights(architecture: Architecture, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = architecture.build().eval()
    built = huggingface.weightless_model(type(model), copy.deepcopy(model.config), torch.float32)
    ours, theirs = built.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert ties(ours) == ties(theirs)
    buffers = dict(built.named_buffers())
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers() if name not in theirs)
    model.save_pretrained(tmp_path)
    if architecture.name in MERGED | COMPUTED:
        with pytest.raises(CheckpointError, match="merged or computed when a model is loaded"):
            open_model(tmp_path)
        return
    opened = open_model(tmp_path)
    found, expected = survey(opened.model, opened.weights.weight).sites, survey(model).sites
    assert [site.names for site in found] == [site.names for site in expected]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(found, expected, strict=True))

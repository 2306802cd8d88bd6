"""accelerate's offload of a compressed model: right numbers, or an error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn

import tdkit
from tdkit import Policy, Rule
from tdkit.decompositions.base import FactorizedMatrix
from tdkit.decompositions.registered import decompositions
from tdkit.errors import TdkitError
from tdkit.models.preparation import factorized_matrices
from tests.conftest import make_gpt2, make_llama
from tests.kinds import OF_MATRICES

every = pytest.mark.parametrize("name", OF_MATRICES)


def compressed(make: Any, name: str) -> Any:
    return tdkit.compress(make(), Policy([Rule("*", decompositions.get(name)())], budget=0.6))


@every
@pytest.mark.parametrize("make", [make_gpt2, make_llama])
@pytest.mark.parametrize("prefer", ["memory", "speed"])
def test_a_model_offloaded_to_disk_computes_the_same_again_and_again(
    make: Any, name: str, prefer: Any, ids: Tensor, tmp_path: Path
) -> None:
    model = tdkit.prepare(compressed(make, name), prefer=prefer)
    with torch.no_grad():
        expected = model(ids).logits
        disk_offload(model, str(tmp_path), execution_device="cpu")
        assert all(parameter.is_meta for parameter in model.parameters())
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, expected)
        assert all(parameter.is_meta for parameter in model.parameters())


@every
def test_a_model_offloaded_to_the_cpu_computes_the_same(name: str, ids: Tensor) -> None:
    model = compressed(make_gpt2, name)
    with torch.no_grad():
        expected = model(ids).logits
        cpu_offload(model, execution_device="cpu", state_dict=copy.deepcopy(model.state_dict()))
        torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("prefer", ["memory", "speed"])
def test_a_model_dispatched_to_the_cpu_and_the_disk_computes_the_same(prefer: Any, ids: Tensor, tmp_path: Path) -> None:
    model = tdkit.prepare(compressed(make_llama, "permuted_kronecker"), prefer=prefer)
    places = {f"model.{name}": "disk" if name == "layers" else "cpu" for name, _ in model.model.named_children()}
    with torch.no_grad():
        expected = model(ids).logits
        dispatch_model(
            model, {**places, "lm_head": "cpu"}, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
        )
        assert all(parameter.is_meta for parameter in model.model.layers.parameters())
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, expected)


def test_a_model_whose_hooks_are_taken_off_has_its_factors_again(ids: Tensor, tmp_path: Path) -> None:
    model = compressed(make_gpt2, "tt_matrix")
    with torch.no_grad():
        expected = model(ids).logits
        disk_offload(model, str(tmp_path), execution_device="cpu")
        remove_hook_from_submodules(model)
        assert not any(parameter.is_meta for parameter in model.parameters())
        torch.testing.assert_close(model(ids).logits, expected)


class Listed(FactorizedMatrix):
    """A matrix of another package that holds its factors in a list, whose hooks never run."""

    def __init__(self, of: FactorizedMatrix) -> None:
        super().__init__(of.decomposition, of.shape)
        self.parts = nn.ParameterList(of.parameters())

    def dense(self) -> Tensor:
        left, right = self.parts
        return left @ right


def test_factors_that_nothing_loads_are_an_error(tied: Any, ids: Tensor, tmp_path: Path) -> None:
    tdkit.compress(tied, Policy([Rule("*", tdkit.LowRank(rank=4))]))
    for layer in (tied.up, tied.embed):
        layer.matrix = Listed(layer.matrix)
    tied.head.matrix = tied.embed.matrix
    disk_offload(tied, str(tmp_path), execution_device="cpu")
    for layer, x in ((tied.up, torch.randn(2, 24)), (tied.embed, ids)):
        with torch.no_grad(), pytest.raises(TdkitError, match="the factors are on the meta device and hold no numbers"):
            layer(x)


@every
def test_hooks_of_a_matrix_run_when_its_layer_is_called(name: str, ids: Tensor) -> None:
    model, seen = compressed(make_gpt2, name), []
    matrices = factorized_matrices(model)
    for number, matrix in enumerate(matrices):
        matrix.register_forward_hook(lambda *_, number=number: seen.append(number))
    model(ids)
    assert set(seen) == set(range(len(matrices)))

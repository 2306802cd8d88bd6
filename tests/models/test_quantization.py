"""A model with rounded weights computes with them, is smaller in bytes, and saves and loads exactly."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.decompositions.quantized import QuantizedMatrix
from tdkit.errors import CheckpointError, OptionError, PolicyError
from tdkit.models.sites import num_bytes, num_params
from tests.side_packages import use_torchao

use_torchao()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 80}
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(
        LlamaConfig(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, **sizes, **ids)
    ).eval()


IDS = torch.arange(12)[None]


@pytest.mark.parametrize("bits", [8, 4])
def test_factors_and_dense_weights_are_rounded_and_ties_kept(bits: int, tmp_path: Path) -> None:
    model = tdkit.compress(llama(), Policy([Rule("*.mlp.*", LowRank())], budget=0.8))
    before, size, params = model(IDS).logits, num_bytes(model), num_params(model)
    assert tdkit.quantize(model, bits) is model  # type: ignore[arg-type]
    after = model(IDS).logits
    assert 0 < (after - before).norm() / before.norm() < (0.03 if bits == 8 else 0.4)
    assert num_params(model) == params
    assert num_bytes(model) < size * (0.3 if bits == 8 else 0.2)
    assert model.lm_head.matrix is model.model.embed_tokens.matrix
    tdkit.save(model, tmp_path / "model")
    loaded = tdkit.load(tmp_path / "model")
    assert torch.equal(loaded(IDS).logits, after)
    assert num_bytes(loaded) == num_bytes(model)
    assert tdkit.applied_plan(model).bytes_after == num_bytes(model)


def test_loading_needs_no_torchao(tmp_path: Path) -> None:
    import subprocess
    import sys

    model = tdkit.quantize(llama(), 4)
    tdkit.save(model, tmp_path / "model")
    code = (
        "import sys; sys.modules['torchao'] = None\n"
        f"import torch, tdkit; model = tdkit.load({str(tmp_path / 'model')!r})\n"
        "print(model(torch.arange(12)[None]).logits.sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(float(model(IDS).logits.detach().sum()), rel=1e-5)


def test_only_what_matches_is_rounded() -> None:
    model = llama()
    tdkit.quantize(model, 8, match="*.mlp.*")
    rounded = [name for name, module in model.named_modules() if isinstance(module, QuantizedMatrix)]
    assert len(rounded) == 6
    assert all(".mlp." in name for name in rounded)
    tdkit.quantize(model, 4, match="*.self_attn.*")  # the rest at another width
    with pytest.raises(PolicyError, match="no weight of the model matches"):
        tdkit.quantize(model, 4, match="*.mlp.*")


def test_convolutional_and_recurrent_models() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3, padding=1)
            self.down = nn.Conv2d(16, 16, 3, stride=2, groups=2)
            self.rnn = nn.LSTM(16, 24, batch_first=True)
            self.out = nn.Linear(24, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.down(self.conv(x).relu()).flatten(2).transpose(1, 2)
            return self.out(self.rnn(y)[0][:, -1])

    model, x = Net().eval(), torch.randn(2, 3, 9, 9)
    for net in (model, tdkit.compress(copy.deepcopy(model), Policy([Rule("*", LowRank())], budget=0.6))):
        before = net(x)
        tdkit.quantize(net, 8)
        assert (net(x) - before).norm() / before.norm() < 0.05
        assert not [name for name, p in net.named_parameters() if p.ndim > 1]


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OptionError, match="NaN"):
        tdkit.quantize(model, 8)
    assert not any(isinstance(module, QuantizedMatrix) for module in model.modules())
    assert all(torch.equal(t.nan_to_num(), state[name].nan_to_num()) for name, t in model.state_dict().items())


def test_a_model_that_torchao_quantized_is_refused_before_any_work(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = llama()
    quantize_(model, Int8WeightOnlyConfig(version=2))
    plan = tdkit.plan(model, Policy([Rule("*", LowRank(rank=4))]))
    assert "Int8Tensor" in plan.kept["model.layers.0.mlp.up_proj"]
    with pytest.raises(PolicyError, match="Int8Tensor"):
        tdkit.compress(model, Policy([Rule("model.layers.0.mlp.up_proj", LowRank(rank=4))]))
    with pytest.raises(CheckpointError, match="quantize"):
        tdkit.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_quantize_of_torchao_leaves_factors_as_they_are() -> None:
    """It looks at nn.Linear alone, as `quantize` says."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tdkit.compress(llama(), Policy([Rule("*.mlp.*", LowRank())], budget=0.8))
    matrix = model.model.layers[0].mlp.up_proj.matrix
    quantize_(model, Int8WeightOnlyConfig(version=2))
    assert type(matrix.left.data) is torch.Tensor

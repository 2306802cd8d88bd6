"""The test by running the model finds every way in which units cannot be removed, and names the group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit.calibration.grouping import faults_of
from tdkit.models.groups.registered import groups_of
from tdkit.models.sites import survey
from tests.models.test_groups import Attention


class Block(nn.Module):
    """An MLP whose hidden units go through `between`, and what else is computed from them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh, *, leak: str = "") -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.between, self.leak = between, leak

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.between(self.fc1(x))
        y: Tensor = x + self.fc2(hidden)
        if self.leak == "sum":
            return y + hidden.sum(-1, keepdim=True)
        return y + hidden[..., :8] if self.leak == "slice" else y


def checked(*blocks: nn.Module) -> dict[str, str]:
    torch.manual_seed(0)
    model = nn.Sequential(*blocks)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = faults_of(model, groups_of(survey(model).sites), (torch.randn(4, 5, 8),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training
    return found


def test_elementwise_functions_let_units_go() -> None:
    assert checked(Block(), Block(F.relu), Block(F.gelu), Block(lambda h: h * torch.sigmoid(h))) == {}


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda h: h.softmax(-1),
    "normalised": lambda h: F.layer_norm(h, h.shape[-1:]),
    "rolled": lambda h: h.roll(1, -1),
    "flipped": lambda h: h.flip(-1),
}


@pytest.mark.parametrize("mix", MIXES)
def test_a_layer_between_that_mixes_units_is_found(mix: str) -> None:
    found = checked(Block(), Block(MIXES[mix]), Block())
    assert found == {"1.fc2": "units that stay change when others are removed: a layer between them mixes units"}


@pytest.mark.parametrize("leak", ["sum", "slice"])
def test_another_use_of_the_units_is_found(leak: str) -> None:
    found = checked(Block(), Block(leak=leak), Block())
    assert found == {"1.fc2": "other layers depend on the units too: the outputs of the model change without them"} or (
        found == {"1.fc2": "the model does not run with fewer units"}
    )


def test_a_layer_between_of_a_fixed_size_is_found() -> None:
    scale = torch.randn(12)
    assert checked(Block(lambda h: h * scale), Block()) == {"0.fc2": "the model does not run with fewer units"}


def test_units_padded_to_a_fixed_size_are_found() -> None:
    found = checked(Block(lambda h: F.pad(h, (0, 12 - h.shape[-1]))))
    assert found == {"0.fc2": "its inputs have 12 entries where 6 units are left"}


def test_a_group_that_the_batch_does_not_reach_is_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    assert checked(Half()) == {"0.unused.fc2": "the calibration batches do not reach it"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_pass(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(F.silu)).to(dtype)
    x: Any = torch.randn(4, 8, dtype=dtype)
    assert faults_of(model, groups_of(survey(model).sites), x) == {}


class Attending(nn.Module):
    """A model with an attention, in which `norm` is applied to its queries and values."""

    def __init__(self, norm: str = "", **options: bool) -> None:
        super().__init__()
        self.attention = Attention(**options)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        own = self.attention
        handles = []
        if self.norm:
            layer = own.get_submodule(self.norm)
            handles.append(
                layer.register_forward_hook(lambda _m, _a, y: F.normalize(y.unflatten(-1, (-1, 6)), dim=-1).flatten(-2))
            )
        y: Tensor = own(x)
        for handle in handles:
            handle.remove()
        return y


def test_values_queries_and_keys_of_an_attention_pass() -> None:
    torch.manual_seed(0)
    model = Attending()
    groups = groups_of(survey(model).sites)
    assert [group.name.rpartition(".")[2] for group in groups] == ["q_proj", "o_proj"]
    assert faults_of(model, groups, torch.randn(7, 10)) == {}


@pytest.mark.parametrize(("norm", "name"), [("q_proj", "q_proj"), ("k_proj", "q_proj"), ("v_proj", "o_proj")])
def test_a_norm_of_a_head_is_found(norm: str, name: str) -> None:
    torch.manual_seed(0)
    model = Attending(norm)
    found = faults_of(model, groups_of(survey(model).sites), torch.randn(7, 10))
    assert list(found) == [f"attention.{name}"]


def test_rotary_embeddings_of_other_pairs_are_found() -> None:
    torch.manual_seed(0)
    model = Attending(neighbours=True)
    found = faults_of(model, groups_of(survey(model).sites), torch.randn(7, 10))
    assert list(found) == ["attention.q_proj"]

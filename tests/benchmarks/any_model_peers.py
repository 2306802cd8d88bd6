"""Methods of others, run on the same models at the same size: what `any_model.py` compares with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.models.sites import num_params
from tests.real import packages

if TYPE_CHECKING:
    from tests.benchmarks.any_model import Bench

SVD_LLM, TUCKER, PRUNED = "SVD-LLM", "tensorly-torch Tucker", "torch-pruning"
HALVINGS = 12


def serving(model: nn.Module) -> list[str]:
    """Returns the peers that can compress most weights of a model.

    tensorly-torch factorises ungrouped convolutions. torch-pruning follows channels from a convolution to a linear
    layer only where nothing but a flattening is between them.
    """
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    mine = [module for module in model.modules() if isinstance(module, (*_CONVOLUTIONS, nn.Linear))]
    if sum(module.weight.numel() for module in mine) < 0.8 * weights or not any(is_convolution(m) for m in mine):
        return [SVD_LLM]
    return [TUCKER, PRUNED] if _flattens_only(model) else [TUCKER]


def svd_llm(model: nn.Module, bench: Bench, keep: float) -> nn.Module:
    """Truncated SVD of the weights times a root of the inputs' moments, each weight cut to the same share.

    Source: Wang et al., SVD-LLM (2024). By tdkit's own fit, with the moments of the inputs alone.
    """
    policy = Policy([Rule("*", LowRank())], budget=keep, allocation="uniform")
    return tdkit.compress(model, policy, calibration=bench.calibration.inputs_only(), progress=False)


def tucker(model: nn.Module, bench: Bench, keep: float) -> nn.Module:
    """tensorly-torch's Tucker factorisation of ungrouped convolutions and truncated SVD of linear layers.

    Channels are factorised and kernel sizes left; one share of parameters for all layers is searched for, so that the
    whole model has the wanted size.
    """

    def at(share: float) -> nn.Module:
        made = copy.deepcopy(model)
        for name, module in list(made.named_modules()):
            smaller = _tucker(module, share) if is_convolution(module) else _svd(module, share)
            if smaller is not None and num_params(smaller) < num_params(module):
                made.set_submodule(name, smaller)
        return made

    return _largest(at, lambda made: num_params(made) <= keep * bench.dense_params)


def pruned(model: nn.Module, bench: Bench, keep: float) -> nn.Module:
    """torch-pruning's removal of channels of small norm, down to that share of the multiply-adds.

    Source: Fang et al., DepGraph (2023).
    """
    packages.use("peers")
    import torch_pruning  # type: ignore[import-not-found, unused-ignore]

    example = tuple(column[:1] for column in bench.task.test)

    def at(share: float) -> nn.Module:
        made = copy.deepcopy(model)
        last = [module for module in made.modules() if isinstance(module, nn.Linear)][-1]
        importance = torch_pruning.importance.MagnitudeImportance(p=2)
        options = {"pruning_ratio": 1 - share, "ignored_layers": [last], "global_pruning": False}
        torch_pruning.pruner.MagnitudePruner(made, example, importance=importance, **options).step()
        return made

    return _largest(at, lambda made: bench.task.multiply_adds(made) <= keep * bench.dense_multiply_adds)


PEERS: dict[str, Callable[[nn.Module, Bench, float], nn.Module]] = {SVD_LLM: svd_llm, TUCKER: tucker, PRUNED: pruned}

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_convolution(module: nn.Module) -> bool:
    """Returns whether a module is an ungrouped convolution."""
    return isinstance(module, _CONVOLUTIONS) and module.groups == 1


def _flattens_only(model: nn.Module) -> bool:
    return type(model).__name__ in ("CNN", "EfficientNet")


def _largest(at: Callable[[float], nn.Module], fits: Callable[[nn.Module], bool]) -> nn.Module:
    """Returns the model of the largest share that fits, by bisection from a tenth upwards."""
    low, high, best = 0.1, 1.0, at(0.1)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        made = at(middle)
        if fits(made):
            low, best = middle, made
        else:
            high = middle
    return best


def _tucker(module: nn.Module, share: float) -> nn.Module | None:
    packages.use("peers")
    import tensorly
    import tltorch  # type: ignore[import-not-found, unused-ignore]

    backend = tensorly.get_backend()
    tensorly.set_backend("pytorch")
    options = {"factorization": "tucker", "implementation": "factorized", "fixed_rank_modes": "spatial"}
    try:
        layer = tltorch.FactorizedConv.from_conv(module, rank=share, **options)
    finally:
        tensorly.set_backend(backend)
    padding = getattr(module, "static_padding", None)  # of EfficientNet's convolutions
    return layer if padding is None else nn.Sequential(padding, layer)


def _svd(module: nn.Module, share: float) -> nn.Module | None:
    if not isinstance(module, nn.Linear):
        return None
    rank = int(share * module.weight.numel() / sum(module.weight.shape))
    if rank < 1:
        return None
    u, s, v = torch.linalg.svd(module.weight.detach(), full_matrices=False)
    first = nn.Linear(module.in_features, rank, bias=False)
    second = nn.Linear(rank, module.out_features, bias=module.bias is not None)
    with torch.no_grad():
        first.weight.copy_(s[:rank, None] * v[:rank])
        second.weight.copy_(u[:, :rank])
        if module.bias is not None:
            second.bias.copy_(module.bias)
    return nn.Sequential(first, second)

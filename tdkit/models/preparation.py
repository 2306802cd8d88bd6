"""Prepare a compressed model for inference with the best speed or the least memory."""

from __future__ import annotations

from typing import TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from tdkit.decompositions.base import FactorizedMatrix, Preference
from tdkit.decompositions.stacks import FactorizedStack
from tdkit.errors import OptionError, did_you_mean
from tdkit.support.compatibility import buffers_of, parameters_of

M = TypeVar("M", bound=nn.Module)


def prepare(model: M, *, prefer: Preference = "speed", graphs: bool = False) -> M:
    """Set `model` to eval mode and choose whether its factorised matrices may cache dense weights, in place.

    With ``prefer="speed"``, a matrix caches its dense weight at the first call for whose number of tokens the
    factors would be slower. No call is then slower than in the dense model, and the cache takes at most the memory
    of the dense weights in addition to the factors. A low-rank pair whose rank is not a multiple of 16 caches its
    factors padded to one at its first CPU call with 256 tokens or more.

    With ``prefer="auto"``, which is how every model starts, only weights that no layer multiplies by as factors are
    cached, at their first use: those of recurrent layers and packed attention, bare parameters, and weights that other
    modules read. With ``prefer="memory"`` nothing is cached: each call uses the factors, or builds the weight and frees
    it.

    A cached weight is not part of ``state_dict``, of a copy or of a pickle. It is recomputed after the factors
    change (in place, by an optimizer or ``load_state_dict``, or by assignment of other tensors) and after ``.to()``;
    ``.train()`` frees it. It is not used when the factors require gradients (run inference under
    ``torch.inference_mode()``), nor inside ``torch.compile``, which computes from the factors.
    Changes through ``factor.data`` are not detected: call `prepare` again after them. Threads may share the model.

    Changes of inference tensors cannot be detected, so nothing is cached for factors that are inference tensors;
    `prepare` therefore replaces such factors by equal ordinary parameters. Factors that tdkit creates, or that
    ``.to()`` moves, are ordinary tensors even under ``torch.inference_mode()``. Those of a ``copy.deepcopy`` made under
    it are not: call `prepare` on the copy. Until then, `FactorizedMatrix.path` names the path without a cache.

    Args:
        model: any module; a module without factorised layers is only set to eval mode.
        prefer: 'speed', 'auto' or 'memory'.
        graphs: choose paths for calls that are replayed from a CUDA graph, where kernel launches cost little. This
            also applies to the calls before the capture, of which at least one is needed to cache weights and
            compile kernels.

    Returns:
        The same model.

    Raises:
        OptionError: when `prefer` is none of them.
    """
    if prefer not in get_args(Preference):
        known = get_args(Preference)
        raise OptionError(
            f"prepare: prefer={prefer!r} must be one of {', '.join(map(repr, known))}{did_you_mean(str(prefer), known)}"
        )
    ordinary: dict[Tensor, Tensor] = {}
    for matrix in factorized_matrices(model):
        _leave_inference_mode(matrix, ordinary)
        matrix.dispatcher.configure(prefer, graphs=graphs)
    for matrix in factorized_matrices(model):
        for part in matrix.parts() if isinstance(matrix, FactorizedStack) else ():
            part.dispatcher.configure("memory", graphs=graphs)  # nothing is cached twice
    return model.eval()


def drop_caches(module: nn.Module) -> None:
    """Drop what modules computed from their parameters and keep in eval mode, as they do on ``train()``."""
    modes = [(each, each.training) for each in module.modules()]
    module.train()
    for each, training in modes:
        each.training = training


def cached_bytes(model: nn.Module) -> int:
    """Returns the number of bytes that the factorised matrices of `model` cache now, usually as dense weights."""
    return sum(matrix.dispatcher.cached_bytes for matrix in factorized_matrices(model))


def factorized_matrices(model: nn.Module) -> list[FactorizedMatrix]:
    """Returns all factorised matrices of `model`; shared ones appear once."""
    return [module for module in model.modules() if isinstance(module, FactorizedMatrix)]


@torch.inference_mode(False)
def _leave_inference_mode(matrix: FactorizedMatrix, ordinary: dict[Tensor, Tensor]) -> None:
    """Replace the inference tensors of `matrix` by ordinary copies; `ordinary` maps each to its copy and keeps ties."""
    for module in matrix.modules():
        for owned in (parameters_of(module), buffers_of(module)):
            for name, tensor in list(owned.items()):
                if tensor is not None and tensor.is_inference():
                    if tensor not in ordinary:
                        copy = tensor.detach().clone()
                        is_parameter = isinstance(tensor, nn.Parameter)
                        ordinary[tensor] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
                    cast("dict[str, Tensor]", owned)[name] = ordinary[tensor]

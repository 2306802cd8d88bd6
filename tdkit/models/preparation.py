"""Make a compressed model ready to run: as fast as it can be, or in as little memory."""

from __future__ import annotations

from typing import TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from tdkit.decompositions.base import FactorizedMatrix, Preference
from tdkit.errors import OptionError, did_you_mean
from tdkit.support.compatibility import buffers_of, parameters_of

M = TypeVar("M", bound=nn.Module)


def prepare(model: M, *, prefer: Preference = "speed", graphs: bool = False) -> M:
    """Put `model` in eval mode and say what its factorised matrices may spend, in place.

    With ``prefer="speed"`` a matrix whose factors would be slower than the dense weight, for the tokens of a
    call, caches that weight from its first such call on: no call is slower than in the dense model, at up to
    the dense model's memory on top of the factors. A low-rank pair whose rank is no multiple of 16 caches its
    factors padded to one from its first CPU call with 256 tokens or more on. With ``prefer="memory"``, which
    is how every model starts, nothing is cached: each call uses the factors, or builds the weight and frees it.

    A cached weight is never part of ``state_dict``, of a copy or of a pickle. It is built again after
    the factors change (in place, by an optimizer or ``load_state_dict``, or as other tensors) and after
    ``.to()``; ``.train()`` frees it. It is not used where factors need gradients (run inference
    under ``torch.inference_mode()``), nor inside ``torch.compile``, which computes from the factors.
    Writing through ``factor.data`` cannot be seen: call `prepare` again after it. Threads may share the model.

    Changes of inference tensors cannot be seen, so no weight is cached for factors that are such tensors.
    `prepare` therefore puts ordinary parameters in their place, equal ones. Factors that tdkit makes, and those that
    ``.to()`` moves, are ordinary ones under ``torch.inference_mode()`` too; those of a ``copy.deepcopy`` made there
    are not: call `prepare` on the copy. Until then `FactorizedMatrix.path` names the path that its factors take.

    Args:
        model: any module; without factorised layers nothing but eval mode is set.
        prefer: 'speed' or 'memory'.
        graphs: the calls will be replayed from a CUDA graph, where a launch costs little: paths are chosen for
            that, also in the calls before the capture. At least one must come before it, so that weights are
            cached and kernels are compiled.

    Returns:
        The same model.

    Raises:
        OptionError: for any other `prefer`.
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
    return model.eval()


def cached_bytes(model: nn.Module) -> int:
    """Bytes of what the factorised matrices of `model` cache at the moment, dense weights as a rule."""
    return sum(matrix.dispatcher.cached_bytes for matrix in factorized_matrices(model))


def factorized_matrices(model: nn.Module) -> list[FactorizedMatrix]:
    """Every factorised matrix of `model`, shared ones once."""
    return [module for module in model.modules() if isinstance(module, FactorizedMatrix)]


@torch.inference_mode(False)
def _leave_inference_mode(matrix: FactorizedMatrix, ordinary: dict[Tensor, Tensor]) -> None:
    """Replace each inference tensor of `matrix` by an ordinary one, the same wherever it is shared."""
    for module in matrix.modules():
        for owned in (parameters_of(module), buffers_of(module)):
            for name, tensor in list(owned.items()):
                if tensor is not None and tensor.is_inference():
                    if tensor not in ordinary:
                        copy = tensor.detach().clone()
                        is_parameter = isinstance(tensor, nn.Parameter)
                        ordinary[tensor] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
                    cast("dict[str, Tensor]", owned)[name] = ordinary[tensor]

"""Make a compressed model ready to run: as fast as it can be, or in as little memory."""

from __future__ import annotations

from typing import TypeVar, get_args

from torch import nn

from tdkit.decompositions.base import FactorizedMatrix, Preference
from tdkit.errors import OptionError, did_you_mean

M = TypeVar("M", bound=nn.Module)


def prepare(model: M, *, prefer: Preference = "speed", graphs: bool = False) -> M:
    """Put `model` in eval mode and say what its factorised matrices may spend, in place.

    With ``prefer="speed"`` a matrix whose factors would be slower than the dense weight, for the tokens of a
    call, holds that weight from its first such call on: no call is slower than in the dense model, at up to
    the dense model's memory on top of the factors. A low-rank pair whose rank is no multiple of 16 holds a padded
    copy of its factors from its first CPU call with 256 tokens or more on. With
    ``prefer="memory"``, which is how every model starts, nothing is held: each call uses the factors, or builds the
    weight and lets it go.

    A weight that is held is never part of ``state_dict``, of a copy or of a pickle. It is built anew after
    the factors change (in place, by an optimizer or ``load_state_dict``, or as other tensors) and after
    ``.to()``; it is dropped by ``.train()``; it is not used where factors need gradients (run inference
    under ``torch.inference_mode()``), nor inside ``torch.compile``, which computes from the factors.
    Writing through ``factor.data`` cannot be seen: call `prepare` again after it.

    Args:
        model: any module; without factorised layers nothing but eval mode is set.
        prefer: 'speed' or 'memory'.
        graphs: the calls will be replayed from a CUDA graph, where a launch costs little: paths are chosen for
            that, also in the calls before the capture. At least one must come before it, so that weights are
            held and kernels are compiled.

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
    for matrix in factorized_matrices(model):
        matrix.hold(prefer, graphs=graphs)
    return model.eval()


def held_bytes(model: nn.Module) -> int:
    """Bytes of what the factorised matrices of `model` hold at the moment to be fast, dense weights as a rule."""
    return sum(matrix.held_bytes for matrix in factorized_matrices(model))


def factorized_matrices(model: nn.Module) -> list[FactorizedMatrix]:
    """Every factorised matrix of `model`, shared ones once."""
    return [module for module in model.modules() if isinstance(module, FactorizedMatrix)]

"""Round the weights of a model to 8 or 4 bits: its factors, and its dense weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import nn

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.decompositions.quantized import Quantized, QuantizedMatrix, quantized
from tdkit.errors import PolicyError
from tdkit.fitting.quantization import Bits, check_torchao
from tdkit.models.sites import Site, factorized_groups, survey
from tdkit.models.swap import Swap, swapping
from tdkit.support.compatibility import submodules_of, uncompiled


def quantize(
    model: nn.Module, bits: Bits = 8, *, group: int = 0, match: str | Sequence[str] = "*", dense: bool = True
) -> nn.Module:
    """Round the factors and the dense weights of a model to 8 or 4 bits, in place, and return the model.

    Weights of two or more dimensions are rounded; biases and norms keep their dtype. The model computes as before, in
    its dtype, with the rounded weights, which each product decodes again: this saves memory, not time. It saves and
    loads like any other compressed model, and loading needs no torchao. An error restores the original model.

    torchao's own ``quantize_`` looks at ``nn.Linear`` alone and leaves factors as they are. For its kernels make plain
    layers of the low-rank pairs first, with `to_sequential`.

    Args:
        model: any torch module, compressed or not.
        bits: 8 or 4 per number.
        group: numbers that share a step; 64 with 8 bits, 32 with 4, when 0.
        match: globs over layer names; the other weights keep their dtype.
        dense: whether dense weights are rounded as well.

    Raises:
        OptionError: when bits or group is not supported, torchao is not installed, or weights are not finite.
        PolicyError: when no weight matches.
    """
    Quantized(bits=bits, group=group)  # checks the options
    check_torchao()
    model = uncompiled(model)
    with swapping(model, survey(model).sites if dense else ()) as swap:
        quantize_within(swap, bits, group=group, match=match, dense=dense)
    return model


def quantize_within(
    swap: Swap, bits: Bits = 8, *, group: int = 0, match: str | Sequence[str] = "*", dense: bool = True
) -> None:
    """As `quantize`, of the model of `swap`, whose `undo` takes it back."""
    model, rounding = swap.model, Quantized(bits=bits, group=group)
    check_torchao()
    globs = [match] if isinstance(match, str) else list(match)

    def matches(names: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)

    factorized = [
        matrix
        for matrix, users in factorized_groups(model)
        if not isinstance(matrix, QuantizedMatrix) and matches([user.name for user in users])
    ]
    sites = [site for site in survey(model).sites if matches(site.names)] if dense else []
    if not factorized and not sites:
        raise PolicyError(f"quantize: no weight of the model matches {', '.join(globs)} and is not quantized yet")
    replaced = {id(matrix): quantized(matrix, bits, group) for matrix in factorized}
    for site in sites:
        swap.put([(site, _rounded(site, rounding))])
    _replace(swap, replaced)


def _rounded(site: Site, rounding: Quantized) -> FactorizedMatrix:
    return rounding.fit(site.weight.detach())


def _replace(swap: Swap, replaced: Mapping[int, FactorizedMatrix]) -> None:
    places = [
        (children, name, child)
        for children in map(submodules_of, swap.model.modules())
        for name, child in children.items()
        if id(child) in replaced
    ]

    def restore() -> None:
        for children, name, child in places:
            children[name] = child

    swap.when_undone(restore)
    for children, name, child in places:
        children[name] = replaced[id(child)]

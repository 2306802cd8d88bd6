"""y = x W^T + bias through a structure; only x and the factors are saved for the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tdkit.products import onednn
from tdkit.products.cost import DENSE, Path
from tdkit.products.recording import needs_plain_operations
from tdkit.products.structure import Factors, Structure
from tdkit.support.compatibility import constant_for_compile


@constant_for_compile
def has_autocast(device: str) -> bool:
    """Whether torch has autocast for a device type."""
    return torch.amp.is_autocast_available(device)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast casts matrix products to on a device type; None where autocast is off."""
    if not has_autocast(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """A context in which operations on a device type are not cast."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def linear(
    x: Tensor,  # (*batch, in)
    bias: Tensor | None,  # (out,)
    factors: Factors,
    structure: Structure,
    path: Path,
) -> Tensor:  # (*batch, out)
    """Multiply by one of the structure's paths, recording a gradient only where one can be asked for.

    Under autocast the operands are cast as ``torch.nn.functional.linear`` casts its own.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, factors = x.to(dtype), [factor.to(dtype) for factor in factors]
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return linear(x, bias, factors, structure, path)
    flat = x.reshape(-1, structure.shape[1])
    operands = [flat, *factors, *([] if bias is None else [bias])]
    if _is_differentiated(*operands):
        y: Tensor = FactorizedProduct.apply(structure, path, flat, bias, *factors)  # type: ignore[no-untyped-call]
    else:
        y = _forward(structure, path, flat, bias, factors)
    return y.reshape(*x.shape[:-1], structure.shape[0])


def _is_differentiated(*operands: Tensor) -> bool:
    """Whether the autograd functions of this file record the gradient, and not the operations that they consist of."""
    recorded = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
    return recorded and not needs_plain_operations()


def _forward(structure: Structure, path: Path, x: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
    if path.name == DENSE:
        return onednn.linear(x, structure.build(factors), bias)
    return structure.multiply(x, factors, path, bias)


class FactorizedProduct(torch.autograd.Function):
    """x W^T + bias. The weight, or the intermediate results, are computed again in the backward pass.

    The backward pass is made of differentiable operations, so that it can be differentiated itself.

    Source: Chekalina et al., TTM-GPT2 (2023), section 3, for tensor trains.
    """

    @staticmethod
    def forward(structure: Structure, path: Path, x: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        return _forward(structure, path, x, bias, factors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.structure, ctx.path, x, _, *factors = inputs
        ctx.save_for_backward(x, *factors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, *factors = ctx.saved_tensors
        structure: Structure = ctx.structure
        _, _, needs_x, needs_bias, *needs_factors = ctx.needs_input_grad
        grad_x, grad_factors = structure.backward(gradient, x, factors, ctx.path, needs_x, needs_factors)
        grad_bias = gradient.sum(0) if needs_bias else None
        return None, None, grad_x, grad_bias, *grad_factors


def reorder(
    x: Tensor,  # (*batch, n)
    order: Tensor,  # (n,) integers, a permutation
) -> Tensor:  # (*batch, n)
    """``x[..., order]``, whose gradient is gathered by the inverse order."""
    if _is_differentiated(x):
        return Reorder.apply(x, order)  # type: ignore[no-any-return, no-untyped-call]
    return x.index_select(-1, order)


class Reorder(torch.autograd.Function):
    """A permutation of the last axis. Without it the gradient is a scatter, slower and not deterministic on CUDA."""

    @staticmethod
    def forward(x: Tensor, order: Tensor) -> Tensor:
        return x.index_select(-1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (order,) = ctx.saved_tensors
        return reorder(gradients[0], order.argsort()), None

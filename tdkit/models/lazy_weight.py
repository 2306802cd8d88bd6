"""The dense weight of a factorised layer as a tensor whose values are computed on first use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import TdkitError
from tdkit.products.autograd import without_autocast
from tdkit.products.convolution import Geometry
from tdkit.products.recording import is_recorded
from tdkit.support.compatibility import in_transform, tree_map_only, wrapper_tensor

METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            *("dtype", "device", "shape", "ndim", "layout", "requires_grad", "itemsize", "nbytes"),
            *("is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized"),
        )
    ),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel),
}
"""Functions that need only metadata, not the values."""

WRITE = Tensor.data.__set__  # type: ignore[attr-defined]
"""``weight.data = values``, which a weight computed on each access would forget; libraries merge adapters by it."""

PRODUCTS = {
    *(F.linear, F.embedding, F.multi_head_attention_forward, torch.addmm, torch.mm, torch.matmul),
    *(Tensor.mm, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__),
}
"""Functions that only read the weight and return no view of it, so that they can use a cached weight."""

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
"""Functions that compute with the factors of a weight that is one of a convolution."""


def lazy_weight(
    matrix: FactorizedMatrix,
    size: Sequence[int] | None = None,
    view: Callable[[Tensor], Tensor] = lambda dense: dense,
    *,
    convolves: bool = False,
) -> Tensor:
    """Returns ``view(matrix.dense())`` as a tensor of `size` whose values are computed by the first operation on it.

    Reading its dtype, device or shape computes nothing. The values are computed once, in the factors' dtype also under
    autocast, and with gradients to the factors if these were enabled when `lazy_weight` was called. Products use, and
    leave, a cached weight where the matrix may have one (see `tdkit.prepare`). It is a copy: writing to it does not
    change the factors.

    Args:
        matrix: the factorised matrix (out, in).
        size: the shape of the result; (out, in) when None.
        view: a function that returns a view of shape `size` of a tensor (out, in).
        convolves: `size` is that of a convolution, (out, in / groups, *kernel): ``torch.nn.functional.conv2d`` with
            this weight computes as the factorised layer does.
    """
    if is_recorded() or in_transform():  # none of them keeps the subclass
        return view(matrix.dense())
    size = matrix.shape if size is None else size
    trained = [tensor for tensor in matrix.tensors() if tensor.requires_grad] if torch.is_grad_enabled() else []
    read = cast("Callable[..., LazyWeight]", _Read.apply if trained else _wrapper)
    weight = read(matrix, size, view, *trained)
    weight._matrix, weight._view, weight._built = matrix, view, None
    weight._modes, weight._convolves, weight._keeps = _modes(), convolves, False
    return weight


def keep_in_cache(weight: Tensor) -> Tensor:
    """Make every function, not only products, use and leave a cached weight where the matrix may have one.

    For a weight that lives as long as one call of its layer. Other tensors than a lazy weight are returned unchanged.
    """
    if isinstance(weight, LazyWeight):
        weight._keeps = True
    return weight


class LazyWeight(Tensor):
    """See `lazy_weight`."""

    _matrix: FactorizedMatrix
    _view: Callable[[Tensor], Tensor]
    _modes: tuple[bool, bool]  # inference mode, gradients
    _built: Tensor | None
    _convolves: bool
    _keeps: bool
    _is_hf_initialized = True  # the initializers of transformers leave it alone: they would draw numbers for a copy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == WRITE:
            raise TdkitError(
                "the dense weight of a factorised layer is read-only, computed from its factors: values put in its "
                "place would be lost. Change the factors in `matrices`; an adapter on such a layer, which merging adds "
                "to the dense weight, is to be kept beside the model"
            )
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if func in CONVOLUTIONS:
            return _convolved(func, *args, **(kwargs or {}))
        numbers = _lent if func in PRODUCTS else _numbers
        args, kwargs = tree_map_only(LazyWeight, numbers, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # declared as no class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Handle calls that bypass ``__torch_function__``; for their gradients autograd calls `_Read`."""
        args, kwargs = tree_map_only(LazyWeight, lambda weight: _numbers(weight).detach(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _Read(torch.autograd.Function):
    """Creates a lazy weight and propagates a gradient with respect to the wrapper tensor to the factors.

    Autograd functions (a fused loss that takes the head's weight) and TorchScript differentiate the wrapper itself.
    """

    @staticmethod
    def forward(
        ctx: Any, matrix: FactorizedMatrix, size: Sequence[int], view: Callable[[Tensor], Tensor], *factors: Tensor
    ) -> Tensor:
        ctx.matrix, ctx.view = matrix, view
        ctx.save_for_backward(*factors)
        return _wrapper(matrix, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        factors, matrix = ctx.saved_tensors, ctx.matrix
        if not {id(factor) for factor in factors} <= {id(tensor) for tensor in matrix.tensors()}:
            raise TdkitError(
                "the factors of a weight were replaced between the forward and the backward pass: use "
                "layer.matrix.dense() in place of layer.weight there"
            )
        with torch.enable_grad():
            weight = ctx.view(matrix.dense())
        found = torch.autograd.grad(weight, factors, gradients, create_graph=torch.is_grad_enabled())
        return None, None, None, *found


def _wrapper(matrix: FactorizedMatrix, size: Sequence[int], *_: object) -> LazyWeight:
    return wrapper_tensor(LazyWeight, size, dtype=matrix.dtype, device=matrix.device)


def _numbers(weight: LazyWeight) -> Tensor:
    if weight._built is None:
        inference, gradients = weight._modes
        matrix = weight._matrix
        device = matrix.device.type
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients), without_autocast(device):
            dense = matrix.dispatcher.dense(matrix) if weight._keeps else matrix.dense()
            weight._built = weight._view(dense)
    return weight._built


def _lent(weight: LazyWeight) -> Tensor:
    if weight._built is not None:
        return weight._built
    matrix = weight._matrix
    cached = matrix.dispatcher.cached_weight(matrix)
    return _numbers(weight) if cached is None else weight._view(cached)


def _modes() -> tuple[bool, bool]:
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled()


def _convolved(
    func: Callable[..., Tensor],
    input: Tensor,  # noqa: A002, the names that torch gives them
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution by the factors where they are those of its weight, with the dense weight otherwise."""
    by_factors = isinstance(weight, LazyWeight) and weight._convolves and weight._modes == _modes()
    others = any(isinstance(each, LazyWeight) for each in (input, bias))
    if not by_factors or others or input.dim() != weight.dim():
        x, w, b = tree_map_only(LazyWeight, _numbers, (input, weight, bias))
        return func(x, w, b, stride, padding, dilation, groups)
    geometry = Geometry.of_call(weight.shape[2:], stride, padding, dilation, groups)
    y: Tensor = cast(LazyWeight, weight)._matrix(input, bias, geometry)
    return y

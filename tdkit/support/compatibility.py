"""All private parts of torch and accelerate that tdkit uses, each with the behaviour that it relies on.

A release that changes one of them fails the test of that part in ``tests/support/test_compatibility.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "buffers_of",
    "constant_for_compile",
    "in_functional_transform",
    "move_own_tensors",
    "onednn_enabled",
    "onednn_has_linear",
    "onednn_linear",
    "own_parameters",
    "parameters_of",
    "reset_accelerate_state",
    "storage_id",
    "submodules_of",
    "tree_leaves",
    "tree_map_only",
    "version_of",
    "wrapper_tensor",
]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", bound=Tensor)

version_of: Callable[[Tensor], int] = attrgetter("_version")
"""The version counter of a tensor, which every in-place operation increases; inference tensors have none."""


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters by name. Ten times as fast as attribute access on the module."""
    return cast("dict[str, nn.Parameter]", module._parameters)


def submodules_of(module: nn.Module) -> dict[str, nn.Module]:
    """The module's own submodules by name, as fast."""
    return cast("dict[str, nn.Module]", module._modules)


def own_parameters(module: nn.Module) -> None:
    """Copy the parameter dictionary of a module: a shallow copy of a module shares it with the original."""
    module._parameters = dict(module._parameters)


def move_own_tensors(module: nn.Module, device: torch.device) -> None:
    """``module.to(device)`` without its submodules; parameters stay the same objects."""
    module._apply(lambda tensor: tensor.to(device), recurse=False)  # type: ignore[no-untyped-call]


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers by name."""
    return module._buffers


def onednn_enabled() -> bool:
    """Returns ``torch.backends.mkldnn.enabled``, whose public name takes 0.2 us longer."""
    return torch._C._get_mkldnn_enabled()


def onednn_has_linear() -> bool:
    """Returns whether this build of torch has oneDNN and its operator for ``x @ weight.T + bias``."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(
    x: Tensor,  # (*batch, in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
) -> Tensor:  # (*batch, out)
    """Returns ``x @ weight.T + bias``, computed by oneDNN; float32 on CPU only, not differentiable."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def constant_for_compile(function: F) -> F:
    """Mark `function` so that torch.compile treats its result as a constant; returns `function`.

    Like ``torch.compiler.assume_constant_result``, which imports ``torch._dynamo`` and takes two seconds for it.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def storage_id(tensor: Tensor) -> int:
    """Returns a number that is equal for tensors that share a storage, also an empty one, while it is alive."""
    return cast(int, tensor.untyped_storage()._cdata)


def wrapper_tensor(kind: type[T], size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> T:
    """Returns a tensor without storage, of a subclass with ``__torch_dispatch__``, with the given metadata."""
    return torch.Tensor._make_wrapper_subclass(kind, size, dtype=dtype, device=device)


def in_functional_transform() -> bool:
    """Returns whether a transform of ``torch.func`` (``grad``, ``vmap``, ...) is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def reset_accelerate_state(*, processes: bool = False) -> None:
    """Reset the precision and plugins of the last ``accelerate.Accelerator``, which the next one would inherit.

    Args:
        processes: also reset the device and the process group.
    """
    from accelerate.state import AcceleratorState  # slow to import, and not needed for compression

    AcceleratorState._reset_state(processes)

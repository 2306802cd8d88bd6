"""Private parts of torch and accelerate, and calls of the system, that tdkit uses, each with what it relies on.

A release that changes one of them fails the test of that part in ``tests/support/test_compatibility.py``.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

__all__ = [
    "COMPILED",
    "RecurrentWeights",
    "TooManyParameters",
    "buffers_of",
    "constant_for_compile",
    "convolve_its_own_way",
    "convolves_its_own_way",
    "exchange_paths",
    "find_buffers_as_parameters",
    "gathered_state",
    "given_state_dict",
    "has_experts_interface",
    "holds_parameters",
    "in_transform",
    "is_jit_traced",
    "is_sharded",
    "move_own_tensors",
    "offloads",
    "onednn_enabled",
    "onednn_has_linear",
    "onednn_linear",
    "only_calls_forward",
    "own_parameters",
    "parameters_of",
    "parameters_on_meta",
    "parsed_expression",
    "pre_hooks_of",
    "rebind_hooked_forward",
    "recurrent_weights_again",
    "replace_forward",
    "reset_accelerate_state",
    "saved_buffers_of",
    "shallow_copy",
    "static_shape",
    "storage_id",
    "submodules_of",
    "tensor_files_written_by",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "uncompiled",
    "unsharded_class",
    "unwrapped",
    "version_of",
    "without_recurrent_weights",
    "wrapper_tensor",
]

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T", bound=Tensor)
Any_ = TypeVar("Any_")

version_of: Callable[[Tensor], int] = attrgetter("_version")
"""The version counter of a tensor, which every in-place operation increases; inference tensors have none."""


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters by name. Ten times as fast as attribute access on the module."""
    return cast("dict[str, nn.Parameter]", module._parameters)


def submodules_of(module: nn.Module) -> dict[str, nn.Module]:
    """The module's own submodules by name, as fast."""
    return cast("dict[str, nn.Module]", module._modules)


def only_calls_forward(module: nn.Module) -> bool:
    """Returns whether a call of the module, without gradients, is one of its class's ``forward`` and no more.

    No hook sees it, as those of accelerate, which replace ``forward``, or of a profiler.
    """
    own, every = module.__dict__, nn.modules.module
    own_hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
    return not (own_hooks or every._global_forward_hooks or every._global_forward_pre_hooks)


class TooManyParameters(Exception):  # noqa: N818, says what there is
    """A model has more parameters than it may have."""


@contextmanager
def parameters_on_meta(most: int | None = None) -> Iterator[None]:
    """A context manager inside which modules put the parameters that they are given on the meta device.

    A parameter is freed as soon as its module has it, so that a model is built with one in memory. Parameters that are
    there already stay the same objects: ties are kept. Buffers are real.

    Args:
        most: the number of parameters after which `TooManyParameters` is raised; None for any number.
    """
    register = nn.Module.register_parameter
    count = 0

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if most is not None and count > most:
            raise TooManyParameters
        if type(param) is nn.Parameter and not param.is_meta:
            param = nn.Parameter(param.data.to("meta"), param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def own_parameters(module: nn.Module) -> None:
    """Copy the parameter dictionary of a module: a shallow copy of a module shares it with the original."""
    module._parameters = dict(module._parameters)


def shallow_copy(module: M) -> M:
    """Returns a copy that shares tensors, submodules and hooks with the original, but not the lists of them."""
    copied = module.__new__(type(module))
    vars(copied).update(vars(module))
    copied._parameters = dict(module._parameters)
    copied._modules = dict(module._modules)
    copied._buffers = dict(module._buffers)
    return copied


class RecurrentWeights(nn.Module):
    """Makes a subclass of ``nn.RNNBase`` read its weights in every call, instead of keeping a list of them."""

    _flat_weights_names: list[str]

    def once_per_call(self, key: str, compute: Callable[[], Any_]) -> Any_:
        """Returns ``compute()``; another base class may keep it during a call."""
        return compute()

    def weight_in_cache(self, name: str) -> Tensor | None:
        """Returns a weight that takes no work; another base class may have some."""
        return None

    def _read_weights(self) -> list[Tensor | None]:
        held, found = self._parameters, []
        for name in self._flat_weights_names:
            weight = held[name] if name in held else self.weight_in_cache(name)
            found.append(getattr(self, name, None) if weight is None else weight)
        return found

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return self.once_per_call("all", self._read_weights)

    @_flat_weights.setter
    def _flat_weights(self, _: object) -> None:
        pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        # the weights with these names would be read, to be referred to
        super().__setstate__({**state, "_flat_weights_names": []})  # type: ignore[no-untyped-call]
        self._flat_weights_names = state["_flat_weights_names"]

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Does nothing: weights that are computed in every call cannot stay in one block of memory."""


def without_recurrent_weights(module: nn.Module) -> None:
    """Remove the list of weights from a shallow copy of an ``nn.RNNBase``; does nothing to other modules."""
    if isinstance(module, nn.RNNBase):
        vars(module).pop("_flat_weights", None)
        vars(module)["_flat_weight_refs"] = []


def recurrent_weights_again(module: nn.Module) -> None:
    """Make an ``nn.RNNBase`` list its weights again; does nothing to other modules."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def offloads(module: nn.Module) -> bool:
    """Returns whether a hook of accelerate loads the weights of a module when it is called."""
    hook: Any = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in (hook, *cast("Any", getattr(hook, "hooks", ()))))


def holds_parameters(module: nn.Module) -> bool:
    """Returns whether a module was wrapped by DDP or sharded by FSDP, which keep lists of the parameters."""
    names = {base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.")}
    return bool(names & {"DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel"})


def rebind_hooked_forward(module: nn.Module) -> None:
    """Make a hook of accelerate, which replaces ``forward`` on the instance, call that of the module's class."""
    if "_old_forward" in vars(module) and hasattr(module, "_hf_hook"):
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)


COMPILED = "_orig_mod."  # precedes the names inside a module that torch.compile wrapped


def uncompiled(model: nn.Module) -> nn.Module:
    """Returns the module inside the wrapper of ``torch.compile``, or the module itself."""
    inner = getattr(model, "_orig_mod", None)
    return inner if type(model).__name__ == "OptimizedModule" and isinstance(inner, nn.Module) else model


WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the module inside the wrappers of ``torch.compile``, data parallelism and FSDP1, or itself."""
    while type(model).__name__ in WRAPPERS:
        inner = uncompiled(model)
        inner = getattr(model, "module", model) if inner is model else inner
        if inner is model or not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def is_sharded(model: nn.Module) -> bool:
    """Returns whether this process holds only a part of a tensor of the model, as under FSDP."""
    return any(hasattr(tensor, "device_mesh") for tensor in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )


def unsharded_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Returns the class of which ``fully_shard`` made a subclass of it and ``FSDPModule``, or the class itself."""
    first, *others = kind.__bases__
    sharded = first.__name__ == "FSDPModule" and kind.__name__.startswith("FSDP") and others
    return cast("type[nn.Module]", others[0]) if sharded else kind


def gathered_state(model: nn.Module) -> dict[str, Any]:
    """Returns the whole ``state_dict`` of a sharded model in the first process, and an empty one in the others.

    All processes call it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # slow to import

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@contextmanager
def tensor_files_written_by(write: Callable[..., None]) -> Iterator[None]:
    """A context manager inside which ``save_pretrained`` calls ``write(tensors, path, metadata=...)`` for its files.

    transformers hands over the tensors of one file at a time, in memory or on the meta device.
    """
    from transformers import modeling_utils

    before = modeling_utils.safe_save_file
    modeling_utils.safe_save_file = write
    try:
        yield
    finally:
        modeling_utils.safe_save_file = before


def find_buffers_as_parameters(model: Any) -> None:
    """Make ``get_parameter`` of a model of transformers find buffers as well.

    ``save_pretrained`` of older releases asks for every tensor on the meta device so.
    """

    def found(name: str) -> Any:
        module, _, own = name.rpartition(".")
        return getattr(model.get_submodule(module), own)

    vars(model)["get_parameter"] = found


def given_state_dict() -> dict[str, Any] | None:
    """Returns the ``state_dict=`` of the ``save_pretrained`` that called the caller of this function, if there is one.

    transformers drops it for a model with a quantizer, and asks the quantizer instead, which is not told. The Trainer
    gives the gathered tensors of a model under FSDP there, which no process could gather alone.
    """
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame.f_back if frame is not None else None
    if frame is None or frame.f_code.co_name != "save_pretrained":
        return None
    return cast("dict[str, Any] | None", frame.f_locals.get("state_dict"))


def replace_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Make a module call `forward`, or that of its class again when None; hooks of accelerate still run around it."""
    if "_old_forward" in vars(module) and hasattr(module, "_hf_hook"):
        vars(module)["_old_forward"] = forward or MethodType(type(module).forward, module)
    elif forward is not None:
        vars(module)["forward"] = forward
    else:
        vars(module).pop("forward", None)


def has_experts_interface(module: nn.Module) -> bool:
    """Returns whether transformers' ``use_experts_implementation`` decorates the class of a module, not a base class.

    Such a layer has parameters ``gate_up_proj`` or ``up_proj`` and ``down_proj`` of three dimensions, and says with
    ``has_gate``, ``has_bias``, ``is_transposed`` and ``_apply_gate`` how they are used.
    """
    is_replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    forward = None if is_replaced else vars(type(module)).get("forward")
    return getattr(forward, "__globals__", {}).get("__name__") == "transformers.integrations.moe"


def move_own_tensors(module: nn.Module, device: torch.device) -> None:
    """``module.to(device)`` without its submodules; parameters stay the same objects."""
    module._apply(lambda tensor: tensor.to(device), recurse=False)  # type: ignore[no-untyped-call]


def pre_hooks_of(module: nn.Module) -> list[Any]:
    """The hooks that run before the module's ``forward``."""
    return list(module._forward_pre_hooks.values())


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers by name."""
    return module._buffers


def saved_buffers_of(module: nn.Module) -> list[Tensor]:
    """The module's own buffers that its ``state_dict`` holds."""
    left_out = module._non_persistent_buffers_set
    return [buffer for name, buffer in module._buffers.items() if buffer is not None and name not in left_out]


def convolves_its_own_way(kind: type[nn.Module]) -> bool:
    """Returns whether the class of a convolution has a ``_conv_forward`` of its own, which ``forward`` calls."""
    layers = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d  # what transposed ones inherit is never called
    own = getattr(kind, "_conv_forward", None)
    return own is not None and own not in [layer._conv_forward for layer in layers]


def convolve_its_own_way(module: nn.Module, x: Tensor) -> Tensor:
    """Returns what ``_conv_forward`` of such a subclass does, as ``forward`` of ``torch.nn.Conv2d`` calls it."""
    y: Tensor = cast(Any, module)._conv_forward(x, module.weight, module.bias)
    return y


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


def in_transform() -> bool:
    """Returns whether a transform of ``torch.func`` (``grad``, ``vmap``, ...) or a forward-mode derivative is taken."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def static_shape(tensor: Tensor) -> tuple[int, ...]:
    """Returns the shape of a parameter as integers; in ``torch.jit.trace`` it consists of tensors otherwise."""
    if torch.compiler.is_compiling() or not is_jit_traced():
        return tuple(tensor.shape)
    state, functions = torch._C._get_tracing_state(), cast(Any, torch._C)
    functions._set_tracing_state(None)
    try:
        return tuple(tensor.shape)
    finally:
        functions._set_tracing_state(state)


is_jit_traced: Callable[[], bool] = torch._C._is_tracing
"""Returns whether ``torch.jit.trace`` is running; ``torch.jit.is_tracing`` takes 0.1 us longer."""


def reset_accelerate_state(*, processes: bool = False) -> None:
    """Reset the precision and plugins of the last ``accelerate.Accelerator``, which the next one would inherit.

    Args:
        processes: also reset the device and the process group.
    """
    from accelerate.state import AcceleratorState  # slow to import, and not needed for compression

    AcceleratorState._reset_state(processes)


def parsed_expression(text: str) -> tuple[Any, int]:
    """Returns the syntax tree that ``re`` makes of a regular expression, as pairs (kind, value), and its flags.

    Raises:
        re.error: when it is none; or OverflowError, or RecursionError.
    """
    parser: Any = import_module("re._parser")
    tree = parser.parse(text)
    return tree, int(tree.state.flags)


def exchange_paths(first: Path, second: Path) -> bool:
    """Exchange two files or folders in one step; returns False where the system or the file system cannot.

    By ``renameat2(..., RENAME_EXCHANGE)`` on Linux and ``renamex_np(..., RENAME_SWAP)`` on macOS, which Python does not
    offer.
    """
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return bool(library.renamex_np(*names, 2) == 0)
    if library is None or not hasattr(library, "renameat2"):
        return False
    here = -100  # AT_FDCWD
    return bool(library.renameat2(here, names[0], here, names[1], 2) == 0)

"""Models sharded by FSDP2: working copies, and tensors gathered from their shards and put back.

torch's ``fully_shard`` rewrites a module for good: another class, hooks, parameters that hold one process's
rows. So a copy is sharded, never the caller's module, and what the copy learned is gathered into that.

Source: Zhao et al., PyTorch FSDP (2023); ``torch.distributed.fsdp.fully_shard``.
"""

from __future__ import annotations

import copy
import gc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from tdkit.models.preparation import prepare
from torch import Tensor, nn

from tdkit_distill.errors import InterruptedRun, NotFiniteError, StageError
from tdkit_distill.models.layer_maps import blocks


def is_sharding(engine: Any) -> bool:
    """Whether an accelerate engine shards by FSDP2."""
    return bool(getattr(engine, "is_fsdp2", False))


def replica(model: nn.Module) -> Any:
    """A copy of a module with parameters of its own that share the storage; buffers are copied.

    No dense weight is held for speed in it: sharding rewrites factors without moving their version counters.
    """
    aliases = {
        id(p): nn.Parameter(p.detach().contiguous(), requires_grad=p.requires_grad)  # shards are cut from whole rows
        for p in model.parameters()
    }
    return prepare(copy.deepcopy(model, dict[int, Any](aliases)), prefer="memory")


def shard(root: nn.Module, model: nn.Module, engine: Any, *, training: bool, apart: Sequence[nn.Module] = ()) -> None:
    """Cut all parameters below `root` into one shard per process, in place, on the engine's device.

    Each layer of `model`, which stands inside `root`, is gathered only while it runs. What is in no layer,
    or in several, is gathered while `root` runs.

    Args:
        engine: its FSDP plugin says which classes are layers (otherwise the children of the longest
            ``ModuleList`` are), and how they are gathered, offloaded and rounded.
        training: False keeps the parameters' own precision and frees everything after each forward.
        apart: further modules below `root` to gather on their own; a dtype may differ only between such.

    Raises:
        StageError: when a model to train has none of the classes that the plugin names.
    """
    from torch.distributed.device_mesh import init_device_mesh  # these are slow to import
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    gc.collect()  # the shards of an earlier copy lie in reference cycles: they go before there are more
    plugin = engine.state.fsdp_plugin
    classes = plugin.transformer_cls_names_to_wrap or []
    names = [name for name, module in model.named_modules() if type(module).__name__ in classes]
    if training and classes and not names:
        raise StageError(f"fsdp_transformer_layer_cls_to_wrap: the student has no layer of {', '.join(classes)}")
    rounding = plugin.mixed_precision_policy if training else None
    options: dict[str, Any] = {
        "mesh": init_device_mesh(engine.device.type, (engine.num_processes,)),
        "offload_policy": plugin.cpu_offload or OffloadPolicy(),
        # parameters and gradients are rounded; what goes in and out (labels, losses) is autocast's
        "mp_policy": (
            replace(rounding, output_dtype=None, cast_forward_inputs=False) if rounding else MixedPrecisionPolicy()
        ),
    }
    for layer in (*closed(model, names or blocks(model)), *apart):
        fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward if training else True, **options)
    fully_shard(root, reshard_after_forward=None if training else True, **options)
    if engine.device.type == "cpu":
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo of torch 2.8 adds where a mean is asked for


def closed(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """The modules of these names, inner ones first, that have parameters and share none with what is outside."""
    paths = defaultdict(set)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths[parameter].add(path)
    found = []
    for name in reversed(names):
        module = model.get_submodule(name)
        held = {path for parameter in module.parameters() for path in paths[parameter]}
        if held and all(path.startswith(f"{name}.") for path in held):
            found.append(module)
    return found


def reshard(model: nn.Module) -> None:
    """Free the parameters that a forward without a backward has left gathered, so that they are shards again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def working_copy(student: nn.Module, engine: Any) -> Iterator[nn.Module]:
    """The module to train: the student itself or, where the engine shards, a copy that is gathered into it at the end.

    An interruption and a loss that is not finite, which all processes meet together, are such ends too.
    """
    if not is_sharding(engine):
        yield student.to(engine.device)
        return
    trained = replica(student)
    try:
        yield trained
    except (InterruptedRun, NotFiniteError):
        _gather_into(student, trained)
        raise
    _gather_into(student, trained)


@torch.no_grad()
def _gather_into(model: nn.Module, sharded: nn.Module) -> None:
    reshard(sharded)
    whole = named_tensors(model)
    for name, tensor in named_tensors(sharded).items():
        whole[name].copy_(gathered(tensor))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor, gathered where this process holds a shard of it; a collective operation for all processes."""
    if not _is_shard(tensor):
        return tensor
    shards: Any = tensor.detach()
    whole: Tensor = shards.to(shards.device_mesh.device_type).full_tensor()  # a shard may be offloaded to the CPU
    return whole


@torch.no_grad()
def put(whole: Tensor, target: Tensor) -> None:
    """Copy a whole tensor, which every process has, into one of which this process may hold a shard."""
    if _is_shard(target):
        from torch.distributed.tensor import distribute_tensor

        shards: Any = target
        mesh = shards.device_mesh
        cut = distribute_tensor(whole.to(mesh.device_type), mesh, shards.placements, src_data_rank=None)
        whole, target = cut.to_local(), shards.to_local()
    target.copy_(whole)


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")  # a DTensor, whose module takes most of a second to import


@torch.no_grad()
def share_weights(model: nn.Module, engine: Any) -> None:
    """Broadcast the first process's parameters and buffers where only that one has read them.

    This is what ``fsdp_cpu_ram_efficient_loading`` of accelerate makes of transformers' ``from_pretrained``.
    """
    if not (is_sharding(engine) and engine.state.fsdp_plugin.cpu_ram_efficient_loading):
        return
    for tensor in named_tensors(model).values():
        sent = tensor.detach().to(engine.device, copy=True)
        torch.distributed.broadcast(sent, 0)
        tensor.copy_(sent)

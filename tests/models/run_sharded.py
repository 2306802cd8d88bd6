"""DDP and FSDP2 of a compressed model in two processes; `tests/models/test_sharded.py` runs it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import tdkit
from tdkit import Decomposition, Policy, Rule
from tdkit.decompositions.base import FactorizedMatrix
from tdkit.errors import TdkitError
from tdkit.models.hosts.base import FactorizedModule
from tdkit.models.preparation import factorized_matrices
from tests.conftest import TiedModel

KINDS: list[Decomposition] = [tdkit.LowRank(rank=4), tdkit.PermutedKronecker(terms=2), tdkit.TTMatrix(ranks=4)]


def compressed(kind: Decomposition) -> nn.Module:
    torch.manual_seed(0)
    return tdkit.compress(TiedModel(), Policy([Rule("*", kind)], allow_growth=True), progress=False)


def whole(tensor: Tensor) -> Tensor:
    full: Any = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def sharded(model: Any, of: type[nn.Module] | None) -> nn.Module:
    for matrix in factorized_matrices(model):
        matrix.lay_out_for_rows()  # fully_shard takes contiguous parameters only
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in (model.up, model.down):  # what is tied stays together, in the model
        for module in list(layer.modules()) if of else []:
            if isinstance(module, of):
                fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo of torch 2.8 adds where a mean is asked for
    return model


def train(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Two steps in eval mode, each after an inference that may cache; returns what the inferences gave."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    found = []
    for ids in batches:
        with torch.no_grad():
            found.append(model(ids))
        model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found.append(model(batches[0]))
    return found


def run() -> dict[str, float]:
    """Returns the largest differences from a model in one process, by what was wrapped."""
    batches = [torch.randint(0, 40, (2, 80), generator=torch.Generator().manual_seed(step)) for step in range(3)]
    found = {}
    for kind in KINDS:
        for prefer in ("memory", "speed"):
            alone = tdkit.prepare(compressed(kind), prefer=prefer)
            expected = train(alone, batches)
            wraps = {
                "ddp": lambda model: DistributedDataParallel(model),
                "fsdp": lambda model: sharded(model, None),
                "fsdp of layers": lambda model: sharded(model, FactorizedModule),
                "fsdp of matrices": lambda model: sharded(model, FactorizedMatrix),
            }
            for name, wrap in wraps.items():
                model = wrap(tdkit.prepare(copy.deepcopy(compressed(kind)), prefer=prefer))
                outputs = train(model, batches)
                gaps = [
                    float((one - other).abs().max() / other.abs().max())
                    for one, other in zip(outputs, expected, strict=True)
                ]
                found[f"{kind.name} {prefer} {name}"] = max(gaps)
                with pytest.raises(TdkitError, match="holds the parameters of this model"):
                    tdkit.to_dense(model)
    return found

"""What is sharded and what is refused, as far as one process can tell; test_processes.py runs two."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tdkit
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from distill_models import Plain, factorized, gpt2, ids
from tdkit.decompositions import FactorizedMatrix
from tdkit.support.compatibility import reset_accelerate_state

from tdkit_distill import distill
from tdkit_distill.errors import StageError
from tdkit_distill.models.layer_maps import blocks
from tdkit_distill.models.sharding import closed, gathered, put, replica

STAGE = {"losses": {"logits": 1}, "steps": 2, "batch_size": 4}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An engine that says it shards, with these options of the plugin."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # the plugin sets it, and it goes with this test
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")

    def make(**options: Any) -> Accelerator:
        reset_accelerate_state(processes=True)
        plugin = FullyShardedDataParallelPlugin(**options)
        made = Accelerator(cpu=True, fsdp_plugin=plugin)
        made.state.fsdp_plugin, made.state.distributed_type = plugin, DistributedType.FSDP
        return made

    yield make
    reset_accelerate_state(processes=True)


@pytest.mark.parametrize("folder", [False, True])
def test_fsdp1_is_refused_with_the_remedy(engine: Any, folder: bool, tmp_path: Any) -> None:
    where = tmp_path if folder else None
    with pytest.raises(StageError, match=r"FSDP version 1 is not supported.*Set fsdp_version: 2 .*--fsdp_version 2"):
        distill(gpt2(1), gpt2(), STAGE, ids(), accelerator=engine(fsdp_version=1), folder=where)


def test_options_that_a_sharded_run_does_not_follow_are_told_together(engine: Any) -> None:
    made = engine(fsdp_version=2, activation_checkpointing=True, ignored_modules=".*wte")
    with pytest.raises(StageError) as caught:
        distill(gpt2(1), gpt2(), STAGE, ids(), accelerator=made, running={"compile": "eager"})
    for part in ("use gradient_checkpointing of running", "fsdp_ignored_modules", "compile, or a dynamo_backend"):
        assert part in str(caught.value)


def test_a_layer_that_shares_a_parameter_is_not_sharded_on_its_own() -> None:
    model = gpt2(3)
    names = blocks(model)
    assert closed(model, names) == [model.transformer.h[k] for k in (2, 1, 0)]
    model.transformer.h[1].mlp.c_fc.bias = model.transformer.h[2].mlp.c_fc.bias  # one parameter, two layers
    assert closed(model, names) == [model.transformer.h[0]]
    model.transformer.h[1].attn.c_proj = model.transformer.h[0].attn.c_proj  # one module, two layers
    assert closed(model, names) == []
    plain = Plain(2)
    plain.blocks[1] = plain.blocks[0]
    assert closed(plain, blocks(plain)) == []
    plain.blocks = torch.nn.ModuleList([torch.nn.Tanh(), torch.nn.Tanh()])
    assert closed(plain, blocks(plain)) == [], "there is nothing to shard"


def test_a_replica_shares_storage_and_nothing_else() -> None:
    model = factorized()
    tdkit.prepare(model, prefer="speed")
    copy = replica(model)
    for of, prefer in ((model, "speed"), (copy, "memory")):
        assert {module.prefer for module in of.modules() if isinstance(module, FactorizedMatrix)} == {prefer}
    mine, theirs = dict(model.named_parameters()), dict(copy.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        assert theirs[name] is not parameter
        assert torch.equal(theirs[name], parameter)
        assert theirs[name].is_contiguous()
        if parameter.is_contiguous():
            assert theirs[name].data_ptr() == parameter.data_ptr(), "no second copy of the weights"
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(model.buffers(), copy.buffers(), strict=True))


def test_a_whole_tensor_is_gathered_and_put_as_it_is() -> None:
    whole, target = torch.randn(3, 2), torch.zeros(3, 2)
    assert gathered(whole) is whole
    put(whole, target)
    assert torch.equal(target, whole)

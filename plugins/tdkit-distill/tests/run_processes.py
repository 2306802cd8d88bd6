"""Runs of two processes, each with the whole models (DDP) or with shards of them (FSDP), for a test to compare.

python -m torch.distributed.run --nproc_per_node 2 run_processes.py FOLDER
"""

from __future__ import annotations

import gc
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from distill_models import factorized, gpt2, ids, same_weights, text, uneven
from tdkit.support.compatibility import reset_accelerate_state
from torch import nn
from torch.distributed.tensor import DTensor

from tdkit_distill import Windows, build_cache, distill
from tdkit_distill.data.order import Order, mixed_seed
from tdkit_distill.errors import CacheError, InterruptedRun, NotFiniteError, StorageError
from tdkit_distill.loop.engine import Result
from tdkit_distill.models.sharding import is_sharding

LOSSES = {"logits": {"temperature": 2.0}, "hidden": 0.5, "attention": 0.5, "cross_entropy": 1}
ONE = {"name": "one", "losses": LOSSES, "steps": 6, "batch_size": 4, "optimizer": {"lr": 3e-2}}
TWO = {"name": "two", "losses": {"hidden": {"layers": ["transformer.h.0"]}}, "steps": 2, "trainable": "factors"}
THREE = {"name": "three", "losses": {"cross_entropy": 1}, "steps": 3, "batch_size": 8, "accumulation": 2}
THREE["optimizer"] = TWO["optimizer"] = {"lr": 1e-2}
STAGES: list[Any] = [ONE, TWO, THREE]
PADDED: Any = {
    "losses": {**LOSSES, "attention_scores": 0.5},
    "steps": 3,
    "batch_size": 16,
    "accumulation": 2,
    "optimizer": {"lr": 3e-2},
}
RUNNING = {"checkpoint_every": 4, "evaluate_every": 2, "device": "cpu"}


def sharding_engine(precision: str = "no", **options: Any) -> Accelerator:
    """An engine that shards by FSDP2 on a CPU.

    accelerate turns to FSDP on GPUs and their like only, although torch's ``fully_shard`` and gloo do it on a
    CPU too. What `AcceleratorState` sets there is set here, and nothing else.
    """
    reset_accelerate_state()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
    engine = Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision=precision)
    if precision != "no":
        plugin.set_mixed_precision(precision)
    engine.state.fsdp_plugin = plugin
    engine.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    assert is_sharding(engine)
    return engine


def run(
    student: nn.Module,
    folder: Path | None = None,
    engine: Accelerator | None = None,
    *,
    at: int = 0,
    act: Callable[[Any], None] | None = None,
    shares: set[float] | None = None,
    stages: Any = STAGES,
    data: Any = None,
    **running: Any,
) -> Result:
    """One run; `act` is given what the student puts out in its training forward number `at`.

    `shares` is told how much of the layers' parameters this process holds when a model is called.
    """
    calls = 0

    def call(model: Any, batch: Any) -> Any:
        nonlocal calls
        if shares is not None:
            layers: list[Any] = list(model.transformer.h.parameters())
            shares.add(sum(p.to_local().numel() for p in layers) / sum(p.numel() for p in layers))
        output = model(batch["input_ids"], attention_mask=batch.get("attention_mask"))
        calls += model.training
        if act is not None and model.training and calls == at:
            act(output)
        return output

    return distill(
        student,
        gpt2(2, 16),
        stages,
        text() if data is None else data,
        folder=folder,
        held_out=text(6),
        running={**RUNNING, **running},
        call=call,
        accelerator=engine,
    )


def figures(result: Result) -> dict[str, list[Any]]:
    """Losses, gradient norms and terms of every step, and the held-out losses."""
    steps = [entry for entry in result.history if "terms" in entry]
    return {
        "steps": [[entry["loss"], entry["gradient_norm"], *entry["terms"].values()] for entry in steps],
        "held_out": [entry["held_out"] for entry in result.history if "held_out" in entry],
    }


def is_ordinary(student: Any, like: nn.Module) -> bool:
    """Whether a student is the kind of module that it was: classes, hooks, names, whole parameters."""
    return (
        all(type(p) is nn.Parameter and not isinstance(p.data, DTensor) for p in student.parameters())
        and [type(m) for m in student.modules()] == [type(m) for m in like.modules()]
        and not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in student.modules())
        and {n: t.shape for n, t in student.state_dict().items()} == {n: t.shape for n, t in like.state_dict().items()}
        and student(ids(2)).logits.shape == (2, 8, 48)
    )


def damaged(folder: Path) -> str:
    """The error of a run whose cached teacher is damaged in one row, which the second of two processes reads first."""
    rows = Windows(text())
    cache = build_cache(gpt2(2, 16), rows, folder, k=4, rows_per_shard=1)
    row = int(Order(len(rows), 1.0, mixed_seed(0, "rows", 0)).take(0, 4)[2])
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        shard = folder / f"shard-{row:05d}.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
    PartialState().wait_for_everyone()
    try:
        distill(factorized(), cache, {"losses": {"logits": 1}, "steps": 2, "batch_size": 4}, rows, running=RUNNING)
    except CacheError as error:
        return str(error)
    return ""


class BrokenRun(Exception):  # noqa: N818 - a power cut rather than an error
    """What a run dies of without saving itself."""


def main(place: str) -> None:
    torch.set_num_threads(1)
    factorized()  # imports the rest
    gc.freeze()  # each sharding collects what is left of the one before; what was imported need not be searched
    folder, found = Path(place), dict[str, Any]()

    def keep(name: str, student: nn.Module, result: Result) -> None:
        found[name] = {"state": student.state_dict(), **figures(result)}

    def stop(_: Any) -> None:
        if PartialState().process_index == 1:  # one process is told, all must leave together
            os.kill(os.getpid(), signal.SIGTERM)

    def die(_: Any) -> None:
        raise BrokenRun

    def spoil(output: Any) -> None:
        if PartialState().process_index == 1:
            output.logits = output.logits * math.nan

    def broken(student: nn.Module, kind: type[Exception], *arguments: Any, **options: Any) -> bool:
        try:
            run(student, *arguments, **options)
        except kind:
            return is_ordinary(student, factorized())
        return False

    student = factorized()
    keep("ddp", student, run(student))
    found["handed over"] = broken(factorized(), InterruptedRun, folder / "handed", at=3, act=stop)

    student = factorized()
    keep("padded ddp", student, run(student, stages=PADDED, data=uneven()))

    if PartialState().is_main_process:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, size[1]))
    found["full disk"] = broken(factorized(), StorageError, folder / "full")
    if PartialState().is_main_process:
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
    found["damaged"] = damaged(folder / "cache")

    engine, shares = sharding_engine(), set[float]()
    student = factorized()
    keep("padded fsdp", student, run(student, None, engine, stages=PADDED, data=uneven()))
    student = factorized()
    keep("fsdp", student, run(student, folder / "fsdp", engine, shares=shares))
    found["shares"], found["ordinary"] = sorted(shares), is_ordinary(student, factorized())
    student = factorized()
    keep("handed", student, run(student, folder / "handed", engine))

    undisturbed, student = factorized(dropout=0.1), factorized(dropout=0.1)
    run(undisturbed, None, engine)
    found["left"] = [
        broken(factorized(dropout=0.1), kind, folder / "stopped", engine, at=at, act=act)
        for at, act, kind in ((2, stop, InterruptedRun), (3, die, BrokenRun), (6, stop, InterruptedRun))
    ]
    found["left"].append(broken(factorized(), NotFiniteError, None, engine, at=2, act=spoil))
    found["resumed_at"] = run(student, folder / "stopped", engine).resumed_at
    found["same"] = same_weights(undisturbed, student)

    student = factorized()
    if engine.process_index:  # where only the first process reads weights, the others have none
        for parameter in student.parameters():
            nn.init.zeros_(parameter)
    loading = sharding_engine(
        cpu_ram_efficient_loading=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
    )
    keep("loaded", student, run(student, None, loading, gradient_checkpointing=True))
    student = factorized()
    keep("bf16", student, run(student, None, sharding_engine("bf16"), precision="bf16", teacher_dtype="bfloat16"))

    torch.save(found, folder / f"{engine.process_index}.pt")
    engine.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

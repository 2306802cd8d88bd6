"""The ``accelerate.Accelerator`` of a run, and checks of the options that it does not support."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tdkit.errors import OptionError
from tdkit.support.compatibility import reset_accelerate_state
from tdkit.support.trackers import check_trackers
from torch import nn

from tdkit_distill.errors import StageError
from tdkit_distill.loop.stages import Running, Stage, learning_rates
from tdkit_distill.loop.trainee import STUDENT, Trainee
from tdkit_distill.models.sharding import is_sharding, shard


def make_accelerator(running: Running, folder: Path | None, stages: list[Stage]) -> Any:
    """An ``accelerate.Accelerator`` for a run's options.

    Raises:
        StageError: for a device or tracker that this machine does not offer.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs  # slow to import

    for name, device in (("device", running.device), ("teacher_device", running.teacher_device)):
        _check_device(name, device)
    _check_trackers(running.trackers, folder)
    reset_accelerate_state()  # the precision that an earlier run in this process chose would stay
    ends = all({label.partition("@")[0] for label in stage.losses} & {"cross_entropy", "logits"} for stage in stages)
    return Accelerator(
        mixed_precision=running.precision,
        cpu=running.device == "cpu",
        log_with=list(running.trackers) or None,
        project_dir=None if folder is None else str(folder),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not ends, broadcast_buffers=False)],
    )


def check_accelerator(engine: Any, running: Running) -> None:
    """Refuse options that an accelerator, made here or the caller's own, would ignore.

    Raises:
        StageError: for fp16 on a CPU, for gradient accumulation of its own, for FSDP version 1, and for options that do
            not go with FSDP.
    """
    if engine.mixed_precision == "fp16" and engine.device.type == "cpu":
        raise StageError(
            "precision: fp16, but this run is on the CPU, where accelerate would train in float32 without a word: fp16 "
            "gradients need a GPU and its loss scaler. Set precision: bf16, which a CPU can do, or no"
        )
    if engine.gradient_accumulation_steps != 1:
        raise StageError(
            f"this accelerator has gradient_accumulation_steps={engine.gradient_accumulation_steps}, by which it would "
            "divide the loss once more: leave it at 1, and set accumulation in the stage"
        )
    _check_sharding(engine, running)


def _check_sharding(engine: Any, running: Running) -> None:
    """Refuse options that a sharded run would ignore.

    Raises:
        StageError: for FSDP1, and for options of FSDP that are not followed here.
    """
    if not str(engine.distributed_type).endswith("FSDP"):
        return
    if not is_sharding(engine):
        raise StageError(
            "FSDP version 1 is not supported: it keeps flat parameters, of which no student can be read while it "
            "trains. Set fsdp_version: 2 (accelerate launch --use_fsdp --fsdp_version 2, accelerate 1.7 or newer), or "
            "train with DDP"
        )
    plugin = engine.state.fsdp_plugin
    faults = []
    if plugin.activation_checkpointing:
        faults.append("fsdp_activation_checkpointing: use gradient_checkpointing of running instead")
    if plugin.ignored_modules is not None:
        faults.append("fsdp_ignored_modules: what FSDP leaves alone would not be averaged over the processes; drop it")
    if getattr(engine, "parallelism_config", None) is not None:
        faults.append("a parallelism_config: only plain FSDP over all processes is supported; drop it")
    if running.compile or engine.state.dynamo_plugin.backend.value != "NO":
        faults.append("compile, or a dynamo_backend of accelerate: a compiled student is not sharded here; drop it")
    if faults:
        raise StageError("with FSDP this run cannot take\n" + "\n".join(faults))


def prepared(
    engine: Any, trainee: Trainee, trainable: set[str], stage: Stage
) -> tuple[Any, torch.optim.Optimizer, Any]:
    """Prepare a trainee and its optimizer by the accelerator for one stage.

    Args:
        trainable: names of the student's parameters to train; those of the loss terms always are.

    Returns:
        The wrapped trainee, the optimizer, and the wrapped optimizer.
    """
    if is_sharding(engine):
        learned = [term for term in trainee.terms if any(True for _ in term.parameters())]
        shard(trainee, trainee.student, engine, training=True, apart=learned)
        optimizer = _optimizer(trainee, trainable, stage, fused=None)
        return trainee, optimizer, engine.prepare_optimizer(optimizer)
    fused = True if engine.device.type == "cpu" else None  # a quarter of the time there
    optimizer = _optimizer(trainee.to(engine.device), trainable, stage, fused)
    model, wrapped = engine.prepare(trainee, optimizer)
    return model, optimizer, wrapped


def _optimizer(trainee: Trainee, trainable: set[str], stage: Stage, fused: bool | None) -> torch.optim.Optimizer:
    options = stage.optimizer
    factors = learning_rates(trainee.student, options, f"stage '{stage.name}', optimizer.scale")
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in trainee.named_parameters():
        own = name.removeprefix(STUDENT)
        if name.startswith(STUDENT) and own not in trainable:
            continue
        factor = factors[own] if name.startswith(STUDENT) else 1.0
        groups.setdefault((parameter.ndim >= 2, factor), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": options.weight_decay if decayed else 0.0, "factor": factor}
            for (decayed, factor), parameters in groups.items()
        ],
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        fused=fused,
    )


def _check_device(name: str, device: str | None) -> None:
    if device is not None and device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise StageError(
            f"{name}: {device}, but this torch ({torch.__version__}) sees no CUDA device: set {name}: cpu, or install "
            "a torch build for CUDA and check nvidia-smi"
        )


def _check_trackers(trackers: tuple[str, ...], folder: Path | None) -> None:
    try:
        check_trackers(trackers, folder)
    except OptionError as error:
        raise StageError(str(error)) from None

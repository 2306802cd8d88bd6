"""The accelerate engine that a run goes through, made for its options, and what such a run cannot do told early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tdkit.errors import did_you_mean
from torch import nn

from tdkit_distill.errors import StageError
from tdkit_distill.sharding import check_sharding, is_sharding, shard
from tdkit_distill.stages import Running, Stage
from tdkit_distill.trainee import STUDENT, Trainee


def make_accelerator(running: Running, folder: Path | None, stages: list[Stage]) -> Any:
    """An ``accelerate.Accelerator`` for a run's options.

    Raises:
        StageError: for a device or tracker that this machine does not offer.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs  # slow to import
    from accelerate.state import AcceleratorState

    for name, device in (("device", running.device), ("teacher_device", running.teacher_device)):
        _check_device(name, device)
    _check_trackers(running.trackers, folder)
    AcceleratorState._reset_state()  # a precision chosen by an earlier run in this process would stay
    ends = all({label.partition("@")[0] for label in stage.losses} & {"cross_entropy", "logits"} for stage in stages)
    return Accelerator(
        mixed_precision=running.precision,
        cpu=running.device == "cpu",
        log_with=list(running.trackers) or None,
        project_dir=None if folder is None else str(folder),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not ends, broadcast_buffers=False)],
    )


def check_accelerator(engine: Any, running: Running) -> None:
    """Refuse what an engine, one made here or the caller's own, would not do as it says.

    Raises:
        StageError: for fp16 on a CPU, for FSDP version 1, and for options that do not go with FSDP.
    """
    if engine.mixed_precision == "fp16" and engine.device.type == "cpu":
        raise StageError(
            "precision: fp16, but this run is on the CPU, where accelerate would train in float32 without a word: fp16 "
            "gradients need a GPU and its loss scaler. Set precision: bf16, which a CPU can do, or no"
        )
    check_sharding(engine, running)


def prepared(
    engine: Any, trainee: Trainee, trainable: set[str], stage: Stage
) -> tuple[Any, torch.optim.Optimizer, Any]:
    """What the engine makes of a trainee and its optimizer for the steps of a stage.

    Args:
        trainable: names of the student's parameters that learn; those of the terms always do.

    Returns:
        The trainee in the engine's wrapper, the optimizer itself, and that in the engine's wrapper.
    """
    if is_sharding(engine):
        learned = [term for term in trainee.terms if any(True for _ in term.parameters())]
        shard(trainee, trainee.student, engine, training=True, apart=learned)
        optimizer = _optimizer(trainee, trainable, stage)
        return trainee, optimizer, engine.prepare_optimizer(optimizer)
    optimizer = _optimizer(trainee.to(engine.device), trainable, stage)
    model, wrapped = engine.prepare(trainee, optimizer)
    return model, optimizer, wrapped


def _optimizer(trainee: Trainee, trainable: set[str], stage: Stage) -> torch.optim.Optimizer:
    options = stage.optimizer
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in trainee.named_parameters():
        if name.startswith(STUDENT) and name.removeprefix(STUDENT) not in trainable:
            continue
        (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
    )


def _check_device(name: str, device: str | None) -> None:
    if device is not None and device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise StageError(
            f"{name}: {device}, but this torch ({torch.__version__}) sees no CUDA device: set {name}: cpu, or install "
            "a torch build for CUDA and check nvidia-smi"
        )


def _check_trackers(trackers: tuple[str, ...], folder: Path | None) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}
    installed = {str(name) for name in get_available_trackers()}
    for tracker in trackers:
        if tracker == "all":
            continue
        if tracker not in known:
            hint = did_you_mean(tracker, known) or f". accelerate knows {', '.join(sorted(known))}"
            raise StageError(f"trackers: there is no tracker '{tracker}'{hint}")
        if tracker not in installed:
            raise StageError(f"trackers: the package of '{tracker}' is not installed: pip install {_package(tracker)}")
        if folder is None and known[tracker].requires_logging_directory:
            raise StageError(f"trackers: '{tracker}' writes into the run's folder, and there is none: pass folder=")


def _package(tracker: str) -> str:
    return {"tensorboard": "tensorboardX"}.get(tracker, tracker.replace("_", "-"))

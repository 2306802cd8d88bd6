"""The accelerate engine that a run goes through, made for its options, and what such a run cannot do told early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tdkit.errors import did_you_mean

from tdkit_distill.errors import StageError
from tdkit_distill.stages import Running, Stage


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


def check_accelerator(engine: Any, folder: Path | None) -> None:
    """Refuse what an engine, one made here or the caller's own, would not do as it says.

    Raises:
        StageError: for fp16 on a CPU, and for a student sharded by FSDP with a folder.
    """
    if engine.mixed_precision == "fp16" and engine.device.type == "cpu":
        raise StageError(
            "precision: fp16, but this run is on the CPU, where accelerate would train in float32 without a word: fp16 "
            "gradients need a GPU and its loss scaler. Set precision: bf16, which a CPU can do, or no"
        )
    if folder is not None and str(engine.distributed_type).endswith("FSDP"):
        raise StageError(
            "a student sharded by FSDP cannot be checkpointed here: pass folder=None and save it through accelerate, "
            "or train with DDP"
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

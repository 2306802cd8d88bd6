"""The options of a stage of distillation, and of how stages are run."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from tdkit.decompositions import FactorizedMatrix
from tdkit.errors import did_you_mean
from torch import nn

from tdkit_distill.errors import StageError
from tdkit_distill.loop.schedule import Schedule
from tdkit_distill.losses.loss import Loss, read_losses

GROUPS = ("all", "factors", "norms", "biases", "embeddings")


class Options(BaseModel):
    """Base class of options; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Optimizer(Options):
    """AdamW. Weight decay applies to parameters of two or more dimensions.

    Attributes:
        lr: the learning rate that the schedule starts from.
        scale: factors on it by kind of parameter, ``{pattern: factor}`` with the patterns of `Stage.trainable`; the
            first one that selects a parameter counts.

    Source: Loshchilov and Hutter, Decoupled weight decay (2019).
    """

    lr: float = Field(default=2.5e-4, gt=0)
    scale: dict[str, Annotated[float, Field(gt=0)]] = {}
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)


class Stage(Options):
    """A stage of training with its own losses, data, optimizer and trainable parameters.

    Attributes:
        losses: ``{name: options}`` or ``{name: weight}``; ``name@label`` for a second one of a kind.
        tokens: its length, every position of every row counted, also as text such as "20M"; give this or `steps`.
        steps: its length in optimizer steps; give this or `tokens`.
        batch_size: rows per optimizer step, over all processes and all accumulated parts.
        accumulation: in how many parts a step's rows are run.
        clip: bound on the gradient's norm; None leaves it alone.
        trainable: globs over parameter names, or ``all``, ``factors``, ``norms``, ``biases``, ``embeddings``; what
            follows a ``!`` is left out.
        data: which of several data sets; the only one when None.
        share: of the data's rows, chosen by the seed.
        keep: the weights that the stage ends with: the ``last`` ones, or the ``best`` by the first held-out rows, which
            are then measured before the first step too.
        patience: the stage ends after so many measurements that were no better than the best one; needs ``best``.
    """

    name: str = "distill"
    losses: dict[str, Any]
    tokens: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    accumulation: int = Field(default=1, ge=1)
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip: float | None = Field(default=1.0, gt=0)
    trainable: tuple[str, ...] = ("all",)
    data: str | None = None
    share: float = Field(default=1.0, gt=0, le=1)
    keep: Literal["last", "best"] = "last"
    patience: int | None = Field(default=None, ge=1)

    @field_validator("losses")
    @classmethod
    def _losses_are_losses(cls, form: dict[str, Any]) -> dict[str, Any]:
        read_losses(form)
        return form

    @field_validator("tokens", mode="before")
    @classmethod
    def _units(cls, value: Any) -> Any:
        return count_of(value)

    @field_validator("trainable", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_length(self) -> Stage:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError(f"stage '{self.name}': give tokens or steps, and not both")
        if self.patience is not None and self.keep != "best":
            raise ValueError(f"stage '{self.name}': patience={self.patience} is for keep='best'")
        return self

    def loss_terms(self) -> dict[str, Loss]:
        """The losses as objects, by name."""
        return read_losses(self.losses)

    def step_count(self, length: int) -> int:
        """Optimizer steps for rows of `length` tokens."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // (self.batch_size * length))


class Running(Options):
    """How the stages are run.

    Attributes:
        precision: of the student's forward; autocast by accelerate. ``fp16`` needs a GPU.
        device: ``cpu`` or ``cuda``; None takes what there is.
        teacher_dtype: run a copy of the teacher in this dtype instead.
        teacher_device: run a copy of the teacher there instead.
        compile: the backend of ``torch.compile`` for the student, or true for ``inductor``.
        gradient_checkpointing: keep only each layer's input for the backward.
        checkpoint_every: optimizer steps between checkpoints; None saves at the end of stages only.
        keep: how many checkpoints stay.
        evaluate_every: optimizer steps between measurements on the held-out rows; None at stage ends only.
        trackers: as accelerate names them: ``tensorboard``, ``wandb``, ...; they are given every loss term.
        timings: wait for the device to tell teacher, student and optimizer time apart.
    """

    precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["cpu", "cuda"] | None = None
    teacher_dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    teacher_device: str | None = None
    compile: bool | str = False
    gradient_checkpointing: bool = False
    checkpoint_every: int | None = Field(default=None, ge=1)
    keep: int = Field(default=2, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)
    trackers: tuple[str, ...] = ()
    timings: bool = False


def count_of(value: Any) -> Any:
    """A count written as ``20M`` or ``1.5k`` as an integer; anything else as it is."""
    if not isinstance(value, str):
        return value
    scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(value[-1:].lower())
    try:
        return round(float(value[:-1]) * scale) if scale else int(value)
    except ValueError:
        raise ValueError(f"'{value}' is no count: write 2000000, 2M or 1.5k") from None


def read_stages(stages: Stage | Mapping[str, Any] | list[Stage | Mapping[str, Any]]) -> list[Stage]:
    """`Stage` objects from themselves or from their dictionary form.

    Raises:
        StageError: for a malformed one.
    """
    from pydantic import ValidationError

    given = stages if isinstance(stages, list | tuple) else [stages]
    found = []
    for number, one in enumerate(given):
        try:
            found.append(one if isinstance(one, Stage) else Stage.model_validate(dict(one)))
        except ValidationError as error:
            lines = [f"stage {number + 1}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise StageError("\n".join(lines)) from None
    if not found:
        raise StageError("give at least one stage")
    return found


def read_running(running: Running | Mapping[str, Any] | None) -> Running:
    """`Running` from itself or from its dictionary form.

    Raises:
        StageError: with every fault at once.
    """
    from pydantic import ValidationError

    if isinstance(running, Running):
        return running
    try:
        return Running.model_validate(dict(running or {}))
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            name = ".".join(map(str, fault["loc"]))
            hint = did_you_mean(name, Running.model_fields) if fault["type"] == "extra_forbidden" else ""
            lines.append(f"running.{name}: {fault['msg']} (got {fault['input']!r}){hint}")
        raise StageError("\n".join(lines)) from None


def trainable_names(model: nn.Module, patterns: tuple[str, ...], place: str) -> set[str]:
    """Names of the parameters that `patterns` select; those of a pattern after ``!`` are left out.

    Raises:
        StageError: when a pattern selects nothing, with the nearest name, or all are left out.
    """
    chosen: set[str] = set()
    left_out: set[str] = set()
    for pattern in patterns:
        found = _selected(model, pattern.removeprefix("!"), f"{place}: trainable")
        (left_out if pattern.startswith("!") else chosen).update(found)
    if not chosen - left_out:
        raise StageError(f"{place}: trainable {list(patterns)} leaves no parameter to train: name some before the '!'")
    return chosen - left_out


def learning_rates(model: nn.Module, options: Optimizer, place: str) -> dict[str, float]:
    """The factor on the learning rate of each parameter of the student, by name.

    Raises:
        StageError: when a pattern selects nothing, with the nearest name.
    """
    factors: dict[str, float] = {}
    for pattern, factor in options.scale.items():
        for name in _selected(model, pattern, place):
            factors.setdefault(name, factor)
    return {name: factors.get(name, 1.0) for name, _ in model.named_parameters()}


def _selected(model: nn.Module, pattern: str, place: str) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    found = _group(model, pattern) if pattern in GROUPS else {n for n in names if fnmatch.fnmatchcase(n, pattern)}
    if not found:
        hint = did_you_mean(pattern, [*names, *GROUPS]) or f". Groups are {', '.join(GROUPS)}"
        raise StageError(f"{place} '{pattern}' selects no parameter{hint}")
    return found


def _group(model: nn.Module, group: str) -> set[str]:
    known = {id(p): name for name, p in model.named_parameters()}
    if group == "all":
        return set(known.values())
    if group == "biases":
        return {name for name in known.values() if name.rpartition(".")[2] == "bias"}
    chosen = set()
    for module in model.modules():
        kind = type(module).__name__
        if (
            (group == "factors" and isinstance(module, FactorizedMatrix))
            or (group == "norms" and "norm" in kind.lower())
            or (group == "embeddings" and "embedding" in kind.lower() and not any(module.children()))
            or (group == "embeddings" and kind == "FactorizedEmbedding")
        ):
            chosen |= {known[id(p)] for p in module.parameters()}
    return chosen

"""The defaults of healing: what is trained, at which rate, in which steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tdkit.decompositions import FactorizedMatrix
from tdkit.errors import OptionError
from tdkit.sources.positions import position_table
from torch import nn

from tdkit_distill.data.examples import Examples
from tdkit_distill.healing.adapters import PATTERN
from tdkit_distill.loop.stages import Stage, count_of

Method = Literal["all", "factors", "adapters"]

CONTEXT = 512
TOP_K = 64
RANK = 16
LOSSES: Mapping[str, Any] = {"logits": 1.0, "cross_entropy": 0.5}
RATES: Mapping[str, float] = {"all": 1e-4, "factors": 2e-4, "adapters": 5e-4}
BESIDE_ADAPTERS = {"factors": 0.4, "norms": 0.2}  # of their rate
MEASUREMENTS = 10
PATIENCE = 3
STEPS = 400  # rows are put together in steps once there are more than that
MOST_ROWS = 16  # per step
TOKENS_AT_ONCE = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked of the engine, with all defaults taken.

    Attributes:
        method, tokens, self_generated, learning_rate, batch_size, losses, patience, seed: as those of `heal`.
        accumulation: in how many parts the rows of a step are run.
        trainable, scale: as in `Stage` and its `Optimizer`.
        rank: of the adapters; None without them.
        top_k: logits of the teacher that are kept; None when it is run beside the model.
        evaluate_every: steps between measurements.
    """

    method: Method
    tokens: int
    self_generated: int
    learning_rate: float
    batch_size: int
    accumulation: int
    losses: Mapping[str, Any]
    trainable: tuple[str, ...]
    scale: Mapping[str, float]
    rank: int | None
    top_k: int | None
    evaluate_every: int
    patience: int | None
    seed: int

    def stage(self) -> Stage:
        """The stage of distillation."""
        return Stage.model_validate(
            {
                "name": "heal",
                "losses": dict(self.losses),
                "tokens": self.tokens,
                "batch_size": self.batch_size,
                "accumulation": self.accumulation,
                "optimizer": {"lr": self.learning_rate, "weight_decay": 0.0, "scale": dict(self.scale)},
                "schedule": {"kind": "cosine", "warmup": 0.1},
                "trainable": self.trainable,
                "keep": "best",
                "patience": self.patience,
            }
        )


def settings_of(
    model: nn.Module,
    rows: Examples,
    *,
    tokens: int,
    self_generated: int,
    method: Method,
    learning_rate: float | None,
    batch_size: int | None,
    losses: Mapping[str, Any] | None,
    has_teacher: bool,
    rank: int,
    top_k: int | None,
    measurements: int,
    patience: int | None,
    seed: int,
    device: torch.device,
) -> Settings:
    """The settings for a model, which has its adapters already, and for rows of which one is long as another."""
    trainable = _trainable(model, method)
    count = -(-tokens // rows.length)
    size = batch_size or min(max(count // STEPS, 1), MOST_ROWS)
    at_once = max(1, TOKENS_AT_ONCE.get(device.type, 512) // rows.length)
    parts = next(parts for parts in range(1, size + 1) if size % parts == 0 and size // parts <= at_once)
    return Settings(
        method=method,
        tokens=tokens,
        self_generated=self_generated,
        learning_rate=learning_rate or RATES[method],
        batch_size=size,
        accumulation=parts,
        losses=losses or (LOSSES if has_teacher else {"cross_entropy": 1.0}),
        trainable=trainable,
        scale={kind: BESIDE_ADAPTERS[kind] for kind in trainable if method == "adapters" and kind in BESIDE_ADAPTERS},
        rank=rank if method == "adapters" else None,
        top_k=top_k if has_teacher and rows.fixed else None,
        evaluate_every=-(-count // (size * measurements)),
        patience=patience,
        seed=seed,
    )


def _trainable(model: nn.Module, method: Method) -> tuple[str, ...]:
    if method == "factors":
        return ("factors",)
    if method == "adapters":
        has = {
            "factors": any(isinstance(module, FactorizedMatrix) for module in model.modules()),
            "norms": any("norm" in type(module).__name__.lower() for module in model.modules()),
        }
        return (PATTERN, *(name for name, there in has.items() if there))
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return ("all", *(f"!{name}" for name, parameter in model.named_parameters() if id(parameter) in embeddings))


def context_of(model: nn.Module, context: int | None) -> int:
    """The tokens per window: those asked for, or 512 as far as the model's positions reach."""
    table = position_table(model)
    return context or (CONTEXT if table is None else min(CONTEXT, table[1]))


def token_count(tokens: int | str) -> int:
    """A count such as 200k as an integer.

    Raises:
        OptionError: when it is none, or none to train on.
    """
    try:
        count = count_of(tokens)
    except ValueError as error:
        raise OptionError(f"tokens: {error}") from None
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise OptionError(f"tokens={tokens!r}: give how many to train on, such as 200000 or 200k")
    return count


def generated_count(self_generated: int | str, tokens: int, has_teacher: bool) -> int:
    """How many of the tokens the teacher generates.

    Raises:
        OptionError: when it is no count, or not fewer than all, or there is no teacher.
    """
    if self_generated in (0, "0"):
        return 0
    try:
        count = token_count(self_generated)
    except OptionError:
        raise OptionError(
            f"self_generated={self_generated!r}: give a number of tokens, such as 50k; 0 for none"
        ) from None
    if count >= tokens:
        raise OptionError(f"self_generated={self_generated}: give fewer than all tokens={tokens}")
    if not has_teacher:
        raise OptionError(f"self_generated={self_generated}: it is the teacher that generates text, and there is none")
    return count


def check_options(
    model: nn.Module, *, method: str, precision: str, counts: Mapping[str, int | None], learning_rate: float | None
) -> None:
    """Refuse options that cannot be met, before any work.

    Raises:
        OptionError: with the remedy.
    """
    if method not in RATES:
        raise OptionError(f"method={method!r} is none of {', '.join(RATES)}")
    if precision not in ("auto", "no", "bf16"):
        raise OptionError(f"precision={precision!r} is none of auto, no, bf16")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise OptionError(f"{name}={count}: give at least 1")
    if learning_rate is not None and not learning_rate > 0:
        raise OptionError(f"learning_rate={learning_rate}: give a positive number")
    rough = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.element_size() < 4})
    if rough:
        raise OptionError(
            f"the model has weights in {', '.join(rough)}, where steps as small as those of healing are rounded away: "
            "heal it in float32, model.float(), and convert it afterwards"
        )

"""The calibration that a command is given: a text, batches, or moments that were saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdkit.calibration.batches import Batch
from tdkit.calibration.calibration import Calibration, is_saved_calibration
from tdkit.calibration.self_generated import with_self_generated
from tdkit.cli.loading import from_here
from tdkit.cli.options import Labels
from tdkit.errors import OptionError
from tdkit.evaluation.language_models import check_causal, check_takes_text
from tdkit.planning.planner import calibrated
from tdkit.planning.resolution import Resolved
from tdkit.sources.own import load_batches
from tdkit.sources.positions import check_positions
from tdkit.sources.source import Source
from tdkit.sources.texts import encode, load_texts, windows

DOING = "--calibration"
IN_PYTHON = "calibrate it on batches with labels, --data, or in Python, tdkit.calibrate(model, batches)"


@dataclass(frozen=True)
class Wanted:
    """The options of a calibration.

    Attributes:
        texts: names of texts, or of one folder of saved moments; None for none.
        data: batches, as `load_batches` takes them; None for none.
        tokens: how many tokens of the texts to use.
        context: tokens per window of the texts.
        labels: of the loss, see `tdkit.calibrate`.
        inputs_only: measure no gradients.
        batch_size: examples per batch of files.
        self_generated: how many tokens the model generates beside the texts, see `tdkit.calibrate`.
    """

    texts: list[str] | None
    data: str | None
    tokens: int
    context: int
    labels: Labels
    inputs_only: bool
    batch_size: int
    self_generated: int = 0

    def check(self, others: Mapping[str, bool] | None = None) -> None:
        """Check that the options go together, those of others that need a calibration included.

        Raises:
            OptionError: otherwise.
        """
        given = {f"--labels {self.labels}": self.labels != "data", "--inputs-only": self.inputs_only, **(others or {})}
        if self.self_generated and (self.texts is None or self.saved()):
            raise OptionError(f"--self-generated {self.self_generated} goes with the text of a calibration: give one")
        if self.texts is not None and self.data is not None:
            raise OptionError("--calibration and --data are both what to calibrate on: give one of them")
        for option, is_given in given.items():
            if is_given and self.texts is None and self.data is None:
                raise OptionError(f"{option} needs --calibration TEXT or --data")
        saved = [each for each in self.texts or () if is_saved_calibration(each)]
        if saved and len(self.texts or ()) > 1:
            raise OptionError(f"--calibration {saved[0]} holds saved moments: give it alone, without texts")

    def saved(self) -> Path | None:
        """Returns the folder of saved moments, or None if texts, batches or nothing are given."""
        return Path(self.texts[0]) if self.texts and is_saved_calibration(self.texts[0]) else None

    def read(self) -> Material:
        """Read what to calibrate on; called before the model is loaded."""
        folder = self.saved()
        if folder is not None:
            return Material(self, known=Calibration.load(folder))
        if self.data is not None:
            from_here()
            return Material(self, batches=load_batches(self.data, batch=self.batch_size))
        return Material(self, documents=None if self.texts is None else load_texts(self.texts))


@dataclass(frozen=True)
class Material:
    """What was read for a calibration: at most one of a calibration, batches and documents."""

    wanted: Wanted
    known: Calibration | None = None
    batches: Iterable[Batch] | None = None
    documents: list[str] | None = None

    def calibration(self, source: Source, resolved: Resolved, device: str | None = None) -> Calibration | None:
        """Returns the calibration of the sites to rewrite, the one that was given, or None for none."""
        if self.known is not None:
            return self.known
        if not resolved.rewritten:
            return None
        gradients, labels = not self.wanted.inputs_only, self.wanted.labels
        given = self.batches_for(source, device)
        return calibrated(resolved, given, gradients=gradients, labels=labels, device=device)

    def batches_for(self, source: Source, device: str | None = None) -> Iterable[Batch] | None:
        """Returns the batches, those of a text for this model; None for nothing.

        Args:
            device: where the model generates the text that it is to generate itself.
        """
        if self.documents is None:
            return self.batches
        batches = self.windows_for(source.model, source.tokenizer)
        if not self.wanted.inputs_only and self.wanted.labels == "data":
            check_causal(source.model, batches[0].flatten(), DOING, f"give --inputs-only, or {IN_PYTHON}")
        tokens = self.wanted.self_generated
        if not tokens:
            return batches
        return with_self_generated(source.model, batches, tokens, context=self.wanted.context, device=device)

    def windows_for(self, model: nn.Module, tokenizer: Any) -> tuple[torch.Tensor, ...]:
        """Returns the text as windows (1, context) of token ids."""
        check_takes_text(model, DOING, IN_PYTHON)
        check_positions(model, self.wanted.context)
        ids = encode(self.documents or [], tokenizer, self.wanted.tokens)
        return torch.split(windows(ids, self.wanted.context), 1)

"""What commands measure of a language model before and after, for its record: perplexity, a continued text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from tdkit.calibration.calibration import Calibration
from tdkit.evaluation.language_models import check_takes_text
from tdkit.evaluation.samples import check_continues, continued
from tdkit.evaluation.texts import limit_of, measure_text, protocol_of, read_texts
from tdkit.records.record import Data, Sample
from tdkit.sources.documents import Text, sha256
from tdkit.sources.positions import check_positions
from tdkit.sources.source import Source

EvaluationText = Annotated[
    list[str] | None,
    typer.Option(
        "--evaluation", help="Measure perplexity on this text before and after, for the report; as --text of eval."
    ),
]
EvaluationTokens = Annotated[
    int | None, typer.Option(help="How many tokens of the evaluation text to use; 16384 by default.", min=2)
]
Prompt = Annotated[str | None, typer.Option(help="Continue this text with the model before and after, for the report.")]

SAMPLE_TOKENS = 32


@dataclass(frozen=True)
class Measuring:
    """What is measured of a model, dense or compressed.

    Attributes:
        text: to measure perplexity on; None for no text.
        tokens: as in `measure_text`.
        context: tokens per window; None for those of the text's own protocol.
        prompt: to be continued; None for none.
    """

    text: Text | None = None
    tokens: int | None = None
    context: int | None = None
    prompt: str | None = None

    @classmethod
    def of(cls, names: list[str] | None, tokens: int | None, context: int | None, prompt: str | None) -> Measuring:
        """Read the text, if one is named."""
        return cls(read_texts(names) if names else None, tokens, context, prompt)

    def check(self, source: Source) -> None:
        """Check, before any work, that a model can be measured so."""
        if self.text is not None:
            check_takes_text(source.model, "--evaluation")
            check_positions(source.model, protocol_of(self.text, self.context).context)
        if self.prompt is not None:
            check_continues(source.model, source.tokenizer, "--prompt")

    def figures(self, source: Source) -> dict[str, float]:
        """Returns the figures of a model by name; none without a text."""
        if self.text is None:
            return {}
        _, found = measure_text(source, self.text, tokens=self.tokens, context=self.context)
        figures = {"perplexity": found.perplexity, "tokens_per_second": found.tokens_per_second}
        return figures if found.stderr is None else {**figures, "perplexity_stderr": found.stderr}

    def continuation(self, model: nn.Module, source: Source) -> str | None:
        """Returns the continued prompt, or None without one."""
        return None if self.prompt is None else continued(model, source.tokenizer, self.prompt, SAMPLE_TOKENS)

    def samples(self, dense: str | None, compressed: str | None) -> tuple[Sample, ...]:
        return () if self.prompt is None else (Sample(self.prompt, dense, compressed),)

    @property
    def data(self) -> tuple[Data, ...]:
        """The text as a record names it."""
        if self.text is None:
            return ()
        return (Data("evaluation", self.text.name, limit_of(self.text, self.tokens), sha256(self.text.documents)),)


def calibration_data(names: list[str] | None, texts: list[str] | Calibration | None, tokens: int) -> tuple[Data, ...]:
    """Returns the calibration as a record names it: its texts, or the folder of saved moments."""
    if names is None or texts is None:
        return ()
    if isinstance(texts, Calibration):
        return (Data("calibration", f"moments in {Path(names[0])}"),)
    return (Data("calibration", " + ".join(names), tokens, sha256(texts)),)

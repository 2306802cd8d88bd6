"""What commands measure of a language model before and after, for its record: perplexity, a continued text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tdkit.cli.moments import Material
from tdkit.evaluation.language_models import check_takes_text
from tdkit.evaluation.samples import check_continues, continued
from tdkit.evaluation.texts import limit_of, measure_text, protocol_of, read_texts
from tdkit.records.record import Data, Sample
from tdkit.sources.documents import Text, sha256
from tdkit.sources.positions import check_positions
from tdkit.sources.source import Source

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


def calibration_data(material: Material) -> tuple[Data, ...]:
    """Returns the calibration as a record names it: its texts, its batches, or the folder of saved moments."""
    wanted = material.wanted
    if material.known is not None:
        return (Data("calibration", f"moments in {wanted.saved()}"),)
    if material.documents is not None:
        return (Data("calibration", " + ".join(wanted.texts or ()), wanted.tokens, sha256(material.documents)),)
    return () if wanted.data is None else (Data("calibration", f"batches of {wanted.data}"),)

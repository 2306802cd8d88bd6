"""What commands measure of a model before and after, for its record: quality on a text or data, a continued text."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from tdkit.calibration.batches import Batch, digest_of
from tdkit.cli.loading import from_here
from tdkit.cli.moments import Material
from tdkit.evaluation.batches import has_labels, quality
from tdkit.evaluation.language_models import check_takes_text
from tdkit.evaluation.samples import check_continues, continued
from tdkit.evaluation.texts import limit_of, measure_text, protocol_of, read_texts
from tdkit.records.record import Data, Sample
from tdkit.sources.documents import Text, sha256
from tdkit.sources.own import load_batches
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
        batches: to measure accuracy or the squared error on, or without labels the agreement with the dense model;
            None for none.
        spec: where the batches are from.
    """

    text: Text | None = None
    tokens: int | None = None
    context: int | None = None
    prompt: str | None = None
    batches: Iterable[Batch] | None = None
    spec: str = ""

    @classmethod
    def of(
        cls,
        names: list[str] | None,
        tokens: int | None,
        context: int | None,
        prompt: str | None,
        data: str | None = None,
        batch_size: int = 1,
    ) -> Measuring:
        """Read the text and the batches that are named, before a model is loaded."""
        text = read_texts(names) if names else None
        if data is None:
            return cls(text, tokens, context, prompt)
        from_here()
        return cls(text, tokens, context, prompt, load_batches(data, batch=batch_size), data)

    def check(self, source: Source) -> None:
        """Check, before any work, that a model can be measured so."""
        if self.text is not None:
            check_takes_text(source.model, "--evaluation")
            check_positions(source.model, protocol_of(self.text, self.context).context)
        if self.prompt is not None:
            check_continues(source.model, source.tokenizer, "--prompt")
        if self.batches is not None:
            has_labels(source.model, self.batches, self.spec)

    def to_compare(self, model: nn.Module) -> nn.Module | None:
        """Returns a copy of the dense model for `figures` if there is nothing else to measure the batches by."""
        if self.batches is None or has_labels(model, self.batches, self.spec):
            return None
        return copy.deepcopy(model)

    def figures(self, source: Source, dense: nn.Module | None) -> dict[str, float]:
        """Returns the figures of a model by name; none if there is nothing to measure it on.

        Args:
            source: the model.
            dense: as in `quality`.
        """
        figures: dict[str, float] = {}
        if self.text is not None:
            _, found = measure_text(source, self.text, tokens=self.tokens, context=self.context)
            figures |= {"perplexity": found.perplexity, "tokens_per_second": found.tokens_per_second}
            figures |= {} if found.stderr is None else {"perplexity_stderr": found.stderr}
        if self.batches is not None:
            figures |= quality(source, self.batches, self.spec, dense)
        return figures

    def continuation(self, model: nn.Module, source: Source) -> str | None:
        """Returns the continued prompt, or None without one."""
        return None if self.prompt is None else continued(model, source.tokenizer, self.prompt, SAMPLE_TOKENS)

    def samples(self, dense: str | None, compressed: str | None) -> tuple[Sample, ...]:
        return () if self.prompt is None else (Sample(self.prompt, dense, compressed),)

    @property
    def data(self) -> tuple[Data, ...]:
        """The text and the batches as a record names them."""
        text, batches = self.text, self.batches
        of_text = (
            ()
            if text is None
            else (Data("evaluation", text.name, limit_of(text, self.tokens), sha256(text.documents)),)
        )
        return of_text if batches is None else (*of_text, _of_batches("evaluation", self.spec, batches))


def calibration_data(material: Material) -> tuple[Data, ...]:
    """Returns the calibration as a record names it: its texts, its batches, or the folder of saved moments."""
    wanted = material.wanted
    if material.known is not None:
        return (Data("calibration", f"moments in {wanted.saved()}"),)
    if material.documents is not None:
        text = Data("calibration", " + ".join(wanted.texts or ()), wanted.tokens, sha256(material.documents))
        own = Data("calibration", "generated by the model", wanted.self_generated)
        return (text, own) if wanted.self_generated else (text,)
    return () if material.batches is None else (_of_batches("calibration", str(wanted.data), material.batches),)


def _of_batches(role: str, spec: str, batches: Iterable[Batch]) -> Data:
    return Data(role, f"batches of {spec}", sha256=digest_of(batches))

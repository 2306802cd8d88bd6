"""How a perplexity is measured: windows over a text and the mean of their losses; the protocols of papers by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tdkit.errors import SourceError

Mean = Literal["tokens", "windows"]


@dataclass(frozen=True)
class Window:
    """Token ids from `start` to before `end`, of which those from `first` on are predicted."""

    start: int
    end: int
    first: int

    @property
    def predicted(self) -> int:
        return self.end - self.first


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Windows over the tokens of a text, and the mean that is exponentiated.

    Attributes:
        context: tokens per window, at least 2.
        stride: tokens from the start of a window to that of the next; `context` when None. With a shorter one each
            window predicts only the tokens that the windows before it do not.
        partial: whether an incomplete last window is measured too.
        mean: over all predicted tokens, or over windows of the mean of each, which a last short window changes.
        special_tokens: whether the tokenizer adds its special tokens, such as one that begins a text.
    """

    context: int = 1024
    stride: int | None = None
    partial: bool = False
    mean: Mean = "tokens"
    special_tokens: bool = False

    def describe(self) -> str:
        """Returns the protocol in words."""
        windows = (
            "non-overlapping windows, each predicting all its tokens but the first"
            if self._step == self.context
            else f"windows every {self._step} tokens, each predicting the tokens that no window before it has"
        )
        last = ", the incomplete last one too" if self.partial else ""
        mean = "mean token loss" if self.mean == "tokens" else "mean over windows of their mean token losses"
        special = "; with the tokenizer's special tokens" if self.special_tokens else ""
        return f"{windows}{last}; exp of the {mean}{special}"

    def windows(self, tokens: int) -> list[Window]:
        """Returns the windows over a text of that many tokens.

        Raises:
            SourceError: when the context or the stride is impossible, or the text does not fill one window.
        """
        if self.context < 1:
            raise SourceError(f"a context of {self.context} tokens is no window: give at least 2")
        if self.context < 2:
            raise SourceError(f"a context of {self.context} predicts nothing: give at least 2 tokens")
        if not 1 <= self._step <= self.context:
            raise SourceError(f"a stride of {self.stride} is none for windows of {self.context}: give 1 to the context")
        found = list(self._windows(tokens))
        if not found:
            raise SourceError(
                f"{tokens} tokens do not fill one window of {self.context}: give more text or a shorter context"
            )
        return found

    @property
    def _step(self) -> int:
        return self.context if self.stride is None else self.stride

    def _windows(self, tokens: int) -> Iterator[Window]:
        done = 0
        for start in range(0, tokens, self._step):
            end = min(start + self.context, tokens)
            window = Window(start, end, max(start + 1, done))
            if (end - start == self.context or self.partial) and window.predicted > 0:
                yield window
            if end == tokens:
                return
            done = end


GPT2 = Protocol(context=1024, partial=True, mean="windows", special_tokens=True)
LLAMA = Protocol(context=2048, special_tokens=True)

NAMED: dict[str, Protocol] = {
    "wikitext-2": GPT2,
    "wikitext-103": GPT2,
    "lambada": GPT2,
    "wikitext-2-raw": LLAMA,
}
"""Protocols by the registered text that they belong to, see docs/evaluation.md for the papers."""


def named(text: str) -> Protocol | None:
    """Returns the protocol of a text given as ``NAME`` or ``NAME:PART``, or None where it has none of its own."""
    return NAMED.get(text.partition(":")[0])

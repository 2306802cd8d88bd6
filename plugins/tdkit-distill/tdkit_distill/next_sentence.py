"""BERT's second pre-training task: does the second segment follow the first? Its rows and its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdkit_distill.chunked import IGNORED, cross_entropy
from tdkit_distill.errors import DataError, StageError
from tdkit_distill.examples import Batch, MaskedWindows, MaskTokens
from tdkit_distill.layer_maps import blocks, matching
from tdkit_distill.losses import Batch as Given
from tdkit_distill.losses import Loss, Needs, Term, View, working

LABELS = "next_labels"  # 0: the second segment follows the first; 1: it is of another window


class MaskedPairs(MaskedWindows):
    """Masked windows in two segments: start, A, end, B, end, with token types 0 and 1.

    Each window is cut at a random place between its quarters. In half of the rows B is the rest of the
    window, in the others the same stretch of another window; ``next_labels`` says which. Tokens are hidden
    as in `MaskedWindows`.

    Args:
        ids: (count, length - 3) integers, at least two rows of four.
        tokens, options: as for `MaskedWindows`.

    Source: Devlin et al., BERT (2019), section 3.1.
    """

    edges = 3

    def __init__(self, ids: Tensor, tokens: MaskTokens, **options: Any) -> None:
        super().__init__(ids, tokens, **options)
        if len(self) < 2 or ids.shape[1] < 4:
            raise DataError(
                f"pairs of segments need at least two windows of seven tokens, not {len(self)} of {self.length}: give "
                "more text or longer windows"
            )
        self.fingerprint += "-pairs"

    def batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        ids, width = self._windows.take(rows), self._windows.length
        cut = torch.randint(width // 4, 3 * width // 4 + 1, (len(ids), 1), generator=generator).clamp(1, width - 1)
        strange = torch.randint(2, (len(ids),), generator=generator)
        away = torch.randint(1, len(self), (len(ids),), generator=generator)
        others = self._windows.take((rows + away) % len(self))
        second = torch.arange(width) >= cut
        ids = torch.where(second & strange.bool().unsqueeze(1), others, ids)
        hidden, labels = self.hide(ids, generator)
        places = torch.arange(width + 1)
        before = (places - (places > cut).long()).clamp(max=width - 1)  # where each place's token was, but the cut
        hidden = hidden.gather(1, before).masked_fill(places == cut, self.tokens.end)
        labels = labels.gather(1, before).masked_fill(places == cut, IGNORED)
        hidden, labels = self.enclose(hidden, labels)
        types = torch.cat([torch.zeros(len(ids), 1, dtype=torch.long), (places > cut).long()], dim=1)
        types = torch.cat([types, torch.ones(len(ids), 1, dtype=torch.long)], dim=1)
        batch = {"input_ids": hidden, "token_type_ids": types, "attention_mask": torch.ones_like(hidden)}
        return {**batch, "labels": labels, LABELS: strange}


class NextSentence(Loss):
    """Cross-entropy of whether the second segment follows the first.

    A model with a ``seq_relationship`` head is read there. Any other one gets a head of its own on the first
    position of the last layer (a linear map, tanh and two classes, as BERT's pooler and head are), which is
    learned beside the student and dropped at the end.

    Args:
        module: whose output is read; None finds it as told above.

    Source: Devlin et al., BERT (2019), section 3.1.
    """

    module: str | None = None

    def bind(self, student: nn.Module, teacher: nn.Module | None, place: str) -> Term:
        if self.module is not None:
            return _NextSentenceTerm(matching(student, self.module, f"{place}: student")[0], place)
        heads = [name for name, _ in student.named_modules() if name.endswith("seq_relationship")]
        layers = blocks(student)
        if not heads and not layers:
            raise StageError(f"{place}: the student has no list of layers: say which module, by name")
        return _NextSentenceTerm(heads[0] if heads else layers[-1], place)


class _NextSentenceTerm(Term):
    def __init__(self, module: str, place: str) -> None:
        super().__init__()
        self.module = module
        self.place = place
        self.needs = Needs(student_outputs=(module,))
        self.head: nn.Module | None = None

    def prepare(self, student: View, teacher: View | None) -> None:
        found = student.outputs[self.module]
        width = found.shape[-1]
        if found.ndim > 2:
            self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)).to(found.device)
        elif width != 2:
            raise StageError(f"{self.place}: '{self.module}' gives {tuple(found.shape)} instead of two classes per row")

    def forward(self, student: View, teacher: View | None, batch: Given) -> Tensor:
        if LABELS not in batch:
            raise StageError(f"{self.place}: the batches have no {LABELS}: use text: {{objective: masked_pairs}}")
        found = student.outputs[self.module]
        if self.head is not None:
            found = self.head(working(found[:, 0]))
        return cross_entropy(found, batch[LABELS])

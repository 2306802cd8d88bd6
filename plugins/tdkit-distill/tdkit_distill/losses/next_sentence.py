"""The loss of BERT's second pre-training task: does the second segment follow the first?"""

from __future__ import annotations

from torch import Tensor, nn

from tdkit_distill.data.examples import IGNORED
from tdkit_distill.data.masked import NEXT_LABELS
from tdkit_distill.errors import StageError
from tdkit_distill.losses.averages import working
from tdkit_distill.losses.chunked import cross_entropy
from tdkit_distill.losses.loss import Batch, Loss, Needs, Term
from tdkit_distill.models.layer_maps import blocks, matching
from tdkit_distill.models.view import View


class NextSentence(Loss):
    """Cross-entropy of whether the second segment follows the first.

    A model with a ``seq_relationship`` head is read there. Any other one gets a head of its own on the first
    position of the last layer (a linear map, tanh and two classes, as BERT's pooler and head are), which is
    learned beside the student and dropped at the end.

    Args:
        module: whose output is read; None finds it as described above.

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

    def prepare(self, student: View, teacher: View | None, batch: Batch) -> None:
        found = student.outputs[self.module]
        width = found.shape[-1]
        if found.ndim > 2:
            self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)).to(
                found.device, working(found[:0]).dtype
            )
        elif width != 2:
            raise StageError(f"{self.place}: '{self.module}' gives {tuple(found.shape)} instead of two classes per row")

    def forward(self, student: View, teacher: View | None, batch: Batch) -> Tensor:
        labels = self._labels(batch)
        found = student.outputs[self.module]
        if self.head is not None:
            found = self.head(working(found[:, 0]))
        return cross_entropy(found, labels)

    def count(self, batch: Batch) -> Tensor:
        return (self._labels(batch) != IGNORED).sum().float()

    def _labels(self, batch: Batch) -> Tensor:
        if NEXT_LABELS not in batch:
            raise StageError(f"{self.place}: the batches have no {NEXT_LABELS}: use text: {{objective: masked_pairs}}")
        return batch[NEXT_LABELS]

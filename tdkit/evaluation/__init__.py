"""Evaluation of compressed models: metrics on labelled batches, agreement, perplexity, tasks of lm-eval, speed."""

from tdkit.evaluation.batches import measure_batches
from tdkit.evaluation.comparison import Agreement, agreement
from tdkit.evaluation.language_models import PROTOCOL, Evaluation, evaluate, perplexity
from tdkit.evaluation.protocols import Protocol
from tdkit.evaluation.reports import Report, Result, report
from tdkit.evaluation.scoring import score
from tdkit.evaluation.tasks import Tasks, measure_tasks
from tdkit.evaluation.texts import measure_text, read_texts

__all__ = [
    "PROTOCOL",
    "Agreement",
    "Evaluation",
    "Protocol",
    "Report",
    "Result",
    "Tasks",
    "agreement",
    "evaluate",
    "measure_batches",
    "measure_tasks",
    "measure_text",
    "perplexity",
    "read_texts",
    "report",
    "score",
]

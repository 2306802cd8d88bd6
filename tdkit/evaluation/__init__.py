"""Evaluation of compressed models: metrics on labelled batches, agreement with the dense model, perplexity, speed."""

from tdkit.evaluation.comparison import Agreement, agreement
from tdkit.evaluation.language_models import PROTOCOL, Evaluation, evaluate, perplexity
from tdkit.evaluation.scoring import score

__all__ = ["PROTOCOL", "Agreement", "Evaluation", "agreement", "evaluate", "perplexity", "score"]

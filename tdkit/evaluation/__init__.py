"""Evaluation of compressed models: metrics on labelled batches, agreement with the dense model, perplexity, speed."""

from tdkit.evaluation.agreement import Agreement, agreement
from tdkit.evaluation.language_models import PROTOCOL, Evaluation, evaluate, perplexity
from tdkit.evaluation.score import score

__all__ = ["PROTOCOL", "Agreement", "Evaluation", "agreement", "evaluate", "perplexity", "score"]

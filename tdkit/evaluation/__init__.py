"""Evaluation of compressed models: perplexity, size, speed."""

from tdkit.evaluation.language_models import PROTOCOL, Evaluation, evaluate, perplexity

__all__ = ["PROTOCOL", "Evaluation", "evaluate", "perplexity"]

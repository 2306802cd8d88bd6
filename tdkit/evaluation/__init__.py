"""What a compressed model is judged by: perplexity, size, speed."""

from tdkit.evaluation.language_models import PROTOCOL, Evaluation, evaluate, perplexity

__all__ = ["PROTOCOL", "Evaluation", "evaluate", "perplexity"]

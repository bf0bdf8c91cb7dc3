"""Retrieval, measured: across the modalities, inside each of them, and in a gallery of both."""

from vlscale.evaluate.embed import EmbeddedCorpus
from vlscale.evaluate.protocols import evaluate_corpus
from vlscale.evaluate.result import EvalResult, Measure, compare

__all__ = ["EmbeddedCorpus", "EvalResult", "Measure", "compare", "evaluate_corpus"]

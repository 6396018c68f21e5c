"""Evaluation of an artifact on real tasks, over documents and over dies: `evaluate`.

Where `pfmc.verify` asks whether one artifact passes its recipe's thresholds, this room measures how
good a part is: perplexity ratio, KL divergence and top-1 agreement on text; cosine and Spearman's
rho of sentence embeddings; accuracy on images; each with an interval over documents and over dies.
"""

from __future__ import annotations

from pfmc.evaluation.evaluate import Evaluation, evaluate
from pfmc.evaluation.figures import Figure

__all__ = ["Evaluation", "Figure", "evaluate"]

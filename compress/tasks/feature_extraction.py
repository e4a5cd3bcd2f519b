"""Sentence embeddings, scored by Spearman's rank correlation or by the cosine to the dense model."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import CompressError
from compress.tasks.datasets import numbers, score_column, text_columns, texts
from compress.tasks.task import SCORE_BATCH, Batch, Request, Run, Split, answer
from compress.tasks.text import TextTask


class FeatureExtraction(TextTask):
    """Sentence embeddings: the last hidden state, averaged over real tokens.

    The score is Spearman's rank correlation with the scores of sentence pairs where the data has
    them, else the mean cosine to the dense model's embeddings.
    """

    name = "feature-extraction"
    metric = "cosine"
    labelled = False
    outputs = ("last_hidden_state",)

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        tables = request.splits.tables
        columns = text_columns(tables["calibration"], request.text)
        scored = score_column(tables["calibration"], columns, request.label)
        if len(columns) == 2 and scored is not None:
            self.metric = "spearman"
            self.scores = {split: numbers(table, scored) for split, table in tables.items()}
        for split, table in tables.items():
            pairs = zip(*(texts(table, name) for name in columns), strict=True)
            self.rows[split] = [(text,) for row in pairs for text in row if text.strip()]
        counts = {split: len(rows) for split, rows in self.rows.items()}
        self.samples = counts if self.metric == "cosine" else self.samples  # texts, or pairs
        self._dense: dict[tuple[str, int | None], NDArray[Any]] = {}

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """There is none; `divergence` says how far an embedding has moved."""
        raise CompressError(
            "feature extraction has no labels, so no loss; rank units by obs, wanda or magnitude"
        )

    def divergence(self, logits: Tensor, dense: Tensor, batch: Batch) -> Tensor:
        """Mean of 1 - cosine between sentence embeddings."""
        real = batch.real
        return 1 - F.cosine_similarity(pooled(logits, real), pooled(dense, real), dim=-1).mean()

    def _embed(self, run: Run, split: Split, limit: int | None) -> NDArray[Any]:
        """[texts, hidden] embeddings of unit length, in the order of the rows."""
        found: dict[int, Tensor] = {}
        for rows, batch in self.indexed(split, SCORE_BATCH, limit):
            hidden = torch.from_numpy(answer(run, batch))
            found.update(zip(rows, F.normalize(pooled(hidden, batch.real), dim=-1), strict=True))
        return torch.stack([found[row] for row in range(len(found))]).numpy()

    def _run_dense(self, inputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
        device = next(self.model.parameters()).device
        tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
        with torch.inference_mode():
            return self.logits(self.model(**tensors)).cpu().numpy()

    def outcomes(self, run: Run, split: Split = "test", limit: int | None = None) -> NDArray[Any]:
        """[pairs, 2] cosine and true score, or [texts, 1] cosine to the dense embedding."""
        if self.metric == "spearman":
            pairs = self._embed(run, split, None if limit is None else 2 * limit)
            cosines = (pairs[0::2] * pairs[1::2]).sum(-1)
            return np.stack([cosines, np.array(self.scores[split][: len(cosines)])], 1)
        key = (split, limit)
        if key not in self._dense:
            self._dense[key] = self._embed(self._run_dense, split, limit)
        cosine: NDArray[Any] = (self._embed(run, split, limit) * self._dense[key]).sum(-1, keepdims=True)
        return cosine

    def scored(self, outcomes: NDArray[Any]) -> float:
        """Spearman of cosines against the pairs' scores, or the mean cosine."""
        return _spearman(*outcomes.T) if self.metric == "spearman" else float(outcomes.mean())


def pooled(hidden: Tensor, real: Tensor | None) -> Tensor:
    """[batch, hidden] mean over the real tokens of [batch, tokens, hidden]."""
    if real is None:
        return hidden.mean(1)
    weight = real.to(hidden)[..., None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks from 0, equal values sharing their mean rank."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum()
    return (last - (count + 1) / 2)[place]


def _spearman(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Spearman's rank correlation, 0 when one side does not vary."""
    ranks = np.stack([_ranks(first), _ranks(second)])
    ranks -= ranks.mean(1, keepdims=True)
    norm = np.sqrt((ranks**2).sum(1)).prod()
    return float(ranks.prod(0).sum() / norm) if norm else 0.0

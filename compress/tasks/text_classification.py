"""Text classification: one label for a text or a pair of texts, scored by accuracy."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from compress.tasks.datasets import label_column, label_numbers, text_columns, texts
from compress.tasks.task import Batch, Request, Split
from compress.tasks.text import TextTask


class TextClassification(TextTask):
    """One label for a text or a pair of texts."""

    name = "text-classification"

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.check_head()
        config: Any = self.model.config
        if config.pad_token_id is None:
            config.pad_token_id = self.pad  # decoders with a classifier refuse batches without one
        tables = request.splits.tables
        columns = text_columns(tables["calibration"], request.text)
        label = label_column(tables["calibration"], columns, self.id2label, request.label)
        self.labels: dict[str, Tensor] = {}
        for split, table in tables.items():
            self.rows[split] = list(zip(*(texts(table, name) for name in columns), strict=True))
            self.labels[split] = torch.tensor(label_numbers(table, label, self.id2label))

    def batches(self, split: Split, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Padded texts with their labels."""
        for rows, batch in self.indexed(split, size, limit):
            yield Batch(batch.inputs, self.labels[split][rows], batch.real)

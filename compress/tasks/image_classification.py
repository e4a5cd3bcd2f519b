"""Image classification: one label for a picture, scored by accuracy."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from compress.errors import CompressError
from compress.task_specs import IMAGES
from compress.tasks import pretrained
from compress.tasks.datasets import label_column, label_numbers
from compress.tasks.readers import Table
from compress.tasks.task import Batch, Pretrained, Request, Split
from compress.tasks.vision import open_image, read_preprocessing


class ImageClassification(Pretrained):
    """One label for a picture."""

    name = "image-classification"

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.check_head()
        self.shape = pretrained.image_shape(self.model.config)
        self.preprocessing = read_preprocessing(request.directory)
        self.tables = request.splits.tables
        first = self.tables["calibration"]
        usual = next((name for name in IMAGES if name in first.columns), "image")
        self.column = request.text or usual
        label = label_column(first, (self.column,), self.id2label, request.label)
        self.labels = {
            split: torch.tensor(label_numbers(table, label, self.id2label))
            for split, table in self.tables.items()
        }
        self._pixels(first, 0)  # a wrong size is told now, not after minutes

    def _pixels(self, table: Table, row: int) -> NDArray[np.float32]:
        """`[channels, height, width]`; float arrays are taken as pixel values that are ready."""
        cell = table.column(self.column)[row]
        if isinstance(cell, np.ndarray) and np.issubdtype(cell.dtype, np.floating):
            values = cell.astype(np.float32)
        elif self.preprocessing is None:
            raise CompressError(
                f"{self.directory} has no preprocessor_config.json, so pictures cannot be normalized; "
                "save the image processor beside the model, or give float pixel values in an .npz"
            )
        else:
            values = self.preprocessing(open_image(cell, table.where(row), self.shape[0]))
        if values.shape != self.shape:
            raise CompressError(
                f"{table.where(row)} becomes {list(values.shape)} pixel values, but the model takes "
                f"{list(self.shape)} (channels, height, width); "
                "mend preprocessor_config.json or the data"
            )
        return values

    def batches(self, split: Split, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Pictures opened as they are needed, with their labels."""
        table, labels = self.tables[split], self.labels[split]
        rows = range(len(table))[:limit]
        for start in range(0, len(rows), size):
            at = rows[start : start + size]
            pixels = np.stack([self._pixels(table, row) for row in at])
            yield Batch({"pixel_values": torch.from_numpy(pixels)}, labels[list(at)])

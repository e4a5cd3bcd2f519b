"""A task on a tiny random classifier with padded text, for tests that need data and sites together."""

import functools

import torch
import transformers

from compress.sites.discovery import find_sites
from compress.tasks.loading import Batch, Task
from support.families import HEADS, HIDDEN, LAYERS, NEURONS, VOCABULARY


class Padded(Task):
    """Seeded token ids of different lengths; labels follow the first token. `sizes` are the model's."""

    def __init__(self, samples=48, length=9, **sizes):
        torch.manual_seed(0)
        usual = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "intermediate_size": NEURONS}
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            num_hidden_layers=LAYERS,
            max_position_embeddings=40,
            num_labels=3,
            initializer_range=0.3,
            **(usual | sizes),
        )
        self.model = transformers.BertForSequenceClassification(config).eval()
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, VOCABULARY, (samples, length), generator=generator)
        lengths = torch.randint(4, length + 1, (samples,), generator=generator)
        self.real = torch.arange(length) < lengths[:, None]
        self.samples = {"calibration": samples, "validation": samples, "test": samples}

    def example(self, batch, tokens):
        ids = self.ids[:1].repeat(batch, 8)[:, :tokens]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def batches(self, split, size, limit=None):
        ids, real = self.ids[:limit], self.real[:limit]
        for rows, mask in zip(ids.split(size), real.split(size), strict=True):
            inputs = {"input_ids": rows * mask, "attention_mask": mask.long()}
            yield Batch(inputs, rows[:, 0] % 3, mask)


@functools.cache
def padded():
    """The task and its sites."""
    return _with_sites(Padded())


def wider():
    """The task on a model wide enough for what torch multiplies in on a GPU: 64 features, two heads."""
    return Padded(hidden_size=64, num_attention_heads=2, intermediate_size=128)


@functools.cache
def wide():
    """The same with its sites."""
    return _with_sites(wider())


def _with_sites(task):
    return task, find_sites(task.model, task.example(1, 9)).sites

"""A task on a random classifier wide enough for every form that torch multiplies in on a GPU."""

import functools

import torch
import transformers
from classifier import Padded
from families import VOCABULARY

from compress.analyze import find_sites


class Wide(Padded):
    """The padded task with two layers of 64 features, two heads of 32 and 128 neurons."""

    def __init__(self, samples=48, length=9):
        super().__init__(samples, length)
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=40,
            num_labels=3,
            initializer_range=0.3,
        )
        self.model = transformers.BertForSequenceClassification(config).eval()


@functools.cache
def wide():
    """The task and its sites."""
    task = Wide()
    return task, find_sites(task.model, task.example(1, 9)).sites

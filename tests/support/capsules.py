"""A small classifier of sequences with capsule and feed-forward blocks, and its task."""

import torch
from torch import nn

from compress.tasks.loading import Batch, Task

WIDTH, GROUPS, SIZE, NEURONS, LABELS = 16, 12, 4, 64, 3
FEATURES, TOKENS, SAMPLES = 8, 6, 96


class CapsuleBlock(nn.Module):
    """A pair of products with a softmax in each group of features between them."""

    def __init__(self):
        super().__init__()
        self.groups = GROUPS
        self.norm = nn.LayerNorm(WIDTH)
        self.spread = nn.Linear(WIDTH, GROUPS * SIZE)
        self.gather = nn.Linear(GROUPS * SIZE, WIDTH)

    def forward(self, x):
        grouped = self.spread(self.norm(x)).unflatten(-1, (self.groups, SIZE))
        return x + self.gather(grouped.softmax(-1).flatten(-2))


class NeuronBlock(nn.Module):
    """A usual feed-forward block."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, NEURONS)
        self.down = nn.Linear(NEURONS, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """[batch, tokens, features] -> [batch, labels]."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(FEATURES, WIDTH)
        self.blocks = nn.Sequential(CapsuleBlock(), NeuronBlock(), CapsuleBlock())
        self.head = nn.Linear(WIDTH, LABELS)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean(1))


class CapsuleTask(Task):
    """Seeded sequences, labelled by the dense model itself."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Classifier().eval()
        with torch.no_grad():
            for value in self.model.parameters():
                if value.ndim > 1:
                    value.normal_(0, 2 / value.shape[1] ** 0.5)
        self.inputs = torch.randn(SAMPLES, TOKENS, FEATURES)
        with torch.no_grad():
            self.labels = self.model(self.inputs).argmax(-1)
        self.samples = dict.fromkeys(("calibration", "validation", "test"), SAMPLES)

    def example(self, batch, tokens):
        return {"x": self.inputs[:1].repeat(batch, 1, 1)}

    def batches(self, split, size, limit=None):
        chosen = self.inputs[:limit], self.labels[:limit]
        for inputs, labels in zip(*(part.split(size) for part in chosen), strict=True):
            yield Batch({"x": inputs}, labels)


def task():
    """The factory that a recipe names."""
    return CapsuleTask()

"""The benchmark `gpusq`: a small ViT on CIFAR-10 at 2:4 and 8 bits, term by term.

Two stages as in GPUSQ-ViT (Yu et al., arXiv 2305.10727): the dense model teaches the 2:4 one, which teaches
the 2:4 model on 8 bits, whose late layers count by how near the first stage brought them. The mask and what
makes up for it are second-order here, steps and ranges of inputs those of least squared error. Every term is
left out in turn at equal steps on the same batches. Scores are those of exact integer arithmetic on 4,000
held-out pictures. Bytes are counted on packed tensors that unpack to the codes that were scored; rows
without a seed were not tuned. No time is measured: a processor gains none from 2:4.

Data lies in a directory with `cifar10/`.
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from benchmarks import hidden_width
from torch import Tensor, nn

from compress.core import fakequant, nm, ranges
from compress.core.fakequant import Quantized
from compress.core.support import NM, prepare
from compress.methods import quantized_layers
from compress.recipe import Recovery
from compress.sites.discovery import find_sites
from compress.tasks.task import Batch, Task, kl
from compress.training import distillation, trainer, two_stage
from compress.training.distillation_data import DistillationData

Row = dict[str, object]
DENSE_STEPS = 1500
STEPS = 100  # of each stage
HELD = 4000
OBSERVED = 8  # batches for moments and ranges
RATE = 5e-4  # of the first stage
GPUSQ = Recovery(
    mode="fast", epochs=1, task=1.0, logits=10.0, hidden=0.0, features=5.0, temperature=2.0, decay=0.0
)  # fmt: skip
TERMS: dict[str, dict[str, object]] = {
    "all terms": {},
    "no hard label": {"task": 0.0},
    "no soft logits": {"logits": 0.0},
    "no features": {"features": 0.0},
    "no gate": {"gated": False},
    "no factors": {},
    "hard label alone": {"logits": 0.0, "features": 0.0},
}
DEIT_B = 4 * ((768, 768),) + ((3072, 768), (768, 3072))


class Pictures(Task):
    """A classifier and the batches that it is tuned on."""

    def __init__(self, model: nn.Module, known: Sequence[Batch]) -> None:
        self.model, self.known = model, known

    def batches(self, split: str, size: int, limit: int | None = None) -> Iterator[Batch]:
        """All of them, as they were drawn."""
        return iter(self.known)


@dataclass(frozen=True)
class Held:
    """[n, 3, 32, 32] pictures that nothing is fitted to, their labels, and the dense model's logits."""

    pixels: Tensor
    labels: Tensor
    dense: Tensor

    def judge(self, net: nn.Module) -> Row:
        """Accuracy, and the mean divergence from the dense model in nats."""
        found = answers(net, self.pixels)
        return {
            "accuracy": round(float((found.argmax(-1) == self.labels).float().mean()), 4),
            "divergence": round(float(kl(found, self.dense).mean()), 6),
        }


@torch.no_grad()
def answers(net: nn.Module, pixels: Tensor) -> Tensor:
    """[n, labels] logits. Ranges are static, so the parts in which pictures come change nothing."""
    return torch.cat([net(pixel_values=part).logits for part in pixels.split(250)])


@dataclass(frozen=True)
class Bytes:
    """What products take in a file: packed weights, steps and biases; and the rest of the model."""

    weights: int = 0
    steps: int = 0
    biases: int = 0
    rest: int = 0

    def against(self, dense: "Bytes") -> Row:
        """How many times smaller than the dense model: weights alone, whole products, the whole model."""
        own, other = self.weights + self.steps + self.biases, dense.weights + dense.biases
        return {
            "weight_bytes": self.weights,
            "weights_smaller": round(dense.weights / self.weights, 2),
            "products_smaller": round(other / own, 2),
            "model_smaller": round((other + dense.rest) / (own + self.rest), 2),
        }


def products(net: nn.Module) -> list[str]:
    """Names of the weights of all linear layers but the classifier."""
    return [
        f"{name}.weight"
        for name, part in net.named_modules()
        if isinstance(part, nn.Linear) and name != "classifier"
    ]


def counted(net: nn.Module, names: Sequence[str], codes: Mapping[str, Quantized], *, sparse: bool) -> Bytes:
    """Bytes of a model whose products have these codes, or float weights where there are none."""
    weights = steps = biases = 0
    for name in names:
        bias = net.get_submodule(name.removesuffix(".weight")).bias
        biases += 0 if bias is None else 4 * bias.numel()
        values = codes[name].codes if name in codes else net.get_parameter(name).detach()
        weights += packed_bytes(values) if sparse else values.numel() * values.element_size()
        steps += 4 * codes[name].step.numel() if name in codes else 0
    inside = {id(value) for name in names for value in net.get_submodule(name[:-7]).parameters()}
    rest = sum(4 * value.numel() for value in net.parameters() if id(value) not in inside)
    return Bytes(weights, steps, biases, rest)


def packed_bytes(values: Tensor) -> int:
    """Bytes of a 2:4 weight as it is stored, after making sure that it can be had back."""
    kept, positions = nm.pack(values)
    if not torch.equal(nm.unpack(kept, positions), values):
        raise AssertionError("a packed weight does not unpack to itself")
    return kept.numel() * kept.element_size() + positions.numel() * positions.element_size()


def zeros_of(net: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Masks of the zeros that weights have now."""
    return {name: net.get_parameter(name).detach() == 0 for name in names}


def pruned(task: Pictures, names: Sequence[str]) -> nn.Module:
    """A copy at 2:4, each layer solved for what it reads in the model."""
    seen = quantized_layers.observe(task, names, task.known[:OBSERVED])
    made = copy.deepcopy(task.model)
    for name in names:
        layer = made.get_submodule(name.removesuffix(".weight"))
        found = nm.solve(prepare(layer.weight.detach(), seen[name].second, seen[name].mean), NM(2, 4))
        layer.weight.data.copy_(found.values)
        layer.bias.data.add_(found.shift)
    return made


def rounded(task: Pictures, names: Sequence[str], *, learn: bool) -> nn.Module:
    """A copy on 8 bits, a step for every row of a weight and a range for every input; zeros stay zeros."""
    seen = quantized_layers.observe(task, names, task.known[:OBSERVED])
    made = copy.deepcopy(task.model)
    places = {}
    for name in names:
        span = ranges.span(seen[name].histogram, "mse")
        places[name] = quantized_layers.Place(
            fakequant.nearest(made.get_parameter(name).detach(), "int8-static", span)
        )
    quantized_layers.insert(made, places, learn=learn)
    return made.eval()


@dataclass
class Stages:
    """One model through both stages, with terms of one's choice."""

    dense: nn.Module
    known: Sequence[Batch]
    folder: Path
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = products(self.dense)
        self.at = distillation.hidden_states(self.dense, find_sites(self.dense, self.known[0].inputs).sites)

    def lesson(self, teacher: nn.Module, wanted: Recovery, folder: Path) -> DistillationData:
        """What one model teaches; its answers are kept in a folder, if at all."""
        folder.mkdir(parents=True, exist_ok=True)
        task = Pictures(teacher, self.known)
        answers = distillation.Teacher(task, teacher, self.at, folder, wanted.cache_mb)
        return DistillationData(task, answers, lambda: self.known, len(self.known), wanted)

    def prune(self, sparse: nn.Module, wanted: Recovery) -> tuple[nn.Module, tuple[float, ...]]:
        """The 2:4 model taught by the dense one, and how much each late layer counts from now on."""
        made = copy.deepcopy(sparse)
        lesson = self.lesson(self.dense, wanted.model_copy(update={"rate": RATE}), self.folder / "dense")
        trainer.train(trainer.TrainingRun(made, lesson, zeros=zeros_of(made, self.names)), lambda _: 0.0)
        return made, distillation.layer_factors(lesson.apart(made))

    def quantize(self, sparse: nn.Module, wanted: Recovery, factors: tuple[float, ...]) -> nn.Module:
        """The 2:4 model on 8 bits, taught by the 2:4 model: weights, steps and ranges learn."""
        made = rounded(Pictures(sparse, self.known), self.names, learn=True)
        wanted = two_stage.second_stage_settings(wanted.model_copy(update={"rate": RATE, "cache_mb": 0}))
        lesson = self.lesson(sparse, wanted, self.folder / "sparse")
        run = trainer.TrainingRun(made, lesson, zeros=zeros_of(sparse, self.names), factors=factors)
        trainer.train(run, lambda _: 0.0)
        return made


def run(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Accuracy and bytes before tuning, of every set of terms and seed, and their means."""
    folder = arguments.data / "cifar10"
    lesson = hidden_width.pictures(folder, arguments.batch)
    hidden_width.fit(
        lesson.model, lesson, lesson.batches(1000), arguments.dense_steps or DENSE_STEPS, hidden_width.RATE
    )
    pixels = hidden_width.cifar(folder / "test.xz")[:HELD]
    labels = torch.tensor(np.load(folder / "labels.npz")["test"][:HELD], dtype=torch.long)
    held = Held(pixels, labels, answers(lesson.model, pixels))
    rows: list[Row] = []
    for seed in range(arguments.seeds or 2):
        known = list(islice(lesson.batches(seed), arguments.steps or STEPS))
        stages = Stages(lesson.model, known, out / str(seed))
        task = Pictures(lesson.model, known)
        sparse = pruned(task, stages.names)
        if not rows:
            rows += untuned(task, sparse, stages.names, held)
        rows += tuned(stages, sparse, held, seed)
    return [*rows, *means(rows)]


def untuned(task: Pictures, sparse: nn.Module, names: Sequence[str], held: Held) -> list[Row]:
    """Dense and 2:4, in floats and on 8 bits, with nothing trained; and the bytes of DeiT-B's shapes."""
    full = counted(task.model, names, {}, sparse=False)
    rows: list[Row] = []
    for words, net, is_sparse in (("dense", task.model, False), ("2:4", sparse, True)):
        bits = rounded(Pictures(net, task.known), names, learn=False)
        for name, made in ((words, net), (f"{words}, int8", bits)):
            scores = held.judge(made)
            plain = copy.deepcopy(made)
            size = counted(plain, names, quantized_layers.finalize(plain), sparse=is_sparse)
            rows.append({"what": name, **scores, **size.against(full)})
            print(rows[-1], file=sys.stderr, flush=True)
    weights = sum(out * inner for out, inner in DEIT_B)
    biases = 4 * sum(out for out, _ in DEIT_B)
    packed = sum(nm.stored_bytes(shape, 1) for shape in DEIT_B)
    shapes = Bytes(packed, biases, biases).against(Bytes(4 * weights, 0, biases))
    return [*rows, {"what": "DeiT-B's shapes at 2:4, int8, by formula", **shapes}]


def tuned(stages: Stages, sparse: nn.Module, held: Held, seed: int) -> Iterator[Row]:
    """Both stages with every set of terms."""
    full = counted(stages.dense, stages.names, {}, sparse=False)
    for terms, changes in TERMS.items():
        began = time.perf_counter()
        wanted = GPUSQ.model_copy(update={**changes, "seed": seed})
        first, factors = stages.prune(sparse, wanted)
        factors = () if terms == "no factors" else factors
        made = stages.quantize(first, wanted, factors)
        scores = held.judge(made)
        size = counted(made, stages.names, quantized_layers.finalize(made), sparse=True)
        row: Row = {"what": terms, "seed": seed, "accuracy_2:4": held.judge(first)["accuracy"]}
        row |= {**scores, **size.against(full), "factors": [round(each, 2) for each in factors]}
        yield row | {"seconds": round(time.perf_counter() - began, 1)}
        print(row, file=sys.stderr, flush=True)


def means(rows: Sequence[Row]) -> Iterator[Row]:
    """A row for every set of terms: means over seeds, and what leaving the term out changes in points."""
    found = {
        terms: np.array([[row["accuracy"], row["divergence"]] for row in rows if row["what"] == terms], float)
        for terms in TERMS
    }
    for terms, values in found.items():
        change = 100 * (values[:, 0] - found["all terms"][:, 0])
        yield {
            "what": terms,
            "seed": "mean",
            "accuracy": round(float(values[:, 0].mean()), 4),
            "divergence": round(float(values[:, 1].mean()), 6),
            "points_against_all_terms": round(float(change.mean()), 2),
            "each_seed": [round(float(one), 2) for one in change],
        }

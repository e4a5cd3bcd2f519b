"""The benchmark `pat`: a quarter of the hidden width gone, pruned while tuning or tuned after pruning.

A small ViT on CIFAR-10 and a small Llama-style model on the characters of tinyshakespeare are trained from
scratch for a short time. Then, at equal steps on the same batches at the same rates, the width falls by a
quarter: with pruning-aware tuning, or by PCA at once and plain tuning after it. Data lies in a directory
with `cifar10/` and `tinyshakespeare/`.
"""

import argparse
import copy
import gzip
import lzma
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from compress.export.backends import onnxruntime
from compress.export.onnx.writer import export
from compress.measure import timing
from compress.methods import hidden_width
from compress.sites.residual_stream import Stream
from compress.tasks.task import Batch
from compress.training import pruning_aware

Row = dict[str, object]
REMOVED = 0.25
DENSE_STEPS, STEPS = 600, 200  # of training from scratch, of tuning
MOMENTS = 8  # batches for the directions
RATE = 1e-3
TUNED_RATE = 5e-4


@dataclass(frozen=True)
class Lesson:
    """A model to train, batches by seed, a loss, and a score on what was held out (higher is better)."""

    name: str
    metric: str
    model: nn.Module
    example: dict[str, Tensor]
    batches: Callable[[int], Iterator[Batch]]
    loss: pruning_aware.Loss
    score: Callable[[nn.Module], float]


def pictures(folder: Path, batch: int) -> Lesson:
    """CIFAR-10, one of the five training files and 2,000 of the test pictures; flipped at random."""
    labels = np.load(folder / "labels.npz")
    x, y = cifar(folder / "train_1.xz"), torch.tensor(labels["train"][:10000], dtype=torch.long)
    held, truth = cifar(folder / "test.xz")[:2000], torch.tensor(labels["test"][:2000], dtype=torch.long)
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=192, num_labels=10,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)

    def batches(seed: int) -> Iterator[Batch]:
        random = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(0, len(x), (batch,), generator=random)
            pixels = x[chosen]
            flipped = torch.rand(batch, generator=random) < 0.5
            pixels = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
            yield Batch({"pixel_values": pixels}, y[chosen])

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(net(**batch.inputs).logits, batch.labels)

    def score(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(pixel_values=held).logits.argmax(-1) == truth).float().mean())

    return Lesson("ViT, CIFAR-10", "accuracy", model, {"pixel_values": x[:2]}, batches, loss, score)


def letters(folder: Path, batch: int, length: int = 64) -> Lesson:
    """Characters of tinyshakespeare: the first 90 % are learned, 128 windows of the rest held out."""
    with gzip.open(folder / "input.txt.gz", "rt", encoding="utf-8", newline="") as file:
        text = file.read()
    alphabet = sorted(set(text))
    codes = {letter: number for number, letter in enumerate(alphabet)}
    ids = torch.tensor([codes[letter] for letter in text])
    known, held = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    windows = held[: 128 * length].reshape(-1, length)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(alphabet), hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=160, max_position_embeddings=length, use_cache=False,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)

    def batches(seed: int) -> Iterator[Batch]:
        random = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(0, len(known) - length, (batch,), generator=random)
            yield Batch({"input_ids": known[starts[:, None] + torch.arange(length)]})

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        tokens = batch.inputs["input_ids"]
        logits = net(input_ids=tokens).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def score(net: nn.Module) -> float:
        with torch.no_grad():
            return -float(loss(net, Batch({"input_ids": windows})))

    example = {"input_ids": windows[:2]}
    metric = "log-likelihood a character"
    return Lesson("Llama, tinyshakespeare", metric, model, example, batches, loss, score)


def run(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Scores of every seed, their means, and the speed of the narrow models."""
    rows: list[Row] = []
    lessons = [
        pictures(arguments.data / "cifar10", arguments.batch),
        letters(arguments.data / "tinyshakespeare", arguments.batch),
    ]
    for lesson in lessons:
        began = time.perf_counter()
        steps = arguments.dense_steps or DENSE_STEPS
        fit(lesson.model, lesson, lesson.batches(1000), steps, RATE)
        stream = hidden_width.find_stream(lesson.model, lesson.example)
        sample = [batch for batch, _ in zip(lesson.batches(2000), range(MOMENTS), strict=False)]
        second = hidden_width.moments(lesson.model, stream, sample)
        width = round((1 - REMOVED) * stream.width)
        cut = hidden_width.narrow(lesson.model, stream, second, width)
        for name, model in (("dense", lesson.model), ("cut by PCA, not tuned", cut)):
            rows.append(_row(lesson, name, None, lesson.score(model), began))
        for seed in range(arguments.repeats):
            for name, act in METHODS.items():
                began = time.perf_counter()
                tuned = act(lesson, stream, second, width, seed, arguments.steps or STEPS)
                rows.append(_row(lesson, name, seed, lesson.score(tuned), began))
        rows += _means(rows, lesson)
    return rows + speeds(out)


def fit(model: nn.Module, lesson: Lesson, batches: Iterator[Batch], steps: int, rate: float) -> None:
    """Plain training of all weights, with the schedule of pruning-aware tuning."""
    settings = pruning_aware.Settings(steps=steps, learning_rate=rate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=settings.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: pruning_aware.rate_at(step, settings)
    )
    model.train()
    for _ in range(steps):
        value = lesson.loss(model, next(batches))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
    model.eval()


def dense(lesson: Lesson, stream: Stream, second: Tensor, width: int, seed: int, steps: int) -> nn.Module:
    """The model as wide as before, tuned for as many steps: what either way has to be measured against."""
    model = copy.deepcopy(lesson.model)
    fit(model, lesson, lesson.batches(seed), steps, TUNED_RATE)
    return model


def afterwards(
    lesson: Lesson, stream: Stream, second: Tensor, width: int, seed: int, steps: int
) -> nn.Module:
    """Prune, then tune."""
    model = hidden_width.narrow(lesson.model, stream, second, width)
    fit(model, lesson, lesson.batches(seed), steps, TUNED_RATE)
    return model


def aware(lesson: Lesson, stream: Stream, second: Tensor, width: int, seed: int, steps: int) -> nn.Module:
    """Prune while tuning."""
    settings = pruning_aware.Settings(steps=steps, learning_rate=TUNED_RATE, seed=seed)
    pruner = pruning_aware.Pruner(lesson.model, stream, second, width, settings)
    return pruning_aware.tune(pruner, lesson.batches(seed), lesson.loss)


METHODS = {"dense, tuned as long": dense, "prune, then tune": afterwards, "PAT": aware}


def _row(lesson: Lesson, method: str, seed: int | None, score: float, began: float) -> Row:
    row: Row = {"model": lesson.name, "method": method, "seed": seed, lesson.metric: round(score, 4)}
    row["seconds"] = round(time.perf_counter() - began, 1)
    print(row, file=sys.stderr, flush=True)
    return row


def _means(rows: list[Row], lesson: Lesson) -> Iterator[Row]:
    """One row a method: the mean over seeds."""
    for method in METHODS:
        found = [row for row in rows if row["model"] == lesson.name and row["method"] == method]
        scores = [float(str(row[lesson.metric])) for row in found]
        yield {
            "model": lesson.name, "method": method, "seed": "mean",
            lesson.metric: round(float(np.mean(scores)), 4), "std": round(float(np.std(scores)), 4),
        }  # fmt: skip


def speeds(out: Path) -> list[Row]:
    """Measured in onnxruntime at random weights, which set no time: ViT-S/16 and a Llama of its width."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
    vit = transformers.ViTConfig(image_size=224, patch_size=16, intermediate_size=1536, **sizes)
    llama = transformers.LlamaConfig(vocab_size=4096, intermediate_size=1024, **sizes)
    shapes = {
        "ViT, 6 layers of 384, 197 tokens": (
            transformers.ViTForImageClassification(vit),
            {"pixel_values": torch.randn(1, 3, 224, 224)},
        ),
        "Llama, 6 layers of 384, 128 tokens": (
            transformers.LlamaForCausalLM(llama),
            {"input_ids": torch.randint(3, 4096, (1, 128))},
        ),
    }
    rows: list[Row] = []
    for name, (model, example) in shapes.items():
        model.eval()
        stream = hidden_width.find_stream(model, example)
        width = round((1 - REMOVED) * stream.width)
        narrow = hidden_width.narrow(model, stream, torch.eye(stream.width), width)
        files = {}
        for key, module in (("dense", model), ("narrow", narrow)):
            files[key] = out / f"{len(rows)}-{key}.onnx"
            export(module, example, files[key], outputs=("logits",))
        inputs = {key: value.numpy() for key, value in example.items()}
        calls = {key: onnxruntime.OrtRunner(file, 1).timed(inputs) for key, file in files.items()}
        ratio = timing.compare(calls, blocks=30, threads=1).ratio("narrow")
        rows.append(
            {
                "model": name, "method": f"{stream.width} -> {width}", "speedup": round(ratio.value, 3),
                "low": round(ratio.interval.low, 3), "high": round(ratio.interval.high, 3),
            }
        )  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def cifar(path: Path) -> Tensor:
    """[n, 3, 32, 32] float32 about zero; the files hold differences of neighbours and of colors."""
    with lzma.open(path) as file:
        pixels = np.frombuffer(file.read(), np.uint8).reshape(-1, 3, 32, 32).copy()
    pixels[..., 0] = pixels[..., 0].cumsum(2, dtype=np.uint8)
    pixels = pixels.cumsum(3, dtype=np.uint8)
    pixels[:, 0] += pixels[:, 1]
    pixels[:, 2] += pixels[:, 1]
    return torch.tensor(pixels, dtype=torch.float32) / 127.5 - 1

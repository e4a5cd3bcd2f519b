"""The benchmark `smoothing`: perplexity of a quantized pretrained decoder, with and without SmoothQuant."""

import argparse
import copy
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.core import ranges, smooth
from compress.methods import quantized_layers
from compress.pipeline import smoothquant
from compress.sites import discovery
from compress.tasks import task as task_module
from compress.tasks.task import Batch, Task, lost_between
from compress.tasks.text_generation import TextGeneration

Row = dict[str, object]
TOKENS = 128  # of a block
KINDS: tuple[str, ...] = ("int8-dynamic", "int8-static", "int4")
WAYS = {"plain": None, "smoothed for 8 bits": smooth.LEVELS, "smoothed for 4 bits": smooth.FEW}


class Stories(TextGeneration):
    """A pretrained decoder and blocks of text: half to calibrate on, as many again to score."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokens, self.vocabulary = TOKENS, self.model.config.vocab_size
        with gzip.open(folder / "tinystories_train_head.txt.gz", "rt", encoding="utf-8") as file:
            ids = AutoTokenizer.from_pretrained(folder)(file.read(), return_tensors="pt").input_ids[0]
        blocks = ids[: len(ids) // TOKENS * TOKENS].reshape(-1, TOKENS)
        middle = len(blocks) // 2
        self.blocks = {"calibration": blocks[:middle], "test": blocks[middle:]}


def run(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Every product of the sites on integers: perplexity, what was lost of it, divergence."""
    task = Stories(arguments.data / "stories260k")
    seen = list(task.batches("calibration", 16))
    sites = discovery.find_sites(task.model, seen[0].inputs).sites
    names = [matmul.weight for site in sites for matmul in site.matmuls]
    dense = task.outcomes(_run(task, task.model))
    rows: list[Row] = [
        {"what": "float32", "perplexity": round(task.scored(dense), 4), "n": int(dense[:, 1].sum())}
    ]
    for way, levels in WAYS.items():
        smoothed = copy.copy(task)
        smoothed.model = copy.deepcopy(task.model)
        for spot in smoothquant.find_pairs(task, sites, seen, levels) if levels else ():
            smoothquant.apply(smoothed.model, spot, torch.tensor(spot.divide, dtype=torch.float64))
        for kind in KINDS:
            model = _rounded(smoothed, names, seen, kind)
            found = task.outcomes(_run(task, model))
            low, high = lost_between(task, dense, found)
            rows.append(
                {
                    "what": f"{kind}, {way}",
                    "perplexity": round(task.scored(found), 4),
                    "lost": round(task.scored(found) - task.scored(dense), 4),
                    "low": round(low, 4),
                    "high": round(high, 4),
                    "divergence": round(_divergence(task, model), 6),
                }
            )
    return rows


def _rounded(task: Task, names: Sequence[str], batches: Sequence[Batch], kind: str) -> nn.Module:
    """A copy of the model whose products of these weights compute in a precision."""
    seen = quantized_layers.observe(task, names, batches)
    places = {}
    for name in names:
        layer = task.model.get_submodule(name.removesuffix(".weight"))
        span = ranges.span(seen[name].histogram, "mse") if kind == "int8-static" else None
        places[name], _ = quantized_layers.round_linear(
            layer, kind, seen[name].second, seen[name].mean, span=span
        )
    model = copy.deepcopy(task.model)
    quantized_layers.insert(model, places)
    return model


def _run(task: Task, model: nn.Module) -> task_module.Run:
    """A torch model as scores are asked of it."""

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
            return task.logits(model(**tensors)).numpy()

    return run


def _divergence(task: Task, model: nn.Module) -> float:
    """Mean divergence of the next token from the dense model's, over the test blocks."""
    total = count = 0.0
    with torch.inference_mode():
        for batch in task.batches("test", 16):
            answers = [task.logits(one(**batch.inputs)) for one in (model, task.model)]
            total += float(task_module.kl(*answers).sum())
            count += batch.inputs["input_ids"].numel()
    return total / count

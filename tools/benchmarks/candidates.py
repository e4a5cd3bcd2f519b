"""Time and memory of all candidates, and the error of predicted speedups."""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from benchmarks.compiled import Plain, recipe_of
from transformers import BertConfig, BertForSequenceClassification

from compress.calibration import activation_statistics
from compress.core import obs
from compress.cost import latency_table
from compress.ir import Option, Site
from compress.measure import timing
from compress.methods import candidate_store
from compress.pipeline import compilation, plan_search
from compress.pipeline.job import Job, prepare
from compress.pipeline.pricing import price
from compress.search.closed_loop import Timing
from compress.sites import discovery, prune
from compress.tasks.loading import Batch, Task

Row = dict[str, object]


def build_database(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Seconds and peak memory of all candidates of all sites; each model in a process of its own."""
    rows: list[Row] = []
    for what in (_small, _bert_base, _one_at_a_time):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            rows += alone.submit(what, arguments, out).result()
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _small(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """The model under test, its own data, the recipe's own levels."""
    job = _job(arguments, out)
    return [
        _built(
            str(arguments.model or "the embedded default"),
            job.task,
            job.sites,
            job.calibration,
            out / "small",
        )
    ]


def _bert_base(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """A BERT-base-shaped model at random weights and inputs: 12 layers, 768 hidden, 3072 neurons."""
    torch.set_num_threads(timing.physical_cores())
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_labels=2)).eval()
    task = Shaped(model)
    found = discovery.find_sites(model, task.example(1, 32))
    return [
        _built(
            "BERT-base-shaped, random weights",
            task,
            found.sites,
            task.batches("calibration", 32),
            out / "base",
        )
    ]


class Shaped(Task):
    """A model without data: its inputs are random ids."""

    name = "text-classification"
    outputs = ("logits",)

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def example(self, batch: int, tokens: int) -> dict[str, torch.Tensor]:
        """Random ids and a mask without padding."""
        ids = torch.randint(1000, 30000, (batch, tokens))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def batches(self, split: str, size: int, limit: int | None = None) -> list[Batch]:
        """1,024 sentences of 32 tokens."""
        made = [self.example(size, 32) for _ in range(1024 // size)]
        return [Batch(one, None, one["attention_mask"].bool()) for one in made]


def _built(what: str, task: Task, sites: Sequence[Site], batches: Sequence[Batch], out: Path) -> Row:
    """One row: statistics, then all candidates of every site at the levels of a CPU."""
    began = time.perf_counter()
    activation_statistics.collect(task, sites, batches, out / "statistics")
    calibrated = time.perf_counter()
    options = {
        site.name: [Option(units=units) for units in latency_table.grid(site, 8) if units < site.units]
        for site in sites
    }
    candidate_store.build(task.model, sites, out / "statistics", options, out / "candidates")
    return {
        "what": what,
        "sites": len(sites),
        "levels": sum(len(row) for row in options.values()),
        "statistics_s": round(calibrated - began, 1),
        "candidates_s": round(time.perf_counter() - calibrated, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def _one_at_a_time(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """One feed-forward site: our sweep against the paper's loop over columns, in turn, three times."""
    job = _job(arguments, out)
    index = next(number for number, site in enumerate(job.sites) if site.kind == "ffn")
    site = job.sites[index]
    moments = activation_statistics.read(out / "small" / "statistics", index)
    weight = prune.writer_columns(job.task.model, site).double()
    centered = moments.second - torch.outer(moments.mean, moments.mean)
    levels = [units for units in latency_table.grid(site, 8) if 0 < units < site.units]
    ratios, gaps = [], []
    for _ in range(3):
        began = time.perf_counter()
        found = list(obs.solve(weight, moments.second, moments.mean, levels, width=1))
        ours = time.perf_counter() - began
        began = time.perf_counter()
        published = _published(weight, centered, levels)
        ratios.append((time.perf_counter() - began) / ours)
        gaps = [
            _damage(weight, level.kept, level.weight, centered) / published[len(level.kept)]
            for level in found
        ]
    return [
        {
            "what": f"one column at a time, {site.name}",
            "levels": len(levels),
            "times_slower_than_ours": [round(ratio, 1) for ratio in ratios],
            "our_error_over_its_median": round(float(np.median(gaps)), 4),
            "our_error_over_its_worst": round(max(gaps), 4),
        }
    ]


def _published(weight: torch.Tensor, second: torch.Tensor, levels: Sequence[int]) -> dict[int, float]:
    """The loop as ZipLM states it: score all, remove one, update weights and inverse; errors by level."""
    weight = weight.clone()
    start = weight.clone()
    damped = second + torch.diag(1e-2 * second.diagonal())
    inverse = torch.linalg.inv(damped)
    alive = torch.ones(len(second), dtype=torch.bool)
    errors = {}
    for kept in range(len(second) - 1, min(levels) - 1, -1):
        scores = weight.square().sum(0) / inverse.diagonal()
        place = int(torch.where(alive, scores, torch.inf).argmin())
        row = inverse[place] / inverse[place, place]
        weight -= torch.outer(weight[:, place], row)
        inverse -= torch.outer(inverse[:, place], row)
        alive[place] = False
        inverse[place] = inverse[:, place] = 0.0
        inverse[place, place] = 1.0
        weight[:, ~alive] = 0.0
        if kept in levels:
            stay = alive.nonzero()[:, 0]
            errors[kept] = _damage(start, stay, weight[:, stay], second)
    return errors


def _damage(dense: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor, second: torch.Tensor) -> float:
    """Added squared output error of a layer that keeps `kept` columns."""
    lost = dense.clone()
    lost[:, kept] -= weight
    return float(((lost @ second) * lost).sum())


def _job(arguments: argparse.Namespace, out: Path) -> Job:
    torch.set_num_threads(timing.physical_cores())
    return prepare(recipe_of(arguments, out / "job", 2.0, shapes={"tokens": arguments.tokens}), Plain())


def prediction(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Predicted and measured time of random plans."""
    rows: list[Row] = []
    recipe = recipe_of(arguments, out / "prediction", 2.0, shapes={"tokens": arguments.tokens})
    job = prepare(recipe, Plain())
    costs = price(job)
    menus = plan_search.build_table(job, costs, plan_search.build_candidates(job, costs))
    act = compilation.time_plan(job)
    random = np.random.default_rng(0)
    for number in range(10):
        choices = tuple(int(random.integers(0, len(row))) for row in menus.options)
        found: Timing = act(menus.named(choices))
        predicted = costs.dense_ms / menus.latency_ms(choices)
        rows.append(
            {
                "plan": number + 1,
                "predicted_speedup": round(predicted, 3),
                "measured_speedup": round(found.speedup, 3),
                "low": round(found.interval95[0], 3),
                "high": round(found.interval95[1], 3),
                "error": round(abs(found.speedup / predicted - 1), 4),
            }
        )
    mean = float(np.mean([float(str(row["error"])) for row in rows]))
    rows.append({"plan": "mean", "error": round(mean, 4)})
    return rows

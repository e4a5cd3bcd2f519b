"""Every figure that the project states, measured here: one table on the screen and one JSON file.

    python tools/benchmark.py demo                      the embedded default at 1.5x, 2x and 3x, three times
    python tools/benchmark.py methods --model DIR       ZipLM with search against uniform baselines
    python tools/benchmark.py families --model DIR      recovered families: ours, by magnitude, undistilled
    python tools/benchmark.py moves --model DIR         every move alone, and all of them in one search
    python tools/benchmark.py database --model DIR      time and memory of the candidates
    python tools/benchmark.py prediction --model DIR    predicted against measured time of random plans
    python tools/benchmark.py precision                 our 8 and 4 bits against onnxruntime's own quantizer
    python tools/benchmark.py blocks                    block-sparse products against their dense Gemm
    python tools/benchmark.py encoder                   an encoder with all its products in blocks
    python tools/benchmark.py pat --data DATA           the hidden width, pruned while tuning or before
    python tools/benchmark.py sltrain --data DATA       trained dense, low-rank, or sparse plus low-rank
    python tools/benchmark.py gpusq --data DATA         2:4 on 8 bits, with and without each distillation term

DIR is what `tools/finetune_sst2.py` or `tools/train_vit.py` wrote: a Hugging Face directory beside
`train.csv` and `dev.csv`, or `train.npz` and `dev.npz`.
DATA holds public data sets in folders: `cifar10`, `tinyshakespeare`, `wikitext2`.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from benchmarks import blocks, gpusq, hidden_width, precision, sltrain
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification

from compress import (
    analyze,
    artifact,
    bench,
    calibrate,
    choosing,
    cost,
    database,
    gradual,
    pipeline,
    surgery,
)
from compress.core import obs
from compress.errors import CompressError
from compress.ir import Option, Site
from compress.job import Job, prepare
from compress.loop import Timing
from compress.pricing import price
from compress.recipe import Recipe, read
from compress.report import Report
from compress.task import Batch, Task

Row = dict[str, object]
METHODS: dict[str, dict[str, object]] = {
    "ZipLM + search": {"score": "obs"},
    "ZipLM + uniform": {"score": "obs", "uniform": True},
    "magnitude + uniform": {"score": "magnitude", "uniform": True},
    "Wanda + uniform": {"score": "wanda", "uniform": True},
    "Taylor + uniform": {"score": "taylor", "uniform": True},
}
MOVES: dict[str, dict[str, object]] = {
    "structure": {"moves": ["structure"]},
    "block": {"moves": ["block"]},
    "lowrank": {"moves": ["lowrank"]},
    "int8": {"moves": ["int8"]},
    "int8-static": {"moves": ["int8-static"]},
    "int4": {"moves": ["int4"]},
    "structure + int8": {"moves": ["structure", "int8"]},
    "all in one search": {"moves": ["structure", "block", "lowrank", "int8"]},
}
FAMILIES: dict[str, dict[str, dict[str, object]]] = {
    "ZipLM distilled": {},
    "magnitude + uniform distilled": {"options": {"score": "magnitude", "uniform": True}},
    "ZipLM labels alone": {"recovery": {"task": 1.0, "logits": 0.0, "hidden": 0.0}},
}


class Plain:
    """Progress for a log: one line a stage."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Say when a stage ends and how long it took."""
        began = time.perf_counter()
        yield lambda done, total: None
        print(f"  {name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Say a line."""
        print(f"  {line}", file=sys.stderr, flush=True)


def recipe_of(
    arguments: argparse.Namespace, out: Path, speedup: float, **tables: dict[str, object]
) -> Recipe:
    """A request for the model under test."""
    values: dict[str, object] = {
        "target": "cpu",
        "budget": {"speedup": speedup},
        "out": str(out),
        **tables,
    }
    if arguments.model is not None:
        suffix = ".npz" if (arguments.model / "train.npz").exists() else ".csv"
        values |= {"model": str(arguments.model), "data": str(arguments.model / f"train{suffix}")}
        values |= {"test": str(arguments.model / f"dev{suffix}")}
    return read(None, values)


def demo(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Asked against measured on the embedded default, every run from nothing."""
    rows: list[Row] = []
    for repeat in range(arguments.repeats):
        for speedup in (1.5, 2.0, 3.0):
            began = time.perf_counter()
            report = pipeline.run(recipe_of(arguments, out / f"{repeat}-{speedup}", speedup), Plain())
            rows.append(_outcome("ZipLM + search", speedup, report) | {"run": repeat + 1})
            rows[-1]["seconds"] = round(time.perf_counter() - began, 1)
    return rows


def methods(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Score lost at equal measured speed, without any training: how units are ranked."""
    return _compared(arguments, out, METHODS)


def families(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """One gradual family for every way of recovery, on the same schedule."""
    rows: list[Row] = []
    for name in arguments.methods.split(",") if arguments.methods else list(FAMILIES):
        tables = FAMILIES[name]
        recovery: dict[str, object] = {
            "mode": arguments.recover,
            "epochs": arguments.epochs,
            "samples": arguments.samples,
            **tables.get("recovery", {}),
        }
        recipe = recipe_of(
            arguments,
            out / name.replace(" ", ""),
            arguments.speedups[0],
            recovery=recovery,
            options=tables.get("options", {}),
            shapes={"tokens": arguments.tokens},
        ).model_copy(update={"speedups": tuple(arguments.speedups)})
        found = gradual.run(recipe, Plain())
        for one in found.members:
            assert one.interval95 is not None
            rows.append(
                {
                    "method": name,
                    "asked": one.speedup,
                    "measured": round(float(one.measured or 0), 3),
                    "low": round(one.interval95[0], 3),
                    "high": round(one.interval95[1], 3),
                    "status": one.status,
                    "dense_score": round(float(found.dense_score or 0), 4),
                    "score": round(float(one.score or 0), 4),
                    "points_lost": round(100 * float(one.score_drop or 0), 2),
                    "seconds": round(one.seconds),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def moves(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Score lost at equal measured speed, without any training: what may be done to a site."""
    return _compared(arguments, out, MOVES)


def _compared(arguments: argparse.Namespace, out: Path, known: dict[str, dict[str, object]]) -> list[Row]:
    """A row for every method and speedup; one that cannot be reached says so."""
    rows: list[Row] = []
    for name in arguments.methods.split(",") if arguments.methods else list(known):
        for speedup in arguments.speedups:
            recipe = recipe_of(
                arguments,
                out / name.replace(" ", ""),
                speedup,
                options=known[name],
                shapes={"tokens": arguments.tokens},
            )
            began = time.perf_counter()
            try:
                rows.append(_outcome(name, speedup, pipeline.run(recipe, Plain())))
            except CompressError as error:
                rows.append({"method": name, "asked": speedup, "status": str(error).splitlines()[0]})
            rows[-1]["seconds"] = round(time.perf_counter() - began, 1)
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _outcome(name: str, speedup: float, report: Report) -> Row:
    """The figures of one report that the tables show."""
    measured = report.verdict.measured
    assert measured is not None
    return {
        "method": name,
        "asked": speedup,
        "measured": round(measured.speedup, 3),
        "low": round(measured.interval95[0], 3),
        "high": round(measured.interval95[1], 3),
        "status": report.verdict.status,
        "dense_score": round(float(report.baseline.score or 0), 4),
        "score": round(float(report.compressed.score or 0), 4),
        "points_lost": round(100 * float(report.verdict.score_drop or 0), 2),
        "n": report.score.samples,
        "rounds": len(report.rounds),
    }


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
    torch.set_num_threads(bench.physical_cores())
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_labels=2)).eval()
    task = Shaped(model)
    found = analyze.find_sites(model, task.example(1, 32))
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
    output_name = "logits"

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
    calibrate.collect(task, sites, batches, out / "statistics")
    calibrated = time.perf_counter()
    options = {
        site.name: [Option(units=units) for units in cost.grid(site, 8) if units < site.units]
        for site in sites
    }
    database.build(task.model, sites, out / "statistics", options, out / "candidates")
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
    moments = calibrate.read(out / "small" / "statistics", index)
    weight = surgery.writer_columns(job.task.model, site).double()
    centered = moments.second - torch.outer(moments.mean, moments.mean)
    levels = [units for units in cost.grid(site, 8) if 0 < units < site.units]
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
    torch.set_num_threads(bench.physical_cores())
    return prepare(recipe_of(arguments, out / "job", 2.0, shapes={"tokens": arguments.tokens}), Plain())


def prediction(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Predicted and measured time of random plans."""
    rows: list[Row] = []
    recipe = recipe_of(arguments, out / "prediction", 2.0, shapes={"tokens": arguments.tokens})
    job = prepare(recipe, Plain())
    costs = price(job)
    menus = choosing.menus_of(job, costs, choosing.candidates(job, costs))
    act = pipeline.time_plan(job)
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


BENCHMARKS = {
    "demo": demo,
    "methods": methods,
    "families": families,
    "moves": moves,
    "database": build_database,
    "prediction": prediction,
    "precision": precision.run,
    "blocks": blocks.run,
    "encoder": blocks.encoder,
    "pat": hidden_width.run,
    "sltrain": sltrain.run,
    "gpusq": gpusq.run,
}


def main() -> None:
    """Run one benchmark; print its table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--model", type=Path, help="a directory of tools/finetune_sst2.py or train_vit.py")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.5, 2.0, 3.0, 4.0])
    known = [*METHODS, *FAMILIES, *MOVES, *sltrain.METHODS]
    parser.add_argument("--methods", help=f"comma list of {', '.join(known)}")
    parser.add_argument("--recover", choices=("fast", "full"), default="full", help="for families")
    parser.add_argument("--epochs", type=int, default=4, help="a course of recovery, for families")
    parser.add_argument("--samples", type=int, default=16384, help="inputs of an epoch, for families")
    parser.add_argument("--products", default="3072x768,768x3072", help="comma list of OUTxIN, for blocks")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128], help="rows of x, for blocks")
    parser.add_argument(
        "--patterns", default=blocks.PATTERNS, help="comma list of block patterns, for blocks"
    )
    parser.add_argument(
        "--data", type=Path, help="a directory with the data sets, for pat, sltrain and gpusq"
    )
    parser.add_argument("--dense-steps", type=int, help="from scratch, for pat (600) and gpusq (1500)")
    parser.add_argument(
        "--steps", type=int, help="for pat (200), sltrain (500) and each stage of gpusq (100)"
    )
    parser.add_argument("--seeds", type=int, help="for sltrain (1) and gpusq (2)")
    parser.add_argument("--batch", type=int, default=64, help="inputs a step, for pat and gpusq")
    parser.add_argument("--threads", type=int, default=bench.physical_cores())
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = BENCHMARKS[arguments.benchmark](arguments, Path(folder))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=arguments.benchmark)
    for row in rows:
        table.add_row(*(str(row.get(key, "")) for key in columns))
    Console().print(table)
    document = {
        "benchmark": arguments.benchmark,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": bench.environment(),
        "rows": rows,
    }
    artifact.write_text(arguments.json, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Whole compilations: asked against measured speedup, scores of units, recovery, and moves."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import CompressError
from compress.pipeline import compilation, family_compilation
from compress.recipe import Recipe, read
from compress.report.schema import Report

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
        values |= {"model": str(arguments.model), "data": str(arguments.model)}
    return read(None, values)


def demo(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Asked against measured on the embedded default, every run from nothing."""
    rows: list[Row] = []
    for repeat in range(arguments.repeats):
        for speedup in (1.5, 2.0, 3.0):
            began = time.perf_counter()
            report = compilation.run(recipe_of(arguments, out / f"{repeat}-{speedup}", speedup), Plain())
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
        found = family_compilation.run(recipe, Plain())
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
                    "points_lost": _points(one.score_drop, one.score_drop_interval95),
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
                rows.append(_outcome(name, speedup, compilation.run(recipe, Plain())))
            except CompressError as error:
                rows.append({"method": name, "asked": speedup, "status": str(error).splitlines()[0]})
            rows[-1]["seconds"] = round(time.perf_counter() - began, 1)
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _points(drop: float | None, between: tuple[float, float] | None) -> str:
    """Points lost with their 95 % interval."""
    ends = "" if between is None else f" [{100 * between[0]:.2f}, {100 * between[1]:.2f}]"
    return f"{100 * float(drop or 0):.2f}{ends}"


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
        "points_lost": _points(report.verdict.score_drop, report.verdict.score_drop_interval95),
        "n": report.score.samples,
        "rounds": len(report.rounds),
    }

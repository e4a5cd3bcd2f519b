"""Fixed reports for the tests of everything that reads one, and the goldens they are held against."""

import os
from pathlib import Path

from compress.ir import Budget, Latency
from compress.report.schema import (
    Figures,
    FrontPoint,
    Measured,
    Parity,
    Predicted,
    Report,
    Round,
    Samples,
    Score,
    SiteReport,
    Stage,
    Target,
    Verdict,
    judge,
    steps,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = Target(
    name="cpu",
    runtime="onnxruntime",
    runtime_version="1.32",
    provider="CPUExecutionProvider",
    threads=1,
    shapes={"batch": 1, "tokens": 32},
)
TIMED = Measured(speedup=2.06, interval95=(2.03, 2.09))
A100 = Target(name="a100", runtime="tensorrt", precision="fp16", shapes={"batch": 8, "tokens": 128})


def site(layer, kind, units, total, now, dense, source):
    return SiteReport.model_validate(
        {
            "name": f"bert.encoder.layer.{layer}.{kind}",
            "kind": kind,
            "option": {"units": units, "units_total": total},
            "error": 0.125 * (1 - units / total),
            "latency_ms": now,
            "dense_latency_ms": dense,
            "source": source,
        }
    )


def sites(layers, source):
    found = []
    for layer in range(layers):
        heads, neurons = (layer * 5) % 13, (layer * 400) % 1537
        found.append(site(layer, "heads", heads, 12, 0.01 + 0.02 * heads, 0.25, source))
        found.append(site(layer, "ffn", neurons, 1536, 0.02 + 0.0002 * neurons, 0.3272, source))
    return tuple(found)


def latency(p50):
    return Latency(p50=p50, p90=1.1 * p50, p99=1.25 * p50, mean=1.02 * p50, std=0.05, runs=2400)


def report(
    asked=None,
    *,
    measured=TIMED,
    now_ms=2.0,
    scores=(0.954, 0.941),
    metric="accuracy",
    max_drop=None,
    layers=3,
    target=None,
    predicted=None,
    figures=None,
    **more,
):
    """A report whose status and drop follow from its figures; `measured=None` is another machine."""
    asked = asked or Budget(speedup=2.0)
    on_target = measured is not None
    dense = Figures(
        latency_ms=latency(4.12) if on_target else None,
        score=scores[0],
        parameters=10_812_345,
        weight_bytes=43_249_380,
        file_bytes=43_500_000,
        **({} if figures is None else figures[0]),
    )
    small = Figures(
        latency_ms=latency(now_ms) if on_target else None,
        score=scores[1],
        parameters=5_612_345,
        weight_bytes=22_449_380,
        file_bytes=22_600_000,
        **({} if figures is None else figures[1]),
    )
    better = metric != "perplexity"
    drop = None
    if None not in scores:
        drop = round(scores[0] - scores[1] if better else scores[1] - scores[0], 9)
    status, reason = judge(asked, measured, small, drop, max_drop)
    places = sites(layers, "measured" if on_target else "estimated")
    values = {
        "created": "2026-01-01T00:00:00+00:00",
        "model": "demo",
        "task": "text-classification",
        "target": target or (CPU if on_target else A100),
        "verdict": Verdict(
            status=status,
            asked=asked,
            measured=measured,
            predicted=predicted or Predicted(speedup=2.1, latency_ms=1.96, baseline_latency_ms=4.11),
            score_drop=drop,
            reason=reason,
        ),
        "max_drop": max_drop,
        "baseline": dense,
        "compressed": small,
        "score": Score(metric=metric, samples=4500, higher_is_better=better),
        "sites": places,
    }
    return Report(**(values | more))


def whole():
    """A measured report with every part filled: the golden one."""
    base = report(max_drop=0.02)
    return base.model_copy(
        update={
            "verdict": base.verdict.model_copy(update={"score_drop_interval95": (0.0044, 0.0218)}),
            "reachable_speedup": 6.4,
            "parity": Parity(max_abs_difference=3.1e-6, tolerance=1e-4, agreement=1, inputs=256),
            "rounds": (
                Round(budget_ms=2.05, predicted_ms=2.04, measured_ms=2.2, measured_speedup=1.87),
                Round(budget_ms=1.9, predicted_ms=1.89, measured_ms=2.0, measured_speedup=2.06),
            ),
            "stages": (Stage(name="sites", seconds=1.25), Stage(name="costs", seconds=33, resumed=True)),
            "front": tuple(
                FrontPoint(
                    budget_ms=4 / (1 + i / 4),
                    predicted_speedup=1 + i / 4,
                    error=i * i / 100,
                    loss=i * i / 400,
                    chosen=i == 4,
                )
                for i in range(9)
            ),
            "samples": Samples(
                baseline=[4.12 + 0.001 * (i % 7) for i in range(40)],
                compressed=[2.0 + 0.002 * (i % 5) for i in range(40)],
            ),
            "waterfall": steps(4.12, 2.0, base.sites),
            "fixed_ms": 0.4,
            "attribution": ("0.40 ms lie in the embedding and the classifier.",),
            "warnings": ("The dense model was 4 % slower at the end than at the start.",),
            "environment": {"cpu": "two cores", "avx2": True, "vnni": False, "torch": "2.13.0"},
            "protocol": {"blocks": 40, "block_ms": 60.0, "clocks": None},
            "inputs": {"model": "5f2a", "calibration": "99ab"},
        }
    )


def matches(name, text):
    """Whether a text is the stored one; COMPRESS_ACCEPT=1 stores it instead."""
    path = GOLDEN / name
    if os.environ.get("COMPRESS_ACCEPT") == "1":
        path.write_text(text, encoding="utf-8")
    return path.read_text(encoding="utf-8") == text

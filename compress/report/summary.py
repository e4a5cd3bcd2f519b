"""The one line that answers a request, and the phrases it is made of."""

from pathlib import Path

from compress.report.formatting import amount, digits, exact, score_decimals, score_text
from compress.report.schema import Report, Target, found, precision


def device(target: Target, runs: str | None = None) -> str:
    """Where and how it ran, in `runs`: `this CPU (onnxruntime 1.32, fp32 + int8, 1 thread, batch 1 x 32)`."""
    where = "this CPU" if target.name == "cpu" else target.name
    facts = [f"{target.runtime} {target.runtime_version or ''}".strip(), runs or target.precision]
    if target.threads is not None:
        facts.append(f"{target.threads} thread{'s' if target.threads > 1 else ''}")
    if target.shapes:
        sizes = list(map(str, target.shapes.values()))
        told = {"prefill": "prompts of batch ", "decode": "one token after a past of batch "}
        facts.append((told[target.phase] if target.phase else "batch ") + " x ".join(sizes))
    return f"{where} ({', '.join(facts)})"


def outcome(report: Report) -> list[str]:
    """What came out, part by part: the figure asked for, the speedup beside it, or estimates."""
    verdict = report.verdict
    asked, measured, predicted = verdict.asked, verdict.measured, verdict.predicted
    where = f"on {device(report.target, precision(report.target, report.sites))}"
    value = found(asked, measured, report.compressed)
    speed = (
        "" if measured is None else "{:.2f}x [{:.2f}, {:.2f}]".format(measured.speedup, *measured.interval95)
    )
    if value is not None and asked.name == "speedup" and measured is not None:
        low, high = measured.interval95
        return [f"measured {exact(asked, value)} [{low:.2f}, {high:.2f}], {latencies(report)} {where}"]
    if value is not None:
        return [f"measured {exact(asked, value)}{f' ({speed})' if speed else ''} {where}"]
    guess = report.compressed.energy_mj if asked.name == "energy_mj" else report.compressed.power_w
    if asked.name in ("speedup", "latency_ms") or guess is None:
        guess = getattr(predicted, asked.name, None)
    words = (
        "no prediction"
        if guess is None
        else (f"predicted {amount(asked.name, guess)} (estimate, {predicted.source})")
    )
    parts = [f"{words} {where}", "not measured"]
    return [*parts, f"measured {speed}"] if speed else parts


def quality(report: Report) -> str:
    """The score before and after, e.g. `accuracy 95.4 -> 94.1`."""
    metric, before, after = report.score.metric, report.baseline.score, report.compressed.score
    if before is None or after is None:
        return f"{metric} not measured"
    return f"{metric} {scores(report)}"


def scores(report: Report) -> str:
    """Both scores with as many digits as tell them apart, e.g. `95.4 -> 94.1`."""
    metric, before, after = report.score.metric, report.baseline.score, report.compressed.score
    decimals = score_decimals(metric, before, after)
    return f"{score_text(metric, before, decimals)} -> {score_text(metric, after, decimals)}"


def latencies(report: Report) -> str:
    """Both median latencies, e.g. `2.25 -> 1.05 ms`; empty where they were not measured."""
    dense, now = report.baseline.latency_ms, report.compressed.latency_ms
    return "" if dense is None or now is None else f"{digits(dense.p50)} -> {digits(now.p50)} ms"


def shown_model(model: str) -> str:
    """The name of a model without the directories of a local path; a hub id keeps its owner.

    >>> shown_model("/home/me/models/minilm"), shown_model("owner/name"), shown_model("a/b/net.py:make")
    ('minilm', 'owner/name', 'net.py:make')
    """
    parts = [part for part in model.replace("\\", "/").split("/") if part]
    relative = len(parts) == 2 and model == "/".join(parts) and parts[0] not in (".", "..", "~")
    if relative and ".py" not in model and not Path(model).exists():
        return model
    return parts[-1] if parts else model


def verdict_line(report: Report, page: str = "compression/report.html") -> str:
    """The one line that answers the request: asked, measured, quality, status, where the proof is."""
    verdict = report.verdict
    status = verdict.status.upper().replace("_", " ")
    if verdict.status == "missed" and verdict.reason:
        status += f" ({verdict.reason})"
    rate = "" if verdict.asked.rate_hz is None else f" at {verdict.asked.rate_hz:g} runs/s"
    asked = f"asked {amount(verdict.asked.name, verdict.asked.value)}{rate}"
    return " · ".join([asked, *outcome(report), quality(report), status, page])

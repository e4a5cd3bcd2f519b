"""The one line that answers a request, and the phrases it is made of."""

from compress.report.formatting import amount, exact, score_text
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
        return [f"measured {exact(asked, value)} [{low:.2f}, {high:.2f}] {where}"]
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
    return f"{metric} {score_text(metric, before)} -> {score_text(metric, after)}"


def verdict_line(report: Report, page: str = "compression/report.html") -> str:
    """The one line that answers the request: asked, measured, quality, status, where the proof is."""
    verdict = report.verdict
    status = verdict.status.upper().replace("_", " ")
    if verdict.status == "missed" and verdict.reason:
        status += f" ({verdict.reason})"
    rate = "" if verdict.asked.rate_hz is None else f" at {verdict.asked.rate_hz:g} runs/s"
    asked = f"asked {amount(verdict.asked.name, verdict.asked.value)}{rate}"
    return " · ".join([asked, *outcome(report), quality(report), status, page])

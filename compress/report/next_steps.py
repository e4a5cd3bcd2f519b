"""What to do after a verdict: how it is still come by, and what helps where little is left of a model."""

from compress.report.formatting import PERCENT, score_text
from compress.report.schema import Report


def next_step(report: Report, directory: str = "DIR") -> str | None:
    """How a run that could not be measured here still comes to a verdict, None when it has one."""
    if report.verdict.status != "not_measured" or report.verdict.measured is not None:
        return None
    return (
        f"For a verdict: `compress export {directory} --to edge --archive`; on the {report.target.name}, "
        f"`python3 verify.py` of that bundle; here, `compress report {directory} --merge measured.json`"
    )


def ruin(report: Report) -> str | None:
    """That less than half of the dense score is left, and what would help; None where more is left."""
    dense, now, metric = report.baseline.score, report.compressed.score, report.score.metric
    if metric not in PERCENT or not dense or now is None or now >= dense / 2:
        return None
    whole_ms = report.verdict.predicted.baseline_latency_ms
    fixed = ""
    if report.fixed_ms is not None and whole_ms:
        share = report.fixed_ms / whole_ms
        fixed = f": {share:.0%} of the dense model's time lies outside everything that can be removed"
    shape = " x ".join(str(side) for side in report.target.shapes.values())
    return (
        f"Little is left of the model ({metric} {score_text(metric, dense)} -> {score_text(metric, now)})"
        f"{fixed} at {shape} on {report.target.name}. Ask for less, price larger inputs with --batch or "
        "--tokens, or win quality back with --recover"
    )

"""What to do after a verdict: how to measure elsewhere, what helps after a miss or a large loss."""

import math

from compress.report.formatting import PERCENT, score_text
from compress.report.schema import Report, found


def next_step(report: Report, directory: str = "DIR") -> str | None:
    """What to do next: measure on the target, or what to change after a miss; None when the budget is met."""
    if report.verdict.status == "missed":
        return _after_miss(report)
    if report.verdict.status != "not_measured" or report.verdict.measured is not None:
        return None
    return (
        f"For a verdict: `compress export {directory} --to edge --archive`; on the {report.target.name}, "
        f"`python3 verify.py` of that bundle; here, `compress report {directory} --merge measured.json`"
    )


def _after_miss(report: Report) -> str:
    """Which request would be met, or which options give the search more to choose from."""
    verdict = report.verdict
    asked, measured, now = verdict.asked, verdict.measured, report.compressed
    drop = verdict.score_drop
    if report.max_drop is not None and drop is not None and drop > report.max_drop:
        return (
            "To lose less: train the compressed model with `--recover fast` or `--recover full`, add "
            f"techniques with `--moves`, ask for less, or allow this loss with `--max-drop {_up(drop)}`"
        )
    more = "add techniques with `--moves` (`compress plan` shows which pay off on this target)"
    value = found(asked, measured, now)
    if asked.name == "speedup" and measured is not None:
        reach = math.floor(100 * measured.interval95[0] + 1e-9) / 100
        known = report.reachable_speedup
        if known is not None and known > 1.1 * asked.value:
            return (
                f"Plans up to {known:.2f}x (estimate) exist: run the same command again on a quiet machine, "
                f"which reuses finished work, or {more}; `--speedup {reach:g}x` is met by this result"
            )
        return f"To reach {asked.value:g}x, {more}; `--speedup {reach:g}x` is met by this result"
    option = f"--{asked.name.replace('_', '-')}"
    if value is None:
        return f"To meet {option} {asked.value:g}, {more}"
    return f"To meet {option} {asked.value:g}, {more}; `{option} {_up(value)}` is met by this result"


def _up(value: float) -> str:
    """A bound above a value, in three significant digits.

    >>> _up(1.2341), _up(0.0131), _up(25.0)
    ('1.24', '0.0132', '25.1')
    """
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{(math.floor(value / step + 1e-9) + 1) * step:.6g}"


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

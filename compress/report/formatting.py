"""Numbers as people read them: digits that mean something, always with their unit."""

import math
from collections.abc import Iterable

from compress.ir import Budget
from compress.recipe import UNITS

PERCENT = ("accuracy", "f1", "precision", "recall", "agreement")


def digits(value: float) -> str:
    """A number with three significant digits, never in scientific notation above 0.001.

    >>> [digits(value) for value in (0.01234, 2.0, 18.31, 1234.5)]
    ['0.0123', '2.00', '18.3', '1234']
    """
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    whole = math.floor(math.log10(abs(value)))
    return f"{value:.{max(2 - whole, 0)}f}"


def amount(name: str, value: float) -> str:
    """A budget's value with its unit.

    >>> amount("speedup", 2), amount("latency_ms", 5), amount("size_mb", 30)
    ('2.00x', '5.00 ms', '30.0 MB')
    """
    return f"{value:.2f}x" if name == "speedup" else f"{digits(value)} {UNITS[name]}"


def exact(asked: Budget, value: float) -> str:
    """A measured value, with more digits where rounding would hide that it missed."""
    text = amount(asked.name, value)
    if text != amount(asked.name, asked.value) or value == asked.value:
        return text
    return f"{value:.4f}{'' if asked.name == 'speedup' else ' '}{UNITS[asked.name]}"


def score_text(metric: str, value: float | None) -> str:
    """A score as people say it: shares in percent, everything else as it is."""
    if value is None:
        return "not measured"
    return f"{100 * value:.1f}" if metric in PERCENT else digits(value)


def runs_in(model: str, products: Iterable[str]) -> str:
    """What a file computes in: the model's precision, then those of products that have one of their own.

    >>> runs_in("fp32", ["fp32", "int8-dynamic", "int4", "int8-static"])
    'fp32 + int8 + int4'
    """
    own = [name.partition("-")[0] for name in products if name != "fp32"]  # which says: as the model
    return " + ".join(dict.fromkeys([model, *own]))


def lost(metric: str, change: float, interval95: tuple[float, float] | None = None) -> str:
    """A change of a score, e.g. `1.3 points [0.2, 2.5]` of accuracy or `0.41` of perplexity."""
    percent = metric in PERCENT

    def said(value: float) -> str:
        return f"{100 * value + 0.0:.1f}".replace("-0.0", "0.0") if percent else digits(value)

    ends = "" if interval95 is None else f" [{', '.join(map(said, interval95))}]"
    return f"{said(change)}{' points' if percent else ''}{ends}"


def duration(seconds: float) -> str:
    """A duration as people say it.

    >>> duration(0.42), duration(7.26), duration(65), duration(3780)
    ('0.4 s', '7.3 s', '1 min 05 s', '1 h 03 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

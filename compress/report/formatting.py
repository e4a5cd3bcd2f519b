"""Numbers as people read them: digits that mean something, always with their unit."""

import math
from collections.abc import Iterable

from compress.ir import Budget
from compress.recipe import UNITS

PERCENT = ("accuracy", "f1", "precision", "recall", "agreement")
MORE_DECIMALS = 5  # at most so many digits more than usual to tell two scores apart


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


def score_text(metric: str, value: float | None, decimals: int | None = None) -> str:
    """A score in text: shares in percent, everything else as it is; with `decimals` behind the point."""
    if value is None:
        return "not measured"
    if metric in PERCENT:
        return _fixed(100 * value, 1 if decimals is None else decimals)
    return digits(value) if decimals is None else _fixed(value, decimals)


def score_decimals(metric: str, before: float | None, after: float | None) -> int | None:
    """The fewest decimals at which two scores differ in text and by what their change rounds to.

    None where the usual digits do: without a second score, or where both are equal.

    >>> score_decimals("accuracy", 0.954, 0.941), score_decimals("accuracy", 0.9484, 0.9476)
    (1, 2)
    """
    if before is None or after is None or before == after:
        return None
    scale = 100 if metric in PERCENT else 1
    first, second = scale * before, scale * after
    least = 1
    if metric not in PERCENT:
        size = min(abs(value) for value in (first, second) if value)
        least = max(2 - math.floor(math.log10(size)), 0)
    usable = [
        d
        for d in range(least, least + MORE_DECIMALS)
        if _fixed(first, d) != _fixed(second, d) and float(_fixed(first - second, d))
    ]
    for decimals in usable:
        shown = float(_fixed(first, decimals)) - float(_fixed(second, decimals))
        if abs(shown - float(_fixed(first - second, decimals))) < 0.5 * 10.0**-decimals:
            return decimals
    return usable[0] if usable else least + MORE_DECIMALS


def _fixed(value: float, decimals: int) -> str:
    """A number with `decimals` digits behind the point; what rounds to zero has no sign."""
    text = f"{value:.{decimals}f}"
    return text if float(text) else text.removeprefix("-")


def runs_in(model: str, products: Iterable[str]) -> str:
    """What a file computes in: the model's precision, then those of products that have one of their own.

    >>> runs_in("fp32", ["fp32", "int8-dynamic", "int4", "int8-static"])
    'fp32 + int8 + int4'
    """
    own = [name.partition("-")[0] for name in products if name != "fp32"]  # which says: as the model
    return " + ".join(dict.fromkeys([model, *own]))


def lost(
    metric: str,
    change: float,
    interval95: tuple[float, float] | None = None,
    decimals: int | None = None,
) -> str:
    """A change of a score, e.g. `1.3 points [0.2, 2.5]` of accuracy or `0.41` of perplexity."""
    texts = [score_text(metric, value, decimals) for value in (change, *(interval95 or ()))]
    unit = " points" if metric in PERCENT else ""
    return f"{texts[0]}{unit}" + ("" if interval95 is None else f" [{', '.join(texts[1:])}]")


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

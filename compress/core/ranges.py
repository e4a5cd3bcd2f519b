"""The range of an input that its bytes should cover, from a histogram that grows with the data.

Bins lie on both sides of zero and double in width, two into one, when a value falls outside; nothing
has to be known in advance and no value is kept. All rules but `max` and `percentile` try ranges between
a twentieth of the observed one and all of it, and take the one that loses least.

Reference: Migacz, "8-bit inference with TensorRT", GTC 2017, for the rule of least relative entropy.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from compress.core.fakequant import BYTE, affine
from compress.errors import CompressError

Rule = Literal["max", "percentile", "entropy", "mse"]
Span = tuple[float, float]
BINS = 4096
TAIL = 1e-4  # of all values, beyond each end, for `percentile`
TRIALS = 96


@dataclass
class Histogram:
    """Counts of values in `BINS` bins over [-reach, reach], and the exact extremes."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    reach: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def add(self, values: Tensor) -> None:
        """Count the values.

        Raises:
            CompressError: one is NaN or infinite.
        """
        low, high = (float(end) for end in torch.aminmax(values))
        largest = max(-low, high)
        if not torch.isfinite(torch.tensor(largest - min(low, 0.0))):
            raise CompressError("an input of a product is NaN or infinite; check the model on this data")
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.reach == 0:
            self.reach = largest
        while self.reach < largest:
            self._double()
        if self.reach > 0:
            self.counts += torch.histc(values.float(), BINS, -self.reach, self.reach).double()

    def _double(self) -> None:
        merged = self.counts.reshape(-1, 2).sum(1)
        self.counts = torch.nn.functional.pad(merged, (BINS // 4, BINS // 4))
        self.reach *= 2

    def centers(self) -> Tensor:
        """The middle of every bin, [bins]."""
        edge = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
        return (2 * edge - 1) * self.reach


@dataclass(frozen=True, eq=False)
class Range:
    """What bytes should cover of an input: the best range for all columns, and the extremes [in] of each."""

    span: Span
    low: Tensor
    high: Tensor

    def of(self, columns: Tensor) -> Span:
        """The range for a product that reads only these columns: no wider than what they hold.

        >>> Range((-2.0, 3.0), torch.tensor([-1.0, -9.0]), torch.tensor([1.0, 9.0])).of(torch.tensor([0]))
        (-1.0, 1.0)
        """
        low, high = float(self.low[columns].min()), float(self.high[columns].max())
        return min(0.0, max(self.span[0], low)), max(0.0, min(self.span[1], high))


def span(histogram: Histogram, rule: Rule = "mse") -> Span:
    """Low and high end of the range that bytes should cover; zero lies between them."""
    if rule == "max" or histogram.reach == 0:
        return histogram.low, histogram.high
    if rule == "percentile":
        return _percentile(histogram)
    loss = {"mse": _squared_error, "entropy": _relative_entropy}[rule]
    trials = [
        (histogram.low * part, histogram.high * part) for part in torch.linspace(0.05, 1, TRIALS).tolist()
    ]
    losses = [loss(histogram, *trial) for trial in trials]
    return trials[losses.index(min(losses))]


def symmetric(span: Span) -> Span:
    """The least range that covers `span` and whose bytes are signed bytes about zero: zero point 128.

    >>> symmetric((-1.0, 127.0))
    (-128.0, 127.0)
    """
    step = max(-span[0] / 128, span[1] / 127)
    return -128 * step, 127 * step


def _percentile(histogram: Histogram) -> Span:
    share = histogram.counts.cumsum(0) / histogram.counts.sum()
    width = 2 * histogram.reach / BINS
    low = -histogram.reach + int((share <= TAIL).sum()) * width
    high = -histogram.reach + (int((share < 1 - TAIL).sum()) + 1) * width
    return min(0.0, max(low, histogram.low)), max(0.0, min(high, histogram.high))


def _placed(histogram: Histogram, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The byte of every bin, [bins], and the value it stands for."""
    step, zero = affine(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64))
    codes = ((histogram.centers() / step).round() + zero).clamp(0, BYTE)
    return codes.long(), (codes - zero) * step


def _squared_error(histogram: Histogram, low: float, high: float) -> float:
    _, values = _placed(histogram, low, high)
    return float(histogram.counts @ (values - histogram.centers()).square())


def _relative_entropy(histogram: Histogram, low: float, high: float) -> float:
    """KL between what is there, clipped, and the same with every byte spread over its bins.

    Values outside count at the last bins inside; the spread knows only those that were inside.
    """
    codes, _ = _placed(histogram, low, high)
    centers, counts = histogram.centers(), histogram.counts
    inside = ((centers >= low) & (centers <= high)).nonzero()[:, 0]
    if len(inside) == 0:
        return torch.inf
    first, last = int(inside[0]), int(inside[-1])
    kept = torch.where((centers >= low) & (centers <= high), counts, 0.0)
    truth = kept.clone()
    truth[first] += counts[:first].sum()
    truth[last] += counts[last + 1 :].sum()
    filled = (kept > 0).double()
    mass, bins = (
        torch.zeros(BYTE + 1, dtype=torch.float64).index_add(0, codes, part) for part in (kept, filled)
    )
    spread = torch.where(kept > 0, (mass / bins.clamp(min=1))[codes], 0.0)
    truth, spread = truth / truth.sum(), spread / spread.sum().clamp(min=1)
    at = truth > 0
    return float((truth[at] * (truth[at] / spread[at].clamp(min=1e-12)).log()).sum())

"""Running sums of inputs: count, mean and second moment in float64, and ranges where they are needed.

Products are taken in float32 within a batch, about a fixed shift near the mean, and summed in float64, so
that neither many batches nor a large mean cost digits.
"""

import torch
from torch import Tensor

from compress.core import ranges
from compress.core.ranges import Histogram
from compress.distributed import collectives


class Moments:
    """Running sums about a shift that the first rows set, on the device of the rows.

    With a `histogram` values are counted as well, for the range that bytes should cover.
    """

    def __init__(self, histogram: Histogram | None = None) -> None:
        self.count = 0
        self.histogram = histogram
        self.low = self.high = torch.zeros(0)
        self.shift = torch.zeros(0)
        self.sum = torch.zeros(0)
        self.square = torch.zeros(0)
        self.taylor = torch.zeros(0)
        self.samples = 0

    def aim(self, rows: Tensor) -> None:
        """Measure from the mean of these rows [rows, in], if there are any; they are not counted."""
        if not len(rows):
            return
        self.shift = rows.mean(0)
        self.sum = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        self.square = self.sum.new_zeros(rows.shape[1], rows.shape[1])

    def add(self, rows: Tensor) -> None:
        """Count these rows [rows, in] in."""
        if not len(self.shift):
            self.aim(rows)
        if not len(rows):
            return
        if self.histogram is not None:
            self.histogram.add(rows)
            low, high = rows.amin(0), rows.amax(0)
            first = not len(self.low)
            self.low, self.high = (low, high) if first else (self.low.minimum(low), self.high.maximum(high))
        self.count += len(rows)
        off = rows - self.shift
        self.sum += off.sum(0, dtype=torch.float64)
        self.square += off.T @ off

    def add_taylor(self, per_sample: Tensor) -> None:
        """Count the first-order terms [samples, in] of one batch in."""
        if not self.samples:
            self.taylor = torch.zeros(per_sample.shape[1], dtype=torch.float64)
        self.samples += len(per_sample)
        self.taylor += per_sample.double().square().sum(0)

    def tensors(self) -> dict[str, Tensor]:
        """What `read` reads, by its names."""
        shift, off = self.shift.double(), self.sum / self.count
        mean = shift + off
        crossed = torch.outer(shift, off)
        second = self.square / self.count + crossed + crossed.T + torch.outer(shift, shift)
        found = {
            "count": torch.tensor([self.count], dtype=torch.float64),
            "mean": mean,
            "second": (second + second.T) / 2,
        }
        if self.samples:
            found["taylor"] = self.taylor / self.samples
        if self.histogram is not None:
            covered = torch.tensor(ranges.span(self.histogram), dtype=torch.float64)
            found |= {"span": covered, "low": self.low, "high": self.high}
        return found

    def over_all(self, width: int) -> dict[str, Tensor]:
        """`tensors`, over the rows of all processes; float64 sums, the same in each of them."""
        if collectives.size() == 1:
            return self.tensors() if self.count else {}
        seen = torch.tensor([self.count, self.samples], dtype=torch.float64)
        collectives.all_reduce([seen])
        if not seen[0]:
            return {}
        empty = {
            "mean": torch.zeros(width),
            "second": torch.zeros(width, width),
            "taylor": torch.zeros(width),
        }
        here = empty | (self.tensors() if self.count else {})
        found = {name: here[name].double().cpu() * self.count / seen[0] for name in ("mean", "second")}
        if seen[1]:
            found["taylor"] = here["taylor"].double() * self.samples / seen[1]
        collectives.all_reduce(list(found.values()))
        return found | {"count": seen[:1]}

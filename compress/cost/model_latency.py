"""Latency of a whole model from that of its sites, by straight lines through models that were timed."""

from pydantic import Field

from compress.ir import Document


class Whole(Document):
    """From the time of all sites to the time of the model: straight lines through known points.

    The two do not differ by a constant: the more weights a model has, the less of them the caches hold.
    Both rows fall, and start with the dense model; a single point says that the rest is constant.
    """

    inside_ms: tuple[float, ...] = Field(min_length=1)
    whole_ms: tuple[float, ...] = Field(min_length=1)

    @property
    def dense_ms(self) -> float:
        """Time of the dense model."""
        return self.whole_ms[0]

    @property
    def fixed_ms(self) -> float:
        """Time that is left when every site is gone."""
        return max(self.latency_ms(0.0), 0.0)

    def latency_ms(self, inside_ms: float) -> float:
        """Time of the model whose sites together take `inside_ms`."""
        return _along(self.inside_ms, self.whole_ms, inside_ms)

    def room_ms(self, latency_ms: float) -> float:
        """What all sites together may take in a model that takes `latency_ms`."""
        return _along(self.whole_ms, self.inside_ms, latency_ms)


def _along(known: tuple[float, ...], values: tuple[float, ...], at: float) -> float:
    """The value at `at` on the lines through falling points; the outer lines go on for ever."""
    if len(known) == 1:
        return values[0] + at - known[0]
    end = next((k for k in range(1, len(known)) if known[k] <= at), len(known) - 1)
    slope = (values[end - 1] - values[end]) / (known[end - 1] - known[end])
    return values[end] + (at - known[end]) * slope

"""Neurons of a feed-forward block: up product(s), an activation, perhaps a gate, a down product."""

from collections.abc import Iterator

from compress.ir import Site, Slice
from compress.sites.kinds.kernel import Kernel
from compress.sites.kinds.kind import Builder, Kind, Value
from compress.sites.kinds.layout import Layout, NamePattern


class FeedForward(Kind):
    """A unit is one neuron: a row of each up product and a column of the down product."""

    name = "ffn"
    label = "feed-forward"
    color = "#00875f"
    dark_color = "#35b98d"
    patterns = (
        NamePattern(("intermediate.dense",), "output.dense"),
        NamePattern(("lin1",), "lin2"),
        NamePattern(("gate_proj", "up_proj"), "down_proj"),
        NamePattern(("gate_up_proj",), "down_proj", 2),
        NamePattern(("wi_0", "wi_1"), "wo"),
        NamePattern(("wi",), "wo"),
        NamePattern(("c_fc",), "c_proj"),
        NamePattern(("fc1",), "fc2"),
    )

    def matches(self, layout: Layout) -> bool:
        """One column a unit, with something elementwise between the products.

        Without it the pair is one matrix in two factors, whose rank the move "lowrank" chooses better.
        """
        elementwise = layout.gated or layout.activation != "identity"
        return not layout.attention and layout.width == 1 and elementwise

    def fields(self, layout: Layout) -> dict[str, str | int]:
        """The activation, and whether a gate multiplies it."""
        return {"activation": layout.activation, "gated": layout.gated}

    def kernels(self, site: Site, units: int, width_bytes: float, *, fused: bool) -> list[Kernel]:
        """The activation and the gate, unless they are fused into the products."""
        if fused:
            return []
        hidden = sum(m.rows * m.features(units)[0] for m in site.matmuls if m.out_per_unit)
        found = []
        if site.activation:
            found.append(Kernel(2 * hidden / (2 if site.gated else 1) * width_bytes))
        if site.gated:
            found.append(Kernel(1.5 * hidden * width_bytes))
        return found

    def body(self, builder: Builder[Value], x: Value, site: Site, units: int) -> Value:
        """Up product(s), activation and gate."""
        _, readers = self.parts(site)
        outs = [builder.product(x, number) for number in range(len(readers))]
        if site.gated and len(outs) == 1:
            outs = list(builder.split(outs[0], [units, units]))
        inside = builder.activation(outs[0], site.activation)
        for other in outs[1:]:
            inside = builder.multiply(inside, other)
        return inside

    def channel_sets(self, site: Site) -> Iterator[tuple[Slice, ...]]:
        """Everything that makes the neurons, which are free in their order."""
        others = tuple(part for part in site.slices if part.tensor != site.writer)
        if site.column.width == 1 and all(part.width == 1 for part in others):
            yield others


FEED_FORWARD = FeedForward()

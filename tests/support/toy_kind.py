"""A kind of site that the product does not know: groups of features that share one softmax."""

from compress.sites.kinds.kernel import Kernel
from compress.sites.kinds.kind import Kind


class Capsules(Kind):
    """A unit is one group: its rows of the first product and its columns of the second."""

    name = "capsules"
    label = "capsule"
    color = "#5b4bb7"
    dark_color = "#a99cf0"

    def matches(self, layout):
        """Units of several columns without attention, which no other kind takes."""
        return not layout.attention and layout.width > 1

    def fields(self, layout):
        return {"activation": layout.activation}

    def levels(self, site, align):
        """Every second number of groups."""
        return list(range(site.units, 0, -2))

    def kernels(self, site, units, width_bytes, *, fused):
        """The softmax reads and writes the hidden features, fused or not."""
        hidden = sum(m.rows * m.features(units)[0] for m in site.matmuls if m.out_per_unit)
        return [Kernel(2 * hidden * width_bytes)]

    def body(self, builder, x, site, units):
        return builder.activation(builder.product(x, 0), site.activation)


CAPSULES = Capsules()

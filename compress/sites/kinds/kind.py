"""What a kind of site supplies: how it is recognized, which widths it has, and what they cost."""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol, TypeVar

from compress.errors import CompressError
from compress.ir import Matmul, Site, Slice
from compress.sites.kinds.kernel import Kernel
from compress.sites.kinds.layout import Layout, NamePattern

Value = TypeVar("Value")

WIDTH_RATIO = 0.9  # of neighbouring widths that are priced (ZipLM)
LEAST_WIDTH = 0.01  # the narrowest width that is priced, as a share of the dense one


class Builder(Protocol[Value]):
    """Writes the operators of one site for timing: as ONNX nodes, or as calls of torch."""

    def product(self, x: Value, reader: int) -> Value:
        """Output of the site's reader number `reader`, with its bias, on `[rows, inner]`."""
        ...

    def split(self, x: Value, widths: Sequence[int]) -> Sequence[Value]:
        """The parts of the last axis."""
        ...

    def activation(self, x: Value, name: str) -> Value:
        """The elementwise function of that name; an unknown one costs what Gelu does."""
        ...

    def multiply(self, a: Value, b: Value) -> Value:
        """The elementwise product."""
        ...

    def attention(self, query: Value, key: Value, value: Value) -> Value:
        """Masked attention of all kept heads on `[rows, heads * head_dim]`, after the site's cache."""
        ...


class Kind:
    """One kind of site; a subclass overrides what differs from plain linear products.

    Attributes:
        name: what `Site.kind` holds.
        label: for messages and reports.
        color: of its bars in charts on a light page, `#rrggbb`.
        dark_color: on a dark page.
        searched: whether the search chooses units of its sites one by one.
        attends: whether its units are attention heads, which read a mask and a key-value cache.
        patterns: module names of its sites in models that cannot be traced.
        count_attributes: attributes of a module or its configuration that hold the number of units,
            groups of equivalent names in order of preference; without any, each column is a unit.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    color: ClassVar[str]
    dark_color: ClassVar[str]
    searched: ClassVar[bool] = True
    attends: ClassVar[bool] = False
    patterns: ClassVar[tuple[NamePattern, ...]] = ()
    count_attributes: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def matches(self, layout: Layout) -> bool:
        """Whether a region of the traced program with this layout is a site of this kind."""
        return False

    def fields(self, layout: Layout) -> dict[str, str | int]:
        """The fields of `Site` that only this kind sets."""
        return {}

    def step(self, site: Site) -> Site:
        """The site in decoding: one new token for every sequence."""
        matmuls = tuple(m.model_copy(update={"rows": site.batch}) for m in site.matmuls)
        return site.model_copy(update={"matmuls": matmuls, "tokens": 1, "past": 0})

    def levels(self, site: Site, align: int) -> list[int]:
        """Numbers of units to price, from all of them down to 1 % of them, in steps of a tenth.

        Args:
            site: any site of this kind.
            align: widths are rounded to multiples of it; at least one multiple stays.
        """
        least = max(1, math.floor(LEAST_WIDTH * site.units))
        steps = math.ceil(math.log(LEAST_WIDTH) / math.log(WIDTH_RATIO))
        widths = (round(WIDTH_RATIO**step * site.units) for step in range(1, steps + 1))
        snapped = (max(align, round(width / align) * align) for width in widths if width >= least)
        return sorted({width for width in snapped if width < site.units} | {site.units}, reverse=True)

    def multiplications(self, site: Site) -> int:
        """Multiply-accumulates of the dense site at the shape of its example."""
        return sum(m.rows * m.out * m.inner for m in site.matmuls)

    def kernels(self, site: Site, units: int, width_bytes: float, *, fused: bool) -> list[Kernel]:
        """What the site runs at `units` besides the products in `Site.matmuls`.

        Args:
            site: any site of this kind.
            units: units kept, at least 1.
            width_bytes: bytes of one activation.
            fused: whether elementwise operators cost no traffic of their own (TensorRT).
        """
        return []

    def parts(self, site: Site) -> tuple[Matmul, list[Matmul]]:
        """The writer (units own its columns) and the readers (units own their rows) of a site.

        Raises:
            CompressError: the site cannot be timed alone, because these are not one writer and at least
                one reader, on one hidden width.
        """
        writers = [m for m in site.matmuls if m.inner_per_unit]
        readers = [m for m in site.matmuls if m.out_per_unit]
        if len(writers) != 1 or not readers:
            raise CompressError(
                f"{site.name}: {len(readers)} readers and {len(writers)} writers cannot be timed alone"
            )
        if any(reader.inner != writers[0].out for reader in readers):
            raise CompressError(f"{site.name}: products of different hidden widths cannot be timed together")
        return writers[0], readers

    def body(self, builder: Builder[Value], x: Value, site: Site, units: int) -> Value:
        """Write what stands between the hidden state `x` and the writer; gives the writer's input."""
        raise CompressError(f"{site.name}: a site of kind {site.kind!r} cannot be timed alone")

    def free_columns(self, site: Site, columns: int) -> int:
        """How many neighbouring columns of the writer may change places with each other.

        Args:
            site: any site of this kind.
            columns: columns of the writer that are kept.
        """
        return columns

    def channel_sets(self, site: Site) -> Iterator[tuple[Slice, ...]]:
        """Slices that may have to follow the writer's columns into another order; a check decides."""
        yield from ()

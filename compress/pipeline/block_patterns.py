"""Select the block patterns of each site, and the layouts of its block-sparse products, by measurement.

The speed of block sparsity depends on the shape of the blocks as much as on their number: tall blocks read
their inputs once for more outputs, small ones lose less of the weight. Every product of a job is therefore
timed once in a few block shapes and in all layouts that support them (`export.backends.block_layouts`). For
each density a site gets the smallest blocks whose gain is close to the fastest, and its products are exported
in the fastest layouts, which are also those that its price was timed in.
"""

from collections.abc import Iterable, Sequence

from pydantic import Field

from compress import artifacts, formats
from compress.export.backends import block_layouts
from compress.export.backends.backend import Backend, Capabilities
from compress.export.backends.block_layouts import Shape
from compress.export.microbench.onnx_chain import LayoutChooser
from compress.ir import Document, Option, Site
from compress.methods import apply
from compress.pipeline.job import Job

BLOCK_SHAPES = ("64x32", "64x64", "128x32", "128x64")
DENSITIES = (0.5, 0.25)
MIN_GAIN_SHARE = 0.9  # share of the fastest shape's gain that a shape with smaller blocks has to reach
MAX_DENSITY_ERROR = 0.25  # largest relative deviation from a density in products with few blocks


class TimedProduct(Document):
    """One product in one pattern: its fastest layout, and its speedup over dense in that layout."""

    rows: int
    out: int
    inner: int
    pattern: str
    layout: str
    speedup: float

    @property
    def shape(self) -> Shape:
        """The timed shape."""
        return block_layouts.shape_of(self.rows, self.out, self.inner, self.pattern)


class SitePatterns(Document):
    """The selected patterns of a site, and all timings of its products."""

    patterns: tuple[str, ...]
    products: tuple[TimedProduct, ...]


class Patterns(Document):
    """Measured block patterns by `Site.shape`; empty if they cannot be measured here."""

    sites: dict[str, SitePatterns] = Field(default_factory=dict)

    def offered(self, site: Site) -> tuple[str, ...] | None:
        """The selected block patterns of a site; None if nothing was measured."""
        known = self.sites.get(site.shape)
        return None if known is None else known.patterns

    def written(self, site: Site) -> LayoutChooser:
        """The layout of a site's block-sparse products, in timed and in deployed files."""
        known = self.sites.get(site.shape)
        return block_layouts.layout_chooser(
            {} if known is None else {one.shape: one.layout for one in known.products}
        )


def find_patterns(job: Job) -> Patterns:
    """The patterns of a job: timed once per machine, then read from its table."""
    backend = job.backend
    if backend is None or not backend.times_block_layouts or formats.BLOCKS not in job.recipe.options.moves:
        return Patterns()
    made_from = artifacts.digest(
        backend.fingerprint, backend.threads, sorted({site.shape for site in job.sites})
    )
    return artifacts.saved(job.work / "patterns.json", Patterns, made_from, lambda: _measure(job, backend))


def _measure(job: Job, backend: Backend) -> Patterns:
    """Time every product of every site in every pattern that fits."""
    able = [site for site in job.sites if apply.offered_forms(site, (formats.BLOCKS,), backend)]
    wanted = {site.shape: fitting_patterns(site, backend) for site in able}
    shapes = {shape for found in wanted.values() for own in found.values() for shape in own}
    with job.stages("time blocks") as tick:
        table = block_layouts.table(sorted(shapes), backend.threads, tick)
    best = {shape: block_layouts.fastest_layout(table, shape) for shape in shapes}
    sites = {}
    for key, found in wanted.items():
        gains = {pattern: _gain([(shape, best[shape][1]) for shape in own]) for pattern, own in found.items()}
        products = [
            TimedProduct(
                rows=shape.rows, out=shape.out, inner=shape.inner, pattern=pattern,
                layout=best[shape][0], speedup=round(best[shape][1], 4),
            )
            for pattern, own in found.items()
            for shape in sorted(set(own))
        ]  # fmt: skip
        sites[key] = SitePatterns(patterns=select_patterns(gains), products=tuple(products))
    return Patterns(sites=sites)


def fitting_patterns(site: Site, runtime: Capabilities) -> dict[str, list[Shape]]:
    """The products of a site by pattern, at the largest number of units that fits the pattern.

    Left out are patterns that fit at no number of units, and those whose kept share of a product deviates
    from their density by more than `MAX_DENSITY_ERROR`.
    """
    found = {}
    for density in DENSITIES:
        for size in BLOCK_SHAPES:
            pattern = f"block:{size}@{density}"
            units = apply.levels(site, pattern, [site.units], runtime)
            shapes = [
                block_layouts.shape_of(matmul.rows, *matmul.features(most), pattern)
                for most in units
                for matmul in site.matmuls
            ]
            if shapes and all(
                abs(s.kept * s.width / s.inner - density) <= MAX_DENSITY_ERROR * density for s in shapes
            ):
                found[pattern] = shapes
    return found


def select_patterns(gains: dict[str, float]) -> tuple[str, ...]:
    """For each density the pattern of smallest blocks with at least `MIN_GAIN_SHARE` of the best gain.

    >>> select_patterns({"block:32x32@0.5": 1.2, "block:64x32@0.5": 1.7, "block:128x64@0.5": 1.8})
    ('block:64x32@0.5',)
    """
    chosen = {}
    for density in dict.fromkeys(Option(pattern=pattern).density for pattern in gains):
        own = {pattern: gain for pattern, gain in gains.items() if Option(pattern=pattern).density == density}
        near = [pattern for pattern, gain in own.items() if gain >= MIN_GAIN_SHARE * max(own.values())]
        chosen[density] = min(near, key=lambda pattern: (_block_size(pattern), -own[pattern]))
    return tuple(chosen.values())


def _block_size(pattern: str) -> int:
    """The number of weights in one block."""
    rows, columns = Option(pattern=pattern).block
    return rows * columns


def _gain(products: Iterable[tuple[Shape, float]]) -> float:
    """The speedup of several products together, weighted by their dense sizes."""
    sizes: Sequence[tuple[int, float]] = [(shape.out * shape.inner, gain) for shape, gain in products]
    return sum(size for size, _ in sizes) / sum(size / gain for size, gain in sizes)

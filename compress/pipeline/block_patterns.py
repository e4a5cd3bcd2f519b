"""The block patterns that a site is offered, and the layouts its products are written in, by measurement.

What blocks gain is decided by their shape as much as by their number: tall ones read their inputs once for
more outputs, fine ones lose less of the weight. So every product of a job is timed once in a few shapes and
all layouts that hold them (`export.backends.block_layouts`). For each density a site gets
the finest blocks that come near the fastest, and its files are
written in the layouts that were fastest: those that its price was timed in.
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
MIN_GAIN_SHARE = 0.9  # of the fastest shape's gain is enough for a finer one
MAX_DENSITY_ERROR = 0.25  # a density may be off by this share of it where it meets few blocks


class TimedProduct(Document):
    """One product in one pattern: its fastest layout, and how many times faster than dense it is there."""

    rows: int
    out: int
    inner: int
    pattern: str
    layout: str
    speedup: float

    @property
    def shape(self) -> Shape:
        """What was timed."""
        return block_layouts.shape_of(self.rows, self.out, self.inner, self.pattern)


class SitePatterns(Document):
    """The patterns that a site is offered, and all that were timed of its products."""

    patterns: tuple[str, ...]
    products: tuple[TimedProduct, ...]


class Patterns(Document):
    """What blocks do on the target, by `Site.shape`; nothing where that cannot be measured here."""

    sites: dict[str, SitePatterns] = Field(default_factory=dict)

    def offered(self, site: Site) -> tuple[str, ...] | None:
        """The block patterns that a site may take; None where nothing was measured."""
        known = self.sites.get(site.shape)
        return None if known is None else known.patterns

    def written(self, site: Site) -> LayoutChooser:
        """The layout of a site's products in blocks, in the file that is timed and in that which ships."""
        known = self.sites.get(site.shape)
        return block_layouts.layout_chooser(
            {} if known is None else {one.shape: one.layout for one in known.products}
        )


def find_patterns(job: Job) -> Patterns:
    """The patterns of a job: timed once on a machine, then read from its table."""
    backend = job.backend
    if backend is None or not backend.times_block_layouts or formats.BLOCKS not in job.recipe.options.moves:
        return Patterns()
    made_from = artifacts.digest(
        backend.fingerprint, backend.threads, sorted({site.shape for site in job.sites})
    )
    return artifacts.saved(job.work / "patterns.json", Patterns, made_from, lambda: _measure(job, backend))


def _measure(job: Job, backend: Backend) -> Patterns:
    """Every product of every site in every pattern that fits it."""
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
    """The products of a site, at the most units that fit, by pattern; without those that fit nowhere.

    A pattern that keeps quite another share of a product than it says is left out too.
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
    """Of each density the pattern with the smallest blocks that gains nearly what the fastest does.

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
    """Weights of one block."""
    rows, columns = Option(pattern=pattern).block
    return rows * columns


def _gain(products: Iterable[tuple[Shape, float]]) -> float:
    """The speedup of several products together, each weighed by its dense size."""
    sizes: Sequence[tuple[int, float]] = [(shape.out * shape.inner, gain) for shape, gain in products]
    return sum(size for size, _ in sizes) / sum(size / gain for size, gain in sizes)

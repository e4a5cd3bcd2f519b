"""Figures that others published, held against the roofline: how far off an estimate may be.

Kurtic et al., "ZipLM", arXiv 2302.04089, state what half a layer of BERT-base takes at several widths on
a V100, and how much faster it gets on an A100. They state neither batch nor precision: the batch is
fitted to the dense feed-forward half on the V100, a point that is then left out. Yu et al., "Boost Vision
Transformer with GPU-Friendly Sparsity and Quantization" (GPUSQ-ViT, CVPR 2023), state how much faster
DeiT gets in int4 with 2:4 zeros than in fp32 in TensorRT.

An error is *held out* when no constant of the roofline was fitted to the figure it is an error of.
"""

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from compress import profiles
from compress.cost.roofline import BYTES, DEFAULT, Constants, descend, kernel_ms, kernels, roofline
from compress.ir import Document, Matmul, Site
from compress.profiles import Profile
from compress.sites.kinds.kernel import Kernel

TOKENS = 128  # GLUE's usual length
PRECISIONS = {"v100": "fp32", "a100": "fp16"}
ALIGNED_FROM = 1000  # wider: the two A100 points that the penalty for misaligned widths is fitted to
VIT_TOKENS = 197
LARGE = 256
VITS = {"deit-t": (192, 3), "deit-s": (384, 6), "deit-b": (768, 12)}  # hidden width, heads
LAYERS = 12
FREE = ("launches", "misaligned")  # compute is the scale that the batch takes up; traffic follows it


class Point(Document):
    """One published figure beside the roofline's; `unit` is ms, or x for a speedup.

    `unseen` is the prediction by constants that were fitted to other figures.
    """

    name: str
    unit: str
    published: float
    predicted: float
    unseen: float | None

    @property
    def error(self) -> float:
        """Relative error of the roofline as it is used."""
        return abs(self.predicted / self.published - 1)

    @property
    def held_out_error(self) -> float | None:
        """Relative error on a figure that was not seen, None for one that must be seen."""
        return None if self.unseen is None else abs(self.unseen / self.published - 1)


class Check(Document):
    """The roofline against one published table, and what had to be assumed for it."""

    origin: str
    title: str
    source: str
    assumed: str
    points: tuple[Point, ...]

    @property
    def mean_error(self) -> float:
        """Mean relative error of the roofline as it is used."""
        return _mean([point.error for point in self.points])

    @property
    def max_error(self) -> float:
        """Largest relative error."""
        return max(point.error for point in self.points)

    @property
    def held_out_error(self) -> float:
        """Mean relative error on figures that were not seen."""
        return _mean([error for point in self.points if (error := point.held_out_error) is not None])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Case:
    """One published figure and what the roofline says of it."""

    name: str
    unit: str
    published: float
    predict: Callable[[Constants], float]

    def off(self, constants: Constants) -> float:
        """Squared logarithmic error."""
        return math.log(self.predict(constants) / self.published) ** 2


def checks(name: str) -> tuple[Check, ...]:
    """The roofline against every published table of a device; empty when there is none."""
    return tuple(check for check in (_ziplm(name), _gpusq(name)) if check is not None)


def fit(cases: Sequence[Case], free: Sequence[str] = FREE) -> Constants:
    """The constants that come closest to some figures.

    Figures say little of some constants, so each is drawn a little to where it was.
    """

    def off(constants: Constants) -> float:
        moved = (getattr(constants, key) / getattr(DEFAULT, key) for key in free)
        return sum(case.off(constants) for case in cases) + 1e-3 * sum(math.log(by) ** 2 for by in moved)

    return descend(off, free)


def shipped() -> Constants:
    """What a fit to all of ZipLM's figures gives: the origin of `DEFAULT` and of the GPUs' launches."""
    return fit([*ziplm_cases("v100"), *ziplm_cases("a100")])


@functools.cache
def _unseen(name: str) -> Constants:
    """Constants that know the other device of ZipLM's two; a V100 in fp32 tells nothing of alignment."""
    if name == "v100":
        return fit(ziplm_cases("a100"))
    wide = [case for case in ziplm_cases(name) if _width(case) > ALIGNED_FROM]
    return fit([*ziplm_cases("v100"), *wide])


def _width(case: Case) -> int:
    return int(case.name.split()[1])


def _ziplm(name: str) -> Check | None:
    table = profiles.measured(name, "ziplm")
    if table is None or name not in PRECISIONS:
        return None
    points = [
        Point(
            name=case.name,
            unit=case.unit,
            published=case.published,
            predicted=case.predict(DEFAULT),
            unseen=None if name == "a100" and _width(case) > ALIGNED_FROM else case.predict(_unseen(name)),
        )
        for case in ziplm_cases(name)
    ]
    return Check(
        origin="ziplm",
        title=str(table["title"]),
        source=str(table["source"]),
        assumed=f"{PRECISIONS[name]}, {TOKENS} tokens, batch {batch(DEFAULT)} (from the V100's dense one)",
        points=tuple(points),
    )


def ziplm_cases(name: str) -> list[Case]:
    """ZipLM's figures for a device, without the one that the batch is fitted to."""
    table, profile, precision = profiles.measured(name, "ziplm"), profiles.load(name), PRECISIONS[name]

    def half(kind: str, units: int) -> Callable[[Constants], float]:
        return lambda constants: _half_ms(bert(batch(constants))[kind], units, profile, precision, constants)

    def gain(units: int) -> Callable[[Constants], float]:
        dense, now = half("ffn", 3072), half("ffn", units)
        return lambda constants: dense(constants) / now(constants)

    cases = [
        Case(f"{kind} {units}", "ms", ms, half(kind, units))
        for kind in ("ffn", "heads")
        for units, ms in _column(table, f"{kind}_ms").items()
        if ms > 0 and (kind, units) != ("ffn", 3072)
    ]
    speedups = _column(table, "ffn_speedup").items()
    return cases + [Case(f"ffn {units}", "x", by, gain(units)) for units, by in speedups if units != 3072]


def _column(table: dict[str, JsonValue] | None, key: str) -> dict[int, float]:
    rows = (table or {}).get(key)
    return {int(units): float(str(value)) for units, value in rows.items()} if isinstance(rows, dict) else {}


@functools.lru_cache(maxsize=4096)
def batch(constants: Constants) -> int:
    """The batch at which the dense feed-forward half takes as long on a V100 as was published."""
    v100, dense_ms = profiles.load("v100"), _column(profiles.measured("v100", "ziplm"), "ffn_ms")[3072]
    sizes = range(1, 513)
    at = bisect_left(
        sizes, dense_ms, key=lambda size: _half_ms(bert(size)["ffn"], 3072, v100, "fp32", constants)
    )
    return sizes[min(at, len(sizes) - 1)]


def _half_ms(site: Site, units: int, profile: Profile, precision: str, constants: Constants) -> float:
    """Half of a layer as it was published: the site with its residual sum and its norm, unfused."""
    rows, hidden = site.matmuls[-1].rows, site.matmuls[-1].out
    moved = rows * hidden * BYTES[precision]
    around = sum(kernel_ms(Kernel(passes * moved), profile, precision, constants) for passes in (3, 2))
    return around + roofline(site, units, profile, precision, fused=False, constants=constants)


@functools.lru_cache(maxsize=1024)
def bert(size: int) -> dict[str, Site]:
    """The two sites of a layer of BERT-base."""
    return layer(size, TOKENS, hidden=768, heads=12)


def layer(size: int, tokens: int, *, hidden: int, heads: int) -> dict[str, Site]:
    """The two sites of a transformer layer with separate query, key and value, by kind."""
    rows, width, inside = size * tokens, 4 * hidden, hidden // heads
    up = Matmul(weight="up", rows=rows, out=width, inner=hidden, out_per_unit=1, bias=True)
    down = Matmul(weight="down", rows=rows, out=hidden, inner=width, inner_per_unit=1, bias=True)
    readers = tuple(
        Matmul(weight=name, rows=rows, out=hidden, inner=hidden, out_per_unit=inside, bias=True)
        for name in ("query", "key", "value")
    )
    writer = Matmul(weight="out", rows=rows, out=hidden, inner=hidden, inner_per_unit=inside, bias=True)
    return {
        "ffn": Site(
            name="ffn", kind="ffn", units=width, slices=(), matmuls=(up, down), writer="down",
            batch=size, tokens=tokens, activation="gelu",
        ),
        "heads": Site(
            name="heads", kind="heads", units=heads, slices=(), matmuls=(*readers, writer), writer="out",
            batch=size, tokens=tokens, head_dim=inside,
        ),
    }  # fmt: skip


def _gpusq(name: str) -> Check | None:
    table = profiles.measured(name, "gpusq")
    if table is None:
        return None
    profile = profiles.load(name)
    points = []
    for key, size in (("latency_speedup", 1), ("throughput_speedup", LARGE)):
        rows = table[key]
        assert isinstance(rows, dict)
        for model, by in rows.items():
            found = vit_ms(model, size, profile, "tf32", "tf32") / vit_ms(
                model, size, profile, "int4 2:4", "fp16"
            )
            label = f"{model} {key.removesuffix('_speedup')}"
            points.append(
                Point(name=label, unit="x", published=float(str(by)), predicted=found, unseen=found)
            )
    return Check(
        origin="gpusq",
        title=str(table["title"]),
        source=str(table["source"]),
        assumed=f"fp32 as TF32, which TensorRT allows by default; a large batch is {LARGE}; "
        "everything but the linear layers in fp16",
        points=tuple(points),
    )


def vit_ms(model: str, size: int, profile: Profile, products: str, rest: str) -> float:
    """A DeiT in TensorRT: its linear layers in one precision, attention, norms and sums in another."""
    hidden, heads = VITS[model]
    sites = layer(size, VIT_TOKENS, hidden=hidden, heads=heads)
    low, high = BYTES[products.split()[0]], BYTES[rest]
    total = 0.0
    for site in sites.values():
        many = len(site.matmuls)
        inside = kernels(site, site.units, low, fused=True)[:many]
        attention = kernels(site, site.units, high, fused=True)[many:]
        norm = Kernel(3 * size * VIT_TOKENS * hidden * high)
        total += sum(kernel_ms(kernel, profile, products) for kernel in inside)
        total += sum(kernel_ms(kernel, profile, rest) for kernel in (*attention, norm))
    return LAYERS * total

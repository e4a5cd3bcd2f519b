"""What a site should cost on a device that is not at hand, from the facts of its profile.

The roofline adds up the operators that a site runs. Each takes the longer of its arithmetic and its
memory traffic, plus a launch. Arithmetic runs at the peak only where whole tiles fill the whole device,
and traffic that does not shrink with the site (its input and output) stays, so a narrow site gains less
than its share of the work. `check` compares it with figures that others published: Kurtic et al.,
"ZipLM", arXiv 2302.04089.
"""

import math
from dataclasses import dataclass

from pydantic import JsonValue

from compress import profiles
from compress.errors import CompressError
from compress.ir import Document, Matmul, Option, Site
from compress.profiles import Profile

PLAIN = Option()
BYTES = {"fp32": 4.0, "tf32": 4.0, "fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
# Rows, columns and relative speed of the output tiles that a GPU library chooses from: a larger tile
# reuses more of what it loads, a smaller one wastes less of a narrow matrix.
TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.85), (64, 64, 0.65), (64, 32, 0.4))


@dataclass(frozen=True)
class Constants:
    """The few numbers that no data sheet states; `cost.calibrate` fits the first three.

    Attributes:
        compute: share of the peak that a large aligned product sustains.
        bandwidth: share of the memory bandwidth that a large transfer sustains.
        launches: factor on the profile's cost of a launch.
        misaligned: slowdown of a product on tensor cores when a width is not aligned.
    """

    compute: float = 0.85
    bandwidth: float = 0.8
    launches: float = 1.0
    misaligned: float = 1.45


DEFAULT = Constants()


@dataclass(frozen=True)
class Kernel:
    """One operator: `batch` products `rows x inner @ inner x out`, or none, and what it moves."""

    moved_bytes: float
    batch: int = 1
    rows: int = 0
    out: int = 0
    inner: int = 0


def product(batch: int, rows: int, out: int, inner: int, width_bytes: float) -> Kernel:
    """A (batched) matrix product that reads both sides and writes its result."""
    moved = batch * (rows * inner + inner * out + rows * out) * width_bytes
    return Kernel(moved, batch, rows, out, inner)


def kernels(
    site: Site, units: int, width_bytes: float, *, fused: bool, option: Option = PLAIN
) -> list[Kernel]:
    """What a site runs at `units` in the form of an option; nothing when it is dropped.

    A pattern that the device executes shortens what is summed over; a rank adds two thin products.

    With `fused` (TensorRT) biases, activations and the inside of attention cost no traffic of their
    own; otherwise every elementwise operator reads and writes its tensor.
    """
    if units == 0:
        return []
    found: list[Kernel] = []
    for matmul in site.matmuls:
        out, inner = matmul.features(units)
        found.append(product(1, matmul.rows, out, max(1, round(inner * option.density)), width_bytes))
        if option.rank:
            found.append(product(1, matmul.rows, option.rank, inner, width_bytes))
            found.append(product(1, matmul.rows, out, option.rank, width_bytes))
        if matmul.bias and not fused:
            found.append(Kernel(2 * matmul.rows * out * width_bytes))
    if site.kind == "heads" and site.head_dim:
        found += _attention(site, units, width_bytes, fused=fused)
    elif not fused:
        hidden = sum(m.rows * m.features(units)[0] for m in site.matmuls if m.out_per_unit)
        if site.activation:
            found.append(Kernel(2 * hidden / (2 if site.gated else 1) * width_bytes))
        if site.gated:
            found.append(Kernel(1.5 * hidden * width_bytes))
    return found


def _attention(site: Site, units: int, width_bytes: float, *, fused: bool) -> list[Kernel]:
    """Scores, softmax and context of all kept heads."""
    heads, tokens, width = site.batch * units * site.queries, site.tokens, site.head_dim
    seen = site.past + tokens
    scores = product(heads, tokens, seen, width, width_bytes)
    context = product(heads, tokens, width, seen, width_bytes)
    features, held = heads * tokens * width * width_bytes, heads * seen * width * width_bytes
    # The cache is copied to where one more token fits; a group of queries shares it.
    copies = [Kernel(2 * held / site.queries) for _ in ("k", "v") if site.past]
    if fused:  # one kernel that keeps the scores on chip
        return [Kernel(2 * (features + held), 2 * heads, tokens, seen, width), *copies]
    square = heads * tokens * seen * width_bytes
    passes = [Kernel(2 * square) for _ in ("scale", "mask", "softmax")]
    transposes = [Kernel(2 * features) for _ in ("q", "k", "v", "context")]
    return [scores, *passes, context, *transposes, *copies]


def kernel_ms(
    kernel: Kernel,
    profile: Profile,
    precision: str,
    constants: Constants = DEFAULT,
    *,
    share: float = 1.0,
) -> float:
    """Time of one operator on a share of the processors: arithmetic or traffic, plus its launch."""
    peak = _peak(profile, precision) * 1e9 * constants.compute * share  # flop per millisecond
    bandwidth = profile.bandwidth_gb_s * 1e6 * constants.bandwidth  # bytes per millisecond
    launch = profile.launch_us * 1e-3 * constants.launches
    return max(_work(kernel, profile, precision, constants) / peak, kernel.moved_bytes / bandwidth) + launch


def _peak(profile: Profile, precision: str) -> float:
    if precision not in profile.peak_tflops:
        raise CompressError(
            f"{profile.name} states no peak for {precision!r}; known: {', '.join(profile.peak_tflops)}"
        )
    return profile.peak_tflops[precision]


def _work(kernel: Kernel, profile: Profile, precision: str, constants: Constants) -> float:
    """Floating-point operations, counting lanes and processors that idle as if they had worked."""
    if not kernel.rows:
        return 0.0
    if profile.kind == "cpu":
        out = math.ceil(kernel.out / profile.align_units) * profile.align_units
        return 2.0 * kernel.batch * kernel.rows * out * kernel.inner
    waves = []
    for tile_rows, tile_columns, speed in TILES:
        tiles = kernel.batch * math.ceil(kernel.rows / tile_rows) * math.ceil(kernel.out / tile_columns)
        full = math.ceil(tiles / profile.processors) * profile.processors
        waves.append(2.0 * full * tile_rows * tile_columns * kernel.inner / speed)
    # Loads of 16 bytes need widths of 16 bytes; without tensor cores nothing depends on it.
    lanes = int(16 / BYTES[precision.split()[0]])
    aligned = precision == "fp32" or not (kernel.out % lanes or kernel.inner % lanes)
    return min(waves) * (1.0 if aligned else constants.misaligned)


def roofline(
    site: Site,
    units: int,
    profile: Profile,
    precision: str | None = None,
    *,
    threads: int | None = None,
    fused: bool | None = None,
    constants: Constants = DEFAULT,
    option: Option = PLAIN,
) -> float:
    """Estimated milliseconds that a site adds to the model at `units`.

    Args:
        site: the site, at the shape of its example inputs.
        units: units kept, 0 for a dropped site.
        profile: the device.
        precision: of weights and activations; the profile's baseline when None.
        threads: cores used on a CPU; all when None.
        fused: whether elementwise operators disappear; by default they do in TensorRT.
        constants: what no data sheet states.
        option: its pattern, rank and precision; its units are not read.
    """
    precision = precision or profile.baseline_precision
    if option.precision != PLAIN.precision:
        precision = option.precision.split("-")[0]
    fused = profile.runtime == "tensorrt" if fused is None else fused
    share = min(1.0, (threads or profile.processors) / profile.processors) if profile.kind == "cpu" else 1.0
    _peak(profile, precision)
    width_bytes = BYTES[precision.split()[0]]
    return sum(
        kernel_ms(kernel, profile, precision, constants, share=share)
        for kernel in kernels(site, units, width_bytes, fused=fused, option=option)
    )


class Point(Document):
    """One published figure beside the roofline's; `unit` is ms, or x for a speedup."""

    kind: str
    units: int
    published: float
    predicted: float
    unit: str

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return abs(self.predicted / self.published - 1)


class Check(Document):
    """The roofline against a published table. `batch` was fitted to one point, which is left out."""

    title: str
    batch: int
    tokens: int
    precision: str
    points: tuple[Point, ...]

    @property
    def mean_error(self) -> float:
        """Mean relative error."""
        return sum(point.error for point in self.points) / len(self.points)

    @property
    def max_error(self) -> float:
        """Largest relative error."""
        return max(point.error for point in self.points)


TOKENS = 128  # the published tables state no shape; 128 tokens is GLUE's usual length
PUBLISHED = {"v100": "fp32", "a100": "fp16"}  # nor the precision: a plain run, and tensor cores


def check(name: str) -> Check | None:
    """The roofline against the published table of a device; None when there is none.

    The one free scale is the batch: it is fitted to the dense feed-forward half on the V100, and
    that point is left out. Everything else, the other GPU included, is predicted.
    """
    table = profiles.measured(name, "ziplm")
    if table is None or name not in PUBLISHED:
        return None
    dense_ms = _published(profiles.measured("v100", "ziplm"), "ffn_ms")[3072]
    v100 = profiles.load("v100")
    batch = min(range(1, 513), key=lambda size: abs(_half_ms(_bert(size)[0], 3072, v100, "fp32") - dense_ms))
    ffn, heads = _bert(batch)
    profile, precision = profiles.load(name), PUBLISHED[name]
    points = []
    for kind, site in (("ffn", ffn), ("heads", heads)):
        for units, ms in _published(table, f"{kind}_ms").items():
            if ms > 0 and (kind, units) != ("ffn", 3072):
                found = _half_ms(site, units, profile, precision)
                points.append(Point(kind=kind, units=units, published=ms, predicted=found, unit="ms"))
    for units, speedup in _published(table, "ffn_speedup").items():
        if units != 3072:
            dense = _half_ms(ffn, 3072, profile, precision)
            found = dense / _half_ms(ffn, units, profile, precision)
            points.append(Point(kind="ffn", units=units, published=speedup, predicted=found, unit="x"))
    return Check(
        title=str(table["title"]), batch=batch, tokens=TOKENS, precision=precision, points=tuple(points)
    )


def _published(table: dict[str, JsonValue] | None, key: str) -> dict[int, float]:
    rows = (table or {}).get(key)
    return {int(units): float(str(value)) for units, value in rows.items()} if isinstance(rows, dict) else {}


def _half_ms(site: Site, units: int, profile: Profile, precision: str) -> float:
    """Half of a layer as it was published: the site with its residual sum and its norm, unfused."""
    rows, hidden = site.matmuls[-1].rows, site.matmuls[-1].out
    moved = rows * hidden * BYTES[precision]
    around = sum(kernel_ms(Kernel(passes * moved), profile, precision) for passes in (3, 2))
    return around + roofline(site, units, profile, precision, fused=False)


def _bert(batch: int) -> tuple[Site, Site]:
    """The two sites of a layer of BERT-base."""
    rows, hidden, width = batch * TOKENS, 768, 3072
    up = Matmul(weight="up", rows=rows, out=width, inner=hidden, out_per_unit=1, bias=True)
    down = Matmul(weight="down", rows=rows, out=hidden, inner=width, inner_per_unit=1, bias=True)
    readers = tuple(
        Matmul(weight=name, rows=rows, out=hidden, inner=hidden, out_per_unit=64, bias=True)
        for name in ("query", "key", "value")
    )
    writer = Matmul(weight="out", rows=rows, out=hidden, inner=hidden, inner_per_unit=64, bias=True)
    ffn = Site(
        name="ffn",
        kind="ffn",
        units=width,
        slices=(),
        matmuls=(up, down),
        writer="down",
        batch=batch,
        tokens=TOKENS,
        activation="gelu",
    )
    heads = Site(
        name="heads",
        kind="heads",
        units=12,
        slices=(),
        matmuls=(*readers, writer),
        writer="out",
        batch=batch,
        tokens=TOKENS,
        head_dim=64,
    )
    return ffn, heads

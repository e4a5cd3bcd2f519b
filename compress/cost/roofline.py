"""What a site should cost on a device that is not at hand, from the facts of its profile.

The roofline adds up the operators that a site runs. Each takes the longer of its arithmetic and its
memory traffic, plus a launch. Arithmetic runs at the peak only where whole tiles fill the whole device,
and traffic that does not shrink with the site (its input and output) stays, so a narrow site gains less
than its share of the work. `compress.cost.published_latencies` states how far off it is.
"""

import math
from dataclasses import dataclass

from compress.errors import CompressError
from compress.formats import kernel_bytes
from compress.ir import Option, Site
from compress.profiles import Profile
from compress.sites.kinds import kind_of
from compress.sites.kinds.kernel import Kernel, product

DENSE = Option()
# Rows, columns and relative speed of the output tiles that a GPU library chooses from: a larger tile
# reuses more of what it loads, a smaller one wastes less of a narrow matrix.
TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.85), (64, 64, 0.65), (64, 32, 0.4))

WAITING_POWER_SHARE = (
    0.35  # of the power above idle while a GPU waits for launches: an order of magnitude, no source
)


@dataclass(frozen=True)
class Constants:
    """The few numbers that no data sheet states.

    They are assumptions, and so is the factor of 2.5 in the GPUs' `launch_us`; how far off they leave the
    estimates of real models, `compress.cost.published_latencies` computes.

    Attributes:
        compute: share of the peak that a large aligned product sustains.
        bandwidth: share of the memory bandwidth that a large transfer sustains.
        launches: factor on the profile's cost of a launch.
        misaligned: slowdown of a product on tensor cores when a width is not aligned.
    """

    compute: float = 0.85
    bandwidth: float = 0.8
    launches: float = 1.0
    misaligned: float = 1.68


DEFAULT = Constants()


def kernels(
    site: Site, units: int, width_bytes: float, *, fused: bool, option: Option = DENSE
) -> list[Kernel]:
    """What a site runs at `units` in the form of an option; nothing when it is dropped.

    A pattern that the device executes shortens what is summed over; a rank adds two thin products. In a
    lower precision the products read less, once what they read was rounded, and all else stays as it is.

    With `fused` (TensorRT) biases, activations and the inside of attention cost no traffic of their
    own; otherwise every elementwise operator reads and writes its tensor.
    """
    if units == 0:
        return []
    found: list[Kernel] = []
    low = "" if option.number_format is None else option.number_format.kernel
    read: set[tuple[int, bool]] = set()  # readers share their input
    for matmul in site.matmuls:
        out, inner = matmul.features(units)
        summed = max(1, round(inner * option.density))
        read_bytes = kernel_bytes(low) if low else width_bytes
        found.append(product(1, matmul.rows, out, summed, width_bytes, read_bytes=read_bytes, precision=low))
        source = (inner, bool(matmul.out_per_unit))
        if low and not fused and source not in read:
            found.append(Kernel(matmul.rows * inner * (width_bytes + kernel_bytes(low))))
        read.add(source)
        if option.rank:
            found.append(product(1, matmul.rows, option.rank, inner, width_bytes))
            found.append(product(1, matmul.rows, out, option.rank, width_bytes))
        if matmul.bias and not fused:
            found.append(Kernel(2 * matmul.rows * out * width_bytes))
    found += kind_of(site).kernels(site, units, width_bytes, fused=fused)
    return found


def kernel_ms(
    kernel: Kernel,
    profile: Profile,
    precision: str,
    constants: Constants = DEFAULT,
    *,
    share: float = 1.0,
) -> float:
    """Time of one operator on a share of the processors: arithmetic or traffic, plus its launch."""
    precision = kernel.precision or precision
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
    lanes = int(16 / kernel_bytes(precision.split()[0]))
    aligned = precision == "fp32" or not (kernel.out % lanes or kernel.inner % lanes)
    return min(waves) * (1.0 if aligned else constants.misaligned)


def estimate_latency_ms(
    site: Site,
    units: int,
    profile: Profile,
    precision: str | None = None,
    *,
    threads: int | None = None,
    fused: bool | None = None,
    constants: Constants = DEFAULT,
    option: Option = DENSE,
) -> float:
    """Estimated milliseconds that a site adds to the model at `units`.

    Args:
        site: the site, at the shape of its example inputs.
        units: units kept, 0 for a dropped site.
        profile: the device.
        precision: of the model; the profile's baseline when None.
        threads: cores used on a CPU; all when None.
        fused: whether elementwise operators disappear; by default they do in TensorRT.
        constants: what no data sheet states.
        option: its pattern, rank and precision; its units are not read.
    """
    precision = precision or profile.baseline_precision
    fused = profile.runtime == "tensorrt" if fused is None else fused
    share = min(1.0, (threads or profile.processors) / profile.processors) if profile.kind == "cpu" else 1.0
    _peak(profile, precision)
    width_bytes = kernel_bytes(precision.split()[0])
    return sum(
        kernel_ms(kernel, profile, precision, constants, share=share)
        for kernel in kernels(site, units, width_bytes, fused=fused, option=option)
    )


def max_above_idle_w(profile: Profile, threads: int | None = None) -> float | None:
    """Power above idle at full load, of the busy cores on a CPU; None where the profile states none."""
    if profile.idle_w is None or profile.load_w is None:
        return None
    share = min(1.0, (threads or profile.processors) / profile.processors) if profile.kind == "cpu" else 1.0
    return (profile.load_w - profile.idle_w) * share


def above_idle_w(
    site: Site,
    units: int,
    profile: Profile,
    precision: str | None = None,
    *,
    threads: int | None = None,
    constants: Constants = DEFAULT,
) -> float | None:
    """Mean power above idle while a site runs: full while a GPU computes or moves data, less while it waits.

    A processor that waits spins, so it draws the same all the time. None where the profile states no power.
    """
    most = max_above_idle_w(profile, threads)
    if most is None or profile.kind == "cpu":
        return most
    precision = precision or profile.baseline_precision
    run = kernels(site, units, kernel_bytes(precision.split()[0]), fused=profile.runtime == "tensorrt")
    total = sum(kernel_ms(kernel, profile, precision, constants) for kernel in run)
    waiting = len(run) * profile.launch_us * 1e-3 * constants.launches
    return most * (1 - (1 - WAITING_POWER_SHARE) * waiting / total) if total else 0.0

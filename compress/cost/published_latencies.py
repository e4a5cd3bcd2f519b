"""The roofline against latencies that NVIDIA publishes: how far off an estimate for a device is.

`profiles/published_latencies.csv` holds 319 mean latencies of BERT encoders in TensorRT (batch 1 to 128,
128 and 384 tokens, float16, int8, and int8 with 2:4 zeros) on A100, L4, T4 and V100, from the README files
of NVIDIA/TensorRT `demo/BERT`; each row names the commit. No constant of the roofline is fitted to them, so
every error below is one of prediction.
"""

import csv
import functools
from collections.abc import Sequence
from importlib import resources

from pydantic import Field

from compress import profiles
from compress.cost.roofline import estimate_latency_ms, kernel_ms
from compress.formats import FLOAT, kernel_bytes, number_formats
from compress.ir import Document, Matmul, Option, Site
from compress.profiles import Profile
from compress.sites.kinds.kernel import Kernel

FILE = "published_latencies.csv"
ENCODERS = {"bert-base": (12, 768, 12), "bert-large": (24, 1024, 16)}  # layers, hidden width, heads
BASELINE = "fp16"  # of everything but the linear layers; of those too unless the row says int8
NORM_PASSES = 3  # the residual sum is part of it: two tensors are read, one is written
ASSUMED = (
    "what lies outside the layers takes no time; elementwise operators are fused into the products, as "
    "TensorRT does; attention runs in fp16"
)


class Latency(Document):
    """One published mean latency of an encoder, in milliseconds."""

    device: str
    model: str
    pattern: str
    tokens: int = Field(ge=1)
    batch: int = Field(ge=1)
    precision: str
    mean_latency_ms: float = Field(gt=0)
    source: str

    @property
    def option(self) -> Option:
        """What the linear layers run in."""
        calibrated = [
            found.name
            for found in number_formats()
            if found.kernel == self.precision and found.range == "calibrated"
        ]
        return Option(pattern=self.pattern, precision=calibrated[0] if calibrated else FLOAT)

    @property
    def series(self) -> str:
        """Model and number format: rows that differ in batch and tokens only."""
        return " ".join([self.model, self.precision, *([self.pattern] if self.pattern != "dense" else [])])


class Check(Document):
    """Relative errors of the roofline over the rows of one device and one model in one format."""

    series: str
    points: int
    mean_error: float
    max_error: float
    bias: float
    source: str


@functools.cache
def published() -> tuple[Latency, ...]:
    """Every row of the table."""
    text = (resources.files("compress.profiles") / FILE).read_text(encoding="utf-8")
    return tuple(Latency.model_validate(row) for row in csv.DictReader(text.splitlines()))


def checks(device: str) -> tuple[Check, ...]:
    """The roofline's errors for a device, by model and format; empty where nothing is published.

    `mean_error` and `max_error` are of |predicted / published - 1|, `bias` is the mean with its sign.
    """
    profile = profiles.load(device)
    series: dict[str, list[Latency]] = {}
    for row in published():
        if row.device == device:
            series.setdefault(row.series, []).append(row)
    return tuple(_check(name, rows, profile) for name, rows in series.items())


def _check(name: str, rows: Sequence[Latency], profile: Profile) -> Check:
    errors = [predict_ms(row, profile) / row.mean_latency_ms - 1 for row in rows]
    return Check(
        series=name,
        points=len(rows),
        mean_error=sum(map(abs, errors)) / len(errors),
        max_error=max(map(abs, errors)),
        bias=sum(errors) / len(errors),
        source=", ".join(dict.fromkeys(row.source for row in rows)),
    )


def predict_ms(row: Latency, profile: Profile) -> float:
    """The roofline's latency of a published encoder, in milliseconds."""
    layers, hidden, heads = ENCODERS[row.model]
    norm = Kernel(NORM_PASSES * row.batch * row.tokens * hidden * kernel_bytes(BASELINE))
    return layers * sum(
        estimate_latency_ms(site, site.units, profile, BASELINE, fused=True, option=row.option)
        + kernel_ms(norm, profile, BASELINE)
        for site in layer(row.batch, row.tokens, hidden=hidden, heads=heads).values()
    )


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
    sites = (
        Site(
            name="ffn", kind="ffn", units=width, slices=(), matmuls=(up, down), writer="down",
            batch=size, tokens=tokens, activation="gelu",
        ),
        Site(
            name="heads", kind="heads", units=heads, slices=(), matmuls=(*readers, writer), writer="out",
            batch=size, tokens=tokens, head_dim=inside,
        ),
    )  # fmt: skip
    return {site.kind: site for site in sites}

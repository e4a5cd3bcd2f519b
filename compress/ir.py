"""The vocabulary of a compilation: sites, options, candidates, plans; values that are saved as JSON.

A *site* is one place of a model that can be compressed without asking any other place. Its *units*
(attention heads, key/value groups, intermediate neurons) own *slices* of tensors; masking, shrinking,
counting and pricing are generic functions over slices. An *option* says what is done to a site, a
*candidate* adds its price and its damage, a *plan* chooses one option for every site.
"""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress import formats

SCHEMA_VERSION = 1

Source = Literal["measured", "estimated"]
BUDGETS = ("speedup", "latency_ms", "energy_mj", "power_w", "size_mb")


class Document(BaseModel):
    """A frozen value that refuses unknown keys; everything on disk is one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Slice(Document):
    """Part of one tensor: unit u owns `[start + u * width, start + (u + 1) * width)` along `dim`."""

    tensor: str
    dim: int = Field(ge=0)
    width: int = Field(ge=1)
    start: int = Field(default=0, ge=0)


class Count(Document):
    """An integer attribute of a module that follows the site: `units kept * per_unit`."""

    module: str
    attribute: str
    per_unit: int = Field(ge=1)


class Matmul(Document):
    """One product `rows x inner @ inner x out` of a site, at the shape of the example inputs.

    A side that shrinks with the site states how many of its features one unit owns; 0 means that the
    side stays.
    """

    weight: str
    rows: int = Field(ge=1)
    out: int = Field(ge=1)
    inner: int = Field(ge=1)
    out_per_unit: int = Field(default=0, ge=0)
    inner_per_unit: int = Field(default=0, ge=0)
    bias: bool = False

    def features(self, units: int) -> tuple[int, int]:
        """`(out, inner)` when `units` units are kept."""
        return (
            units * self.out_per_unit if self.out_per_unit else self.out,
            units * self.inner_per_unit if self.inner_per_unit else self.inner,
        )


class Drop(Document):
    """How the site's module is replaced when no unit is left (methods 8.1: the bias stays).

    `module` is the dotted name of the module that is replaced; `output` is the position of the hidden
    state in what it returns (None: it returns the tensor itself), `outputs` the length of that tuple.
    With `writer` True the module ends in the writer, so the stand-in returns the writer's bias;
    otherwise the writer lies outside, and is replaced by its bias as well.
    """

    module: str
    writer: bool
    output: int | None = None
    outputs: int = 1


class Site(Document):
    """One place that can be compressed alone: its units, what they own, and what its products cost.

    `kind` is a name in `sites.kinds.KINDS`. `writer` is the state-dict name of the weight whose input
    columns the units own (attention output projection, second feed-forward matrix): the one matrix that
    is updated, all others are sliced.
    `channels` are the slices that make what its columns read, and may change their order with them:
    neurons freely, values within a head; none where a trial did not prove that.
    `bias` is the writer's bias, or None. `batch` and `tokens` are those of the example inputs; `past` is
    how many tokens more a cache holds that attention looks at.
    """

    name: str
    kind: str = Field(min_length=1)
    units: int = Field(ge=1)
    slices: tuple[Slice, ...]
    counts: tuple[Count, ...] = ()
    matmuls: tuple[Matmul, ...] = ()
    writer: str
    bias: str | None = None
    channels: tuple[Slice, ...] = ()
    drop: Drop | None = None
    batch: int = Field(default=1, ge=1)
    tokens: int = Field(default=1, ge=1)
    past: int = Field(default=0, ge=0)
    head_dim: int = Field(default=0, ge=0)
    queries: int = Field(default=1, ge=1)
    gated: bool = False
    activation: str = ""
    causal: bool = False

    @property
    def column(self) -> Slice:
        """The slice of the writer's weight: `dim` 1 for an `[out, in]` weight, 0 for `[in, out]`."""
        return next(part for part in self.slices if part.tensor == self.writer)

    @property
    def parameters(self) -> int:
        """Parameters that belong to the units: what is gone when every unit is."""
        return self.units * self.parameters_per_unit

    @property
    def parameters_per_unit(self) -> int:
        """Parameters of one unit, counted from the products (weights, and biases that shrink)."""
        total = 0
        for product in self.matmuls:
            if product.out_per_unit:
                total += product.out_per_unit * (product.inner + int(product.bias))
            else:
                total += product.inner_per_unit * product.out
        return total

    @property
    def shape(self) -> str:
        """A key shared by sites that cost the same: everything that sets the time, no names."""
        products = ",".join(
            f"{m.rows}x{m.out}x{m.inner}:{m.out_per_unit}:{m.inner_per_unit}:{int(m.bias)}"
            for m in self.matmuls
        )
        seen = f"{self.tokens}+{self.past}" if self.past else f"{self.tokens}"
        heads = f"{self.batch}x{seen}:{self.head_dim}:{self.queries}:{int(self.causal)}"
        return f"{self.kind}|{self.units}|{products}|{heads}|{self.activation}:{int(self.gated)}"


class Option(Document):
    """What may be done to a site; the default leaves it dense. `units` None keeps all, 0 drops it.

    `pattern` says where weights of the site's products are zero ("dense", "2:4", or
    "block:32x128@0.25": blocks of 32 outputs x 128 inputs, a quarter of them kept), `rank` adds a product
    of two thin factors, `precision` is what the products run in.
    """

    units: int | None = Field(default=None, ge=0)
    pattern: str = formats.DENSE
    rank: int = Field(default=0, ge=0)
    precision: str = formats.FLOAT

    @property
    def form(self) -> str:
        """How the products run, whatever the units; "dense" when nothing but units is taken.

        >>> Option(units=4, pattern="block:32x32@0.5", rank=8).form
        'block:32x32@0.5+rank:8'
        """
        parts = [
            *([self.pattern] if self.patterned else []),
            *([f"rank:{self.rank}"] if self.rank else []),
            *([self.precision] if self.precision != formats.FLOAT else []),
        ]
        return "+".join(parts) or formats.DENSE

    @property
    def key(self) -> str:
        """Units and form in one word, for files.

        >>> Option(units=4).key, Option(precision="int8-dynamic").key
        ('4 dense', 'all int8-dynamic')
        """
        return f"{'all' if self.units is None else self.units} {self.form}"

    @property
    def density(self) -> float:
        """Share of the weights that the pattern keeps.

        >>> Option(pattern="2:4").density, Option(pattern="block:32x32@0.25").density
        (0.5, 0.25)
        """
        if self.nm is not None:
            return self.nm[0] / self.nm[1]
        found = formats.block_of(self.pattern)
        return 1.0 if found is None else found[2]

    @property
    def nm(self) -> tuple[int, int] | None:
        """Weights kept and weights in a group where the pattern is N:M, else None."""
        return formats.nm_of(self.pattern)

    @property
    def blocked(self) -> bool:
        """Whether the pattern is one of blocks."""
        return formats.block_of(self.pattern) is not None

    @property
    def patterned(self) -> bool:
        """Whether the pattern has zeros."""
        return self.pattern != formats.DENSE

    @property
    def number_format(self) -> formats.NumberFormat | None:
        """The number format of the products; None where they run in that of the model."""
        return None if self.precision == formats.FLOAT else formats.number_format(self.precision)

    @property
    def block(self) -> tuple[int, int]:
        """Outputs and inputs of one block of the pattern.

        >>> Option(pattern="block:32x128@0.25").block
        (32, 128)
        """
        found = formats.block_of(self.pattern)
        if found is None:
            raise ValueError(f"pattern {self.pattern!r} has no blocks")
        return found[:2]

    @classmethod
    def of(cls, form: str, units: int | None) -> "Option":
        """The option of a form at some units: what `form` and `units` of it were.

        >>> Option.of("block:32x32@0.5+rank:8", 4) == Option(units=4, pattern="block:32x32@0.5", rank=8)
        True
        """
        found: dict[str, str | int] = {}
        for part in form.split("+"):
            if part.startswith("rank:"):
                found["rank"] = int(part.removeprefix("rank:"))
            elif formats.is_pattern(part):
                found["pattern"] = part
            else:
                found["precision"] = part
        return cls.model_validate({"units": units, **found})


class Candidate(Document):
    """An option with its price and its damage.

    `error` is the added squared output error relative to the dense output about its mean: 0 is
    lossless, 1 is a site that is dropped with its mean kept.
    """

    site: str
    option: Option
    error: float = Field(ge=0)
    latency_ms: float = Field(ge=0)
    energy_mj: float | None = None
    weight_bytes: int = Field(ge=0)
    source: Source


class Budget(Document):
    """The one bound that a plan must keep: exactly one of the five is set.

    `rate_hz`, which goes with `power_w` only, is how many runs a second the device answers.
    """

    speedup: float | None = Field(default=None, description="Times faster than the dense model.")
    latency_ms: float | None = Field(default=None, description="Median latency in milliseconds.")
    energy_mj: float | None = Field(default=None, description="Energy of one run in millijoules.")
    power_w: float | None = Field(default=None, description="Average power in watts, at rate_hz.")
    size_mb: float | None = Field(default=None, description="Size of the file in megabytes.")
    rate_hz: float | None = Field(default=None, gt=0, description="Runs per second, for power_w.")

    @model_validator(mode="after")
    def _exactly_one(self) -> "Budget":
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a budget is exactly one of {', '.join(BUDGETS)}; found {given}")
        value = getattr(self, given[0])
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{given[0]} must be a positive number, not {value}")
        if self.rate_hz is not None and self.power_w is None:
            raise ValueError(
                "rate_hz goes with power_w: average power is what depends on how often runs come"
            )
        return self

    @property
    def name(self) -> str:
        """Which bound is set."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def value(self) -> float:
        """The bound itself, in the unit its name states."""
        return float(getattr(self, self.name))


class Latency(Document):
    """One artefact's latency at one shape, milliseconds; `p99` only from 1,000 runs on."""

    p50: float
    p90: float
    p99: float | None = None
    mean: float
    std: float
    runs: int


class Width(Document):
    """One hidden width that was looked at, the whole one among them.

    `loss` and `latency_ms` are those of the model with everything but the width in place, `plan_loss` and
    `plan_speedup` those of the best plan within the budget at this width, where one was searched and found;
    `why` says what came of it. Losses are divergences from the dense model.
    """

    units: int = Field(ge=1)
    loss: float
    latency_ms: float
    source: Source
    plan_loss: float | None = None
    plan_speedup: float | None = None
    chosen: bool = False
    why: str = ""


class Engine(Document):
    """A TensorRT engine of the file: layers that 2:4 kernels were possible for, and that run with them."""

    device: str
    tensorrt: str
    sparse: bool
    eligible: tuple[str, ...] = ()
    picked: tuple[str, ...] = ()


class Half(Document):
    """The file in half precision that was made of the one that ships.

    `halved` counts its products in float16, `kept` names those in float32. Its answers are at most `distance`
    away from those of the file that ships, in units of the largest one; `tolerance` is what was allowed.
    """

    weight_bytes: int = Field(ge=0)
    file_bytes: int = Field(ge=0)
    halved: int = Field(ge=0)
    kept: tuple[str, ...] = ()
    distance: float = Field(ge=0)
    tolerance: float = Field(gt=0)


class Offer(Document):
    """One form that a site could have had, "structure" for units removed, and what came of it.

    `speedup` is that of the whole site in the form, where it has one. `units` and `loss` are of what loses
    least there without taking longer than what was chosen, where anything does: the loss is the divergence
    of the model from the dense one with this site alone changed so.
    """

    form: str
    speedup: float | None = None
    units: int | None = None
    loss: float | None = None
    chosen: bool = False
    why: str


class Plan(Document):
    """The decision: one option for every site; small enough to read, edit, commit and replay."""

    schema_version: int = SCHEMA_VERSION
    target: str
    budget: Budget
    choices: dict[str, Option]
    fixed_ms: float
    predicted_ms: float

"""Number formats, patterns of zeros and the moves that use them, as plain facts: no torch is loaded.

`MOVES` is the table of what may be done to a site. An entry states facts that every room may read; what the
move does to weights, layers and files is a subclass of `methods.move.Move` in the module that it names.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

STRUCTURE, WIDTH, BLOCKS = "structure", "width", "block"  # moves that stages ask for by name
FLOAT = "fp32"  # the format of weights that no move has changed
DENSE = "dense"  # the pattern without zeros
FLOAT_BYTES = {"fp32": 4.0, "tf32": 4.0, "fp16": 2.0, "bf16": 2.0}  # by the precision of a whole model

Range = Literal["dynamic", "calibrated", "moments", "blocks", "none"]


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """How the weights and inputs of a product are stored.

    Attributes:
        name: in plans and reports.
        kernel: what profiles and reports call the products of it.
        bits: of one weight.
        low, high: the least and the largest code.
        group: columns of a row that share a scale; 0 for the whole row, or the whole matrix of `floating`.
        paired: two neighboring codes of one sign add up to at most 128 (see `core.fakequant`).
        floating: codes are e4m3 numbers and not integers.
        range: where the range of an input comes from: each run ("dynamic"), a histogram of calibration
            data ("calibrated"), the moments of inputs ("moments"), each block of a row ("blocks"), or
            nowhere because inputs stay in float ("none").
        rounds_bias: the bias is a whole number of the product's steps.
        codes_of: another format with the same codes, which differs in the range of inputs only.
        trainable: its steps can be learned.
        tolerance: largest difference of a product in a runtime from its emulation, as a share of the
            largest value; None for that of products in float.
    """

    name: str
    kernel: str
    bits: int
    low: int
    high: int
    group: int = 0
    paired: bool = False
    floating: bool = False
    range: Range = "dynamic"
    rounds_bias: bool = False
    codes_of: str = ""
    trainable: bool = True
    tolerance: float | None = None

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight, without its share of a scale."""
        return self.bits / 8

    @property
    def rounds_inputs(self) -> bool:
        """Whether inputs are rounded, so that a last bit of one can become another code."""
        return self.range != "none"

    @property
    def reads_whole_rows(self) -> bool:
        """Whether one integer step covers all channels of an input, so that outliers cost the others."""
        return not self.floating and self.range in ("dynamic", "calibrated")


@dataclass(frozen=True, kw_only=True)
class MoveFacts:
    """One thing that may be done to a site.

    Attributes:
        description: one line for people.
        implementation: the module that holds its `Move` as `MOVE`; "" where units are removed and nothing
            else, which every site supports.
        formats: the number formats that it brings.
        pattern: the pattern of zeros that it brings, where it is a single one.
    """

    description: str
    implementation: str = ""
    formats: tuple[NumberFormat, ...] = ()
    pattern: str = ""


INT8 = NumberFormat(name="int8-dynamic", kernel="int8", bits=8, low=-127, high=127, paired=True)
INT8_STATIC = NumberFormat(
    name="int8-static",
    kernel="int8",
    bits=8,
    low=-127,
    high=127,
    paired=True,
    range="calibrated",
    rounds_bias=True,
    codes_of="int8-dynamic",
)
# MatMulNBits turns a few values at the border of two bytes into the other one.
INT4 = NumberFormat(
    name="int4", kernel="int4", bits=4, low=-8, high=7, group=32, range="blocks", tolerance=1e-2
)
# One step for a whole weight is not trained.
FP8 = NumberFormat(
    name="fp8", kernel="fp8", bits=8, low=-448, high=448, floating=True, range="moments", trainable=False
)

MOVES: dict[str, MoveFacts] = {
    STRUCTURE: MoveFacts(description="remove heads and neurons"),
    WIDTH: MoveFacts(description="cut the hidden width"),
    "int8": MoveFacts(
        description="8-bit products, ranges of inputs found in each run",
        implementation="compress.methods.int8",
        formats=(INT8,),
    ),
    "int8-static": MoveFacts(
        description="8-bit products, ranges of inputs from calibration",
        implementation="compress.methods.int8_static",
        formats=(INT8_STATIC,),
    ),
    "int4": MoveFacts(
        description="4-bit weights in groups of 32", implementation="compress.methods.int4", formats=(INT4,)
    ),
    "fp8": MoveFacts(
        description="8-bit floating-point products", implementation="compress.methods.fp8", formats=(FP8,)
    ),
    BLOCKS: MoveFacts(
        description="zeros in whole blocks of weights", implementation="compress.methods.block_sparsity"
    ),
    "lowrank": MoveFacts(
        description="two thin factors in place of a weight, or beside its blocks",
        implementation="compress.methods.low_rank",
    ),
    "2:4": MoveFacts(
        description="two zeros in every four weights",
        implementation="compress.methods.nm_sparsity",
        pattern="2:4",
    ),
}


def number_format(name: str) -> NumberFormat:
    """The number format of that name; KeyError where no move brings it."""
    for found in number_formats():
        if found.name == name:
            return found
    raise KeyError(f"{name!r} is no number format; known: {', '.join(f.name for f in number_formats())}")


def number_formats() -> Iterator[NumberFormat]:
    """All number formats of all moves."""
    return (found for facts in MOVES.values() for found in facts.formats)


def kernel_bytes(kernel: str) -> float:
    """Bytes of one weight in the products that a profile calls `kernel`."""
    if kernel in FLOAT_BYTES:
        return FLOAT_BYTES[kernel]
    return next(found.weight_bytes for found in number_formats() if found.kernel == kernel)


def nm_of(pattern: str) -> tuple[int, int] | None:
    """Weights kept and weights in a group of an N:M pattern, None for another pattern.

    >>> nm_of("2:4"), nm_of("dense")
    ((2, 4), None)
    """
    kept, _, group = pattern.partition(":")
    return (int(kept), int(group)) if kept.isdecimal() and group.isdecimal() else None


def block_of(pattern: str) -> tuple[int, int, float] | None:
    """Rows, columns and density of a block pattern, None for another pattern.

    >>> block_of("block:32x128@0.25"), block_of("2:4")
    ((32, 128, 0.25), None)
    """
    if not pattern.startswith("block:"):
        return None
    shape, _, density = pattern.removeprefix("block:").partition("@")
    rows, _, columns = shape.partition("x")
    return int(rows), int(columns), float(density)


def is_pattern(words: str) -> bool:
    """Whether words are a pattern of zeros, "dense" among them."""
    return words == DENSE or nm_of(words) is not None or words.startswith("block:")


@cache
def _loaded(module: str) -> Any:
    return importlib.import_module(module).MOVE


def implementation(name: str) -> Any:
    """The `methods.move.Move` of a move; None where it removes units and nothing else.

    It is found by name when it is asked for, so that every room may ask and none imports upwards.
    """
    module = MOVES[name].implementation
    return _loaded(module) if module else None


def implementations() -> list[Any]:
    """The `methods.move.Move` of all moves that have one, in the order of the table."""
    return [found for name in MOVES if (found := implementation(name)) is not None]


def move_of_format(name: str) -> Any:
    """The `methods.move.Move` that brings a number format; KeyError where none does."""
    for move, facts in MOVES.items():
        if any(found.name == name for found in facts.formats):
            found = implementation(move)
            assert found is not None, f"{move} brings {name} and names no implementation"
            return found
    raise KeyError(name)

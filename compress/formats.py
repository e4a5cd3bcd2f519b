"""Facts of number formats and moves as plain data, for everyone who must not depend on torch.

A number format is what the products of a layer compute in; a move is a technique that the search may use.
Nobody outside of this module and `compress.methods` compares their names: they read facts from here.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Format:
    """A number format of products.

    Attributes:
        name: as options and plans write it.
        unit: the arithmetic unit as profiles name it, which is also the name in reports.
        bits: of one stored weight.
        group: columns of a row that share a scale, 0 for the whole row.
        scale_bytes: of one scale that is stored beside the weights, 0 where one scale serves a whole weight.
        tolerance: largest difference of one product between torch and a file, relative to its largest output.
        trainable: whether weights and scales can be trained in the format.
        integer_inputs: whether inputs are rounded to integers.
        input_range: where the range of inputs comes from; "none" where each run computes its own.
        same_codes_as: the format whose codes it shares, so that they are solved once.
    """

    name: str
    unit: str
    bits: int
    group: int = 0
    scale_bytes: int = 0
    tolerance: float = 1e-4
    trainable: bool = True
    integer_inputs: bool = False
    input_range: Literal["none", "calibrated", "moments"] = "none"
    same_codes_as: str | None = None

    @property
    def bytes(self) -> float:
        """Bytes of one stored weight.

        >>> FORMATS["int4"].bytes
        0.5
        """
        return self.bits / 8


FORMATS: dict[str, Format] = {
    "fp32": Format("fp32", "fp32", 32),
    "tf32": Format("tf32", "tf32", 32),
    "fp16": Format("fp16", "fp16", 16),
    "bf16": Format("bf16", "bf16", 16),
    "int8-dynamic": Format("int8-dynamic", "int8", 8, scale_bytes=4, integer_inputs=True),
    "int8-static": Format(
        "int8-static",
        "int8",
        8,
        scale_bytes=4,
        integer_inputs=True,
        input_range="calibrated",
        same_codes_as="int8-dynamic",
    ),
    # MatMulNBits turns a few values at the border of two bytes into the other one.
    "int4": Format("int4", "int4", 4, group=32, scale_bytes=4, tolerance=1e-2, integer_inputs=True),
    # One scale for a whole weight is not trained.
    "fp8": Format("fp8", "fp8", 8, trainable=False, input_range="moments"),
}
FULL = "fp32"  # the precision of an option that leaves products in that of the model


def bytes_of(unit: str) -> float:
    """Bytes of one number of an arithmetic unit, as profiles name it.

    >>> bytes_of("int8"), bytes_of("fp16")
    (1.0, 2.0)
    """
    return next(one.bytes for one in FORMATS.values() if one.unit == unit)


@dataclass(frozen=True)
class Technique:
    """What is known of a move without torch; `compress.methods.moves.MOVES` holds how it is done.

    Attributes:
        name: as `--moves` and recipes write it.
        text: one line for the help.
        format: the number format that it leads to, None for moves that change structure or patterns.
        by_units: it makes products smaller, so that every target executes what it leaves.
        per_tensor_input: inputs are rounded with one scale for all channels, so outliers cost precision.
        few_bits: weights have so few bits that SmoothQuant uses a smaller migration strength.
        pattern: name of the sparsity pattern in profiles, where it has one.
        block_shapes: block shapes are timed before they are offered.
    """

    name: str
    text: str
    format: str | None = None
    by_units: bool = False
    per_tensor_input: bool = False
    few_bits: bool = False
    pattern: str | None = None
    block_shapes: bool = False


TECHNIQUES: dict[str, Technique] = {
    "structure": Technique("structure", "remove whole units such as heads and neurons", by_units=True),
    "width": Technique("width", "reduce the hidden width", by_units=True),
    "int8": Technique(
        "int8",
        "int8 products, ranges of inputs computed in every run",
        format="int8-dynamic",
        per_tensor_input=True,
    ),
    "int8-static": Technique(
        "int8-static",
        "int8 products, ranges of inputs from calibration",
        format="int8-static",
        per_tensor_input=True,
    ),
    "int4": Technique("int4", "int4 weights in groups", format="int4", few_bits=True),
    "fp8": Technique("fp8", "fp8 products", format="fp8"),
    "block": Technique("block", "block-sparse weights", block_shapes=True),
    "lowrank": Technique("lowrank", "low-rank factors"),
    "2:4": Technique("2:4", "two of every four weights are zero", pattern="2:4"),
}

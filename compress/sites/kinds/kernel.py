"""One operator of a site as the roofline prices it: arithmetic and memory traffic, no weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """`batch` products `rows x inner @ inner x out`, or none, and the bytes that the operator moves.

    `precision` is that of its operands where it is not the model's.
    """

    moved_bytes: float
    batch: int = 1
    rows: int = 0
    out: int = 0
    inner: int = 0
    precision: str = ""


def product(
    batch: int,
    rows: int,
    out: int,
    inner: int,
    width_bytes: float,
    *,
    read_bytes: float | None = None,
    precision: str = "",
) -> Kernel:
    """A (batched) matrix product that reads both operands and writes its result.

    Args:
        batch: independent products.
        rows: rows of the activations.
        out: output features.
        inner: input features.
        width_bytes: bytes of one value of the result, and of the operands unless `read_bytes` is given.
        read_bytes: bytes of one value of the operands.
        precision: of the operands where it is not the model's.
    """
    read_bytes = width_bytes if read_bytes is None else read_bytes
    moved = batch * ((rows * inner + inner * out) * read_bytes + rows * out * width_bytes)
    return Kernel(moved, batch, rows, out, inner, precision)

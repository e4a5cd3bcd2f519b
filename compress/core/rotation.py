"""Turning a residual stream and keeping part of it: which directions stay, and what becomes of each weight.

A pre-norm model adds to one stream x [d] and reads it through normalizations alone. Both forms divide by
a length, which a rotation leaves as it is, so the stream may be written in other directions when every
weight that writes or reads it follows (SliceGPT, arXiv 2401.15024, theorem 1). Three facts make the result
a narrower model of the same class, with the same epsilon:

* LayerNorm takes the mean away first, so it sees only what is orthogonal to the vector of ones. Directions
  that are all orthogonal to it center the writers by themselves.
* n numbers with mean zero hold n - 1 free ones. Writing the n - 1 directions that stay in an orthonormal
  basis of those vectors (`cosines` without its first) gives a stream that a LayerNorm of width n divides by
  its length. The cosines also spread each direction over all channels, which quantization likes.
* Over n numbers instead of d the mean square is d / n times as large. With the stream times sqrt(n / d) and
  the readers times sqrt(d / n) it is what it was: sum / d + epsilon on both sides, so neither epsilon nor
  the scale of the normalization changes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError


@dataclass(frozen=True, eq=False)
class Narrowing:
    """From a stream of width d to one of width n and back, float64.

    Attributes:
        down: [n, d]; a new stream is `down @ x`.
        up: [d, n]; what a reader sees is `up @ new`, the part of x that stays.
    """

    down: Tensor
    up: Tensor


def cosines(width: int) -> Tensor:
    """[width, width] orthonormal columns (DCT-II); the first is constant, so the others have mean zero.

    >>> (2**0.5 * cosines(2)).round().tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    places = torch.arange(width, dtype=torch.float64)
    angles = torch.pi / width * (places[:, None] + 0.5) * places
    waves: Tensor = (2 / width) ** 0.5 * torch.cos(angles)
    waves[:, 0] = width**-0.5
    return waves


def principal(second: Tensor, *, centered: bool) -> tuple[Tensor, Tensor]:
    """The directions of a stream by falling second moment: basis [d, k] and moments [k].

    Args:
        second: [d, d] second moment of the stream, not centered over samples.
        centered: the stream is read by LayerNorm: only directions orthogonal to ones count, k = d - 1;
            otherwise k = d.

    Raises:
        CompressError: the moment holds NaN or infinity.

    >>> basis, moments = principal(torch.diag(torch.tensor([1.0, 9.0])), centered=False)
    >>> basis.abs().round().tolist(), moments.round().tolist()
    ([[0.0, 1.0], [1.0, 0.0]], [9.0, 1.0])
    """
    if not bool(torch.isfinite(second).all()):
        raise CompressError(
            "the second moments of the residual stream hold NaN or infinity; check the model on this data"
        )
    frame = cosines(len(second))[:, int(centered) :]
    moments, vectors = torch.linalg.eigh(frame.T @ second.double() @ frame)
    return frame @ vectors.flip(1), moments.flip(0)


def narrowing(basis: Tensor, width: int, *, centered: bool) -> Narrowing:
    """Keep the first directions of `basis` [d, k], so that the new stream is `width` wide.

    Raises:
        CompressError: there are too few directions, or none would stay.
    """
    directions = width - int(centered)
    if not 0 < directions <= basis.shape[1]:
        raise CompressError(
            f"a residual stream of {len(basis)} cannot become {width} wide; the width must lie between "
            f"{1 + int(centered)} and {basis.shape[1] + int(centered)}"
        )
    kept, frame = basis[:, :directions].double(), cosines(width)[:, int(centered) :]
    scale = (width / len(basis)) ** 0.5
    return Narrowing(scale * frame @ kept.T, kept @ frame.T / scale)


def along(matrix: Tensor, value: Tensor, dim: int) -> Tensor:
    """`value` with `matrix` [new, old] applied along `dim`, in float64."""
    turned = value.double().movedim(dim, -1) @ matrix.T.to(value.device)
    return turned.movedim(-1, dim)


def read_through(
    weight: Tensor, up: Tensor, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A reader of a plain normalization: its new weight [out, n], and what its bias gains [out].

    Args:
        weight: [out, d].
        up: [d, n].
        gamma: [d] scale of the normalization before it, None for 1.
        beta: [d] its shift, None for 0.
    """
    full = weight.double()
    gained = full.new_zeros(len(full)) if beta is None else full @ beta.double()
    scaled = full if gamma is None else full * gamma.double()
    return scaled @ up.to(full.device), gained


def through_ones(weight: Tensor, gained: Tensor) -> Tensor:
    """`weight` [out, n] that adds `gained` [out] where its input has a mean of 1 (and before had 0).

    A LayerNorm without scale gives mean 0 and takes a shift of 1 for each channel; a reader that has no
    bias gets its constant from there.
    """
    return weight + gained[:, None] / weight.shape[1]

"""SmoothQuant: shift activation outliers into the weights that read them, the function unchanged.

A channel of an input that is much larger than the others makes the step of all of them coarse. Where
whatever writes a channel is linear in it, such as the scale and shift of a norm or the rows of another
product, it may be divided by `f` there, when the column of every weight that reads it is multiplied by
`f`. `factors` weighs what that does to both roundings; a factor of one is among what it tries, so that
smoothing never makes the estimate worse.

Everything that reads the channel must be among the readers: after the norms of BERT the residual sum
reads it too, so nothing may be moved there.

Reference: Xiao et al., "SmoothQuant", arXiv 2211.10438, equation 4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.errors import CompressError

STRENGTHS = tuple(step / 20 for step in range(21))
LEAST = 1e-5  # of the largest: channels below it are as good as silent
LEVELS_IN, LEVELS = 255, 127  # steps of an input between its ends, of a weight on 8 bits from zero
FEW = 7  # of a weight on 4 bits


def factors(largest: Tensor, second: Tensor, readers: Sequence[Tensor], levels: int = LEVELS) -> Tensor:
    """What each channel is divided by, [in]: `largest^a / weight^(1 - a)` for the best strength `a`.

    Args:
        largest: [in] the largest magnitude of every channel.
        second: [in] its mean square.
        readers: weights [out, in] that read the channels.
        levels: of these weights; the fewer they are, the less loudness they can take.

    >>> factors(torch.tensor([1.0, 1.0]), torch.ones(2), [torch.ones(3, 2)]).tolist()
    [1.0, 1.0]
    """
    if any(weight.shape[1] != len(largest) for weight in readers):
        shapes = [tuple(weight.shape) for weight in readers]
        raise CompressError(f"{len(largest)} channels cannot be moved into weights of shapes {shapes}")
    loud = largest.double().clamp(min=LEAST * max(float(largest.max()), 1e-30))
    heavy = torch.stack([weight.double().abs().amax(0) for weight in readers]).amax(0)
    heavy = heavy.clamp(min=LEAST * max(float(heavy.max()), 1e-30))
    tried = [torch.ones_like(loud)]
    for strength in STRENGTHS:
        raw = loud**strength / heavy ** (1 - strength)
        tried.append(raw / raw.log().mean().exp())
    errors = [
        rounding_error(largest / one, second / one**2, [w * one for w in readers], levels) for one in tried
    ]
    return tried[errors.index(min(errors))]


def rounding_error(largest: Tensor, second: Tensor, readers: Sequence[Tensor], levels: int = LEVELS) -> float:
    """The mean squared output error that rounding is expected to add: `step^2 / 12` an element.

    One step for the whole input, one for every row of a weight.
    """
    largest, second = largest.double(), second.double()
    input_step = 2 * largest.max() / LEVELS_IN
    total = 0.0
    for weight in readers:
        row_step = weight.double().abs().amax(1) / levels
        total += float(input_step.square() * weight.double().square().sum() / 12)
        total += float(row_step.square().sum() * second.sum() / 12)
    return total


@torch.no_grad()
def move(divide: Tensor, writers: Sequence[Tensor], readers: Sequence[Tensor]) -> None:
    """Divide the writers and multiply the columns of the readers, in place.

    Args:
        divide: [in] positive factors.
        writers: tensors whose first dimension is the channel: norm scale and shift, weight and bias.
        readers: weights [out, in].

    Raises:
        CompressError: a factor is not positive, or a tensor does not have that many channels.
    """
    count = len(divide)
    if not bool((divide > 0).all()):
        raise CompressError(
            f"channels are divided by positive numbers; the smallest is {float(divide.min())}"
        )
    for tensor, size in [(t, t.shape[0]) for t in writers] + [(t, t.shape[1]) for t in readers]:
        if size != count:
            raise CompressError(f"{count} factors do not fit a tensor of shape {tuple(tensor.shape)}")
    for tensor in writers:
        tensor.div_(divide.to(tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1)))
    for tensor in readers:
        tensor.mul_(divide.to(tensor.dtype))

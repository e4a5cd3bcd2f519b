"""Whether two runners give the same outputs, on several shapes and with padding."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import Tensor, nn

from compress.errors import CompressError
from compress.export.backends.backend import Array, OpenRunner, Runner, Tensors
from compress.export.backends.onnxruntime import TorchRunner
from compress.ir import Document

Arrays = dict[str, Array]

# Float32 sums of a few thousand terms in another order differ in the fifth digit.
TOLERANCE = 1e-4


class Agreement(Document):
    """How far two runners are apart over `inputs` inputs; `tolerance` scales with the largest output."""

    max_abs_difference: float
    tolerance: float
    agreement: float
    inputs: int


def padded_examples(example: Callable[[int, int], dict[str, Tensor]], tokens: int) -> list[Arrays]:
    """Inputs of three shapes: one item, three items, and three items of which two are padded."""
    made = []
    shapes = ((1, tokens, False), (3, max(2, tokens // 2), False), (3, tokens, True))
    for batch, length, padded in shapes:
        inputs = {name: tensor.clone() for name, tensor in example(batch, length).items()}
        mask = inputs.get("attention_mask")
        if padded and mask is not None and mask.shape[1] > 2:
            for row in range(1, batch):
                mask[row, max(1, mask.shape[1] - row * mask.shape[1] // 3) :] = 0
        made.append({name: tensor.numpy() for name, tensor in inputs.items()})
    return made


def parity(
    reference: Runner, runner: Runner, batches: Iterable[Arrays], *, relative: float = TOLERANCE
) -> Agreement:
    """Compare every output of `reference` with that of `runner`; positions that are padding do not count.

    `relative` is the difference allowed, relative to the largest output (at least 1).

    Raises:
        CompressError: they differ by more than the tolerance, with the place and both values.
    """
    worst, size, agreed, items = 0.0, 1.0, [], 0
    where = ""
    for inputs in batches:
        answers = runner.infer(inputs)
        for name, expected in reference.infer(inputs).items():
            found = answers.get(name)
            if found is None or found.shape != expected.shape:
                shape = None if found is None else found.shape
                raise CompressError(
                    f"output {name!r} should have shape {expected.shape}, but the file gives {shape}"
                )
            if expected.ndim < 2:  # one number an item
                expected, found = expected.reshape(-1, 1), found.reshape(-1, 1)
            real = _real_positions(expected, inputs.get("attention_mask"))
            with np.errstate(invalid="ignore"):  # infinity less infinity is not a number, which counts
                apart = np.where(real[..., None], np.abs(expected - found), 0)
            apart = np.where(np.isnan(apart), np.inf, apart)
            if apart.max() > worst:
                worst = float(apart.max())
                place = np.unravel_index(int(apart.argmax()), apart.shape)
                where = (
                    f"at {list(map(int, place))} of {name!r} "
                    f"({float(expected[place]):.6g} in torch, {float(found[place]):.6g} in the file)"
                )
            size = max(size, float(np.abs(expected[real]).max()))
            agreed.append((expected.argmax(-1) == found.argmax(-1))[real])
        items += len(expected)
    tolerance = relative * size
    if not (np.isfinite(worst) and worst <= tolerance):
        raise CompressError(
            f"the torch model and the exported file disagree: {worst:.3g} {where}, tolerance "
            f"{tolerance:.3g}; the file is not shipped. Export again, and report this model "
            "if it stays"
        )
    share = float(np.concatenate([part.ravel() for part in agreed]).mean())
    return Agreement(max_abs_difference=worst, tolerance=tolerance, agreement=share, inputs=items)


def _real_positions(expected: Array, mask: Array | None) -> Array:
    """Where an output counts, without its last axis: everywhere but at padded tokens."""
    if mask is not None and expected.ndim == 3 and mask.shape == expected.shape[:2]:
        return mask.astype(bool)
    return np.ones(expected.shape[:-1], dtype=bool)


def note(
    what: str,
    expected: nn.Module,
    opened: Callable[[], OpenRunner],
    tensors: Tensors,
    batches: Sequence[Arrays],
    relative: float,
) -> str:
    """How far a timed model is from float32 on the processor, as a note for the report.

    Args:
        what: names the timed model.
        expected: the model on the processor; low precision is emulated.
        opened: loads the timed model.
        tensors: the outputs by name, of what the torch model returns.
        batches: inputs.
        relative: tolerance, relative to the largest output.

    Raises:
        CompressError: they disagree by more than the tolerance.
    """
    with opened() as runner, TorchRunner(expected, tensors) as reference:
        found = parity(reference, runner, batches, relative=relative)
    return (
        f"What was timed is the {what}: its outputs differ from float32 by at most "
        f"{found.max_abs_difference:.2g}; {found.agreement:.1%} of the predictions agree."
    )

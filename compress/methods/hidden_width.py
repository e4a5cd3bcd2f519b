"""The hidden width of a pre-norm model: its stream found and proven, then the model with fewer channels.

`find_stream` says what the residual stream is, `moments` what flows through it, `narrow` gives a plain
model of the same class with fewer channels. Scales and shifts of the normalizations move into the matrices
behind them, so every normalization is left plain; tied embeddings part, because only the output side takes
the scale of the last normalization.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from compress.calibration.activation_statistics import real_rows
from compress.core.rotation import Narrowing, along, narrowing, principal, read_through, through_ones
from compress.errors import CompressError
from compress.ir import Site, Slice
from compress.sites.equivalence import agree
from compress.sites.modeling import owner, restate_widths
from compress.sites.residual_stream import Norm, Reader, Stream, stream_of
from compress.sites.trace import Program, evaluating, plain_attention, without_cache
from compress.tasks.task import Batch

SHARE = 0.75  # of the width, in the trial


def find_stream(model: nn.Module, example: dict[str, Tensor]) -> Stream:
    """The residual stream of `model`, proven by a trial; the model is untouched.

    Args:
        model: any module; on the CPU, in float32 or float64.
        example: keyword arguments of one valid call, without padding.

    Raises:
        CompressError: the width cannot be cut, and why: a post-norm model, a stream that something else
            reads, a model that cannot be traced, or one that computes something else once narrowed.
    """
    with evaluating(model), torch.no_grad():
        example = without_cache(model, example)
        batch = next((value.shape[0] for value in example.values() if getattr(value, "ndim", 0)), 1)
        try:
            program = Program(model, example)
        except Exception as error:  # a tracer meets any code
            raise CompressError(
                f"torch.export cannot trace {type(model).__name__} ({type(error).__name__}), and a residual "
                "stream is found in a trace alone; cut heads and neurons instead"
            ) from error
        stream = stream_of(model, program, batch)
        _try(model, stream, example)
    return stream


def moments(model: nn.Module, stream: Stream, batches: Iterable[Batch]) -> Tensor:
    """[width, width] second moment, float64, of what the readers see: each token's stream over its length.

    Every normalization counts alike, and a token of great length (an attention sink) as much as any other.

    Raises:
        CompressError: no token came, or the stream holds NaN or infinity.
    """
    total = torch.zeros(stream.width, stream.width, dtype=torch.float64)
    count = 0
    current: list[Batch] = []

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal count
        rows = real_rows(arguments[0].detach(), current[-1]).double()
        if stream.centered:
            rows = rows - rows.mean(-1, keepdim=True)
        rows = rows / rows.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        total.addmm_(rows.T, rows)
        count += len(rows)

    hooks = [model.get_submodule(norm.module).register_forward_pre_hook(hook) for norm in stream.norms]
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                current[:] = [batch]
                model(**batch.inputs)
    finally:
        for handle in hooks:
            handle.remove()
    if not count:
        raise CompressError("no real token reached a normalization; the calibration data is all padding")
    return total / count


def narrow(model: nn.Module, stream: Stream, second: Tensor, width: int) -> nn.Module:
    """A copy that keeps the `width` channels' worth of directions which carry most; `model` is untouched.

    At the full width it computes what `model` computes. Under LayerNorm `width - 1` directions stay.

    Args:
        model: what `stream` was found in.
        stream: its residual stream.
        second: [width, width] as from `moments`.
        width: channels that stay.

    Raises:
        CompressError: the width is impossible.
    """
    basis, _ = principal(second, centered=stream.centered)
    made = narrowing(basis, width, centered=stream.centered)
    narrowed = copy.deepcopy(model)
    rewrite(narrowed, stream, made)
    return narrowed


def rewrite(model: nn.Module, stream: Stream, made: Narrowing) -> None:
    """Narrow `model` itself, which `stream` was found in, or a copy of it."""
    untie(model, stream)
    written: set[int] = set()
    for part in stream.writers:
        tensor = _stored(model, part.tensor)
        if id(tensor) not in written:
            _set(tensor, along(made.down, tensor.detach(), part.dim))
            written.add(id(tensor))
    constant = {norm.module for norm in stream.norms if _needs_ones(model, stream, norm)}
    for reader in stream.readers:
        _rewrite_reader(model, stream, reader, made.up, constant)
    for norm in stream.norms:
        _plain_norm(model.get_submodule(norm.module), len(made.down), float(norm.module in constant))
    restate_widths(model)
    _restate_config(model, stream.width, len(made.down))


def site_of(stream: Stream) -> Site:
    """The hidden width as a site: what `huggingface` and `prune.parameters_after` need of it.

    Its slices say which dimension of which tensor is as wide as the stream; which values a narrower stream
    leaves there is for `narrow` to say, not for `prune.shrink`. `writer` is the first matrix that reads.
    """
    parts = [*stream.writers, *(Slice(tensor=r.weight, dim=r.dim, width=1) for r in stream.readers)]
    for norm in stream.norms:
        names = [name for name, given in (("weight", norm.scale), ("bias", norm.shift)) if given]
        parts += [Slice(tensor=f"{norm.module}.{name}", dim=0, width=1) for name in names]
    first = stream.readers[0]
    return Site(
        name="residual", kind="residual", units=stream.width, slices=tuple(parts), matmuls=stream.products,
        writer=first.weight, bias=first.bias, batch=stream.batch, tokens=stream.tokens,
    )  # fmt: skip


def recorded(model: nn.Module, stream: Stream) -> tuple[list[Site], dict[str, int]]:
    """Sites and units kept that `huggingface.save` has to be told of a narrow `model`.

    None where its configuration states the new width: such a directory is a plain model, which loads
    anywhere.
    """
    width = _stored(model, stream.readers[0].weight).shape[stream.readers[0].dim]
    if getattr(getattr(model, "config", None), "hidden_size", None) == width:
        return [], {}
    site = site_of(stream)
    return [site], {site.name: width}


def _try(model: nn.Module, stream: Stream, example: dict[str, Tensor]) -> None:
    """Refuse unless the narrow model does what the model does whose writers are projected, at full shape."""
    rows = torch.randn(2 * stream.width, stream.width, generator=torch.Generator().manual_seed(0))
    basis, _ = principal(rows.T @ rows, centered=stream.centered)
    width = max(2, round(SHARE * stream.width))
    made = narrowing(basis, width, centered=stream.centered)
    masked, narrowed = copy.deepcopy(model), copy.deepcopy(model)
    untie(masked, stream)
    for part in stream.writers:
        tensor = _stored(masked, part.tensor)
        _set(tensor, along(made.up @ made.down, tensor.detach(), part.dim))
    rewrite(narrowed, stream, made)
    with plain_attention():
        expected = masked(**example)
        try:
            found = narrowed(**example)
        except Exception as error:  # whatever a forward makes of fewer channels
            raise CompressError(
                f"{type(model).__name__} does not run with {width} of {stream.width} channels: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not agree(found, expected):
        raise CompressError(
            f"{type(model).__name__} with {width} of {stream.width} channels does not compute what the model "
            "with the others at zero computes; something depends on the width that a trace does not show"
        )


def untie(model: nn.Module, stream: Stream) -> None:
    """Give each reader that shares its matrix with a writer a copy of its own."""
    written = {id(_stored(model, part.tensor)) for part in stream.writers}
    for reader in stream.readers:
        value = _stored(model, reader.weight)
        if id(value) in written:
            own = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
            setattr(model.get_submodule(owner(reader.weight)), reader.weight.rpartition(".")[2], own)
            config = getattr(model, "config", None)
            if config is not None:
                config.tie_word_embeddings = False


def _rewrite_reader(model: nn.Module, stream: Stream, reader: Reader, up: Tensor, constant: set[str]) -> None:
    """Take in the scale and shift of the normalization before, and turn the input features."""
    norm = None if reader.norm is None else model.get_submodule(reader.norm)
    gamma, beta = (getattr(norm, name, None) for name in ("weight", "bias"))
    weight = _stored(model, reader.weight)
    matrix = weight.detach() if reader.dim == 1 else weight.detach().T
    new, gained = read_through(
        matrix, up, None if gamma is None else gamma.detach(), None if beta is None else beta.detach()
    )
    if reader.bias is not None:
        bias = _stored(model, reader.bias)
        _set(bias, bias.detach().double() + gained)
    elif reader.norm in constant:
        new = through_ones(new, gained)
    _set(weight, new if reader.dim == 1 else new.T)


def _needs_ones(model: nn.Module, stream: Stream, norm: Norm) -> bool:
    """Whether a shift behind this normalization has to reach a reader that has no bias."""
    without = any(reader.norm == norm.module and reader.bias is None for reader in stream.readers)
    return norm.shift and without and bool(_stored(model, f"{norm.module}.bias").any())


def _plain_norm(norm: nn.Module, width: int, shift: float) -> None:
    """Scale 1, and the same shift for every channel."""
    for name, value in (("weight", 1.0), ("bias", shift)):
        tensor = getattr(norm, name, None)
        if isinstance(tensor, Tensor):
            _set(tensor, torch.full((width,), value))
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        norm.normalized_shape = (width,)


def _restate_config(model: nn.Module, old: int, new: int) -> None:
    """Let the configuration say the new width where the class then builds this very model.

    Classes that tie the width to heads times head size (GPT-2, OPT) would build another one: their
    configuration keeps the old width, and what was cut is told by the record that `huggingface` writes.
    """
    config = getattr(model, "config", None)
    if config is None or getattr(config, "hidden_size", None) != old:
        return
    stated = copy.deepcopy(config)
    heads = getattr(stated, "num_attention_heads", None)
    if heads and getattr(stated, "head_dim", None) is None:
        stated.head_dim = old // heads
    stated.hidden_size = new
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            fresh = type(model)(stated)
    except Exception:  # a constructor may refuse a width in any way
        return
    if _shapes(fresh) == _shapes(model):
        for name in ("head_dim", "hidden_size"):
            setattr(config, name, getattr(stated, name))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def _stored(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its state-dict name."""
    tensor = getattr(model.get_submodule(owner(name)), name.rpartition(".")[2])
    assert isinstance(tensor, Tensor)
    return tensor


def _set(tensor: Tensor, value: Tensor) -> None:
    """New contents for the same tensor object, in its own dtype: whatever shares it keeps sharing it."""
    tensor.grad = None
    tensor.data = value.to(tensor.device, tensor.dtype).contiguous()

"""Prune the hidden width of a pre-norm model: find and verify its residual stream, then remove channels.

`find_stream` returns the residual stream, `moments` the second moment of the normalized states in it,
`narrow` a plain model of the same class with fewer channels. Scale and shift of each normalization are folded
into the following matrices, so the normalizations become plain. Tied embeddings are untied, because only the
output projection takes the scale of the last normalization.
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

SHARE = 0.75  # of the width, in the equivalence check


def find_stream(model: nn.Module, example: dict[str, Tensor]) -> Stream:
    """The residual stream of `model`, verified by an equivalence check; the model is not changed.

    Args:
        model: any module; on the CPU, in float32 or float64.
        example: keyword arguments of one valid call, without padding.

    Raises:
        CompressError: the width cannot be pruned: a post-norm model, a residual stream with other readers, a
            model that cannot be traced, or one whose narrowed copy computes something else.
    """
    with evaluating(model), torch.no_grad():
        example = without_cache(model, example)
        batch = next((value.shape[0] for value in example.values() if getattr(value, "ndim", 0)), 1)
        try:
            program = Program(model, example)
        except Exception as error:  # tracing arbitrary code may raise anything
            raise CompressError(
                f"torch.export cannot trace {type(model).__name__} ({type(error).__name__}), and the "
                "residual stream can only be found in a trace; prune heads and neurons instead"
            ) from error
        stream = stream_of(model, program, batch)
        _try(model, stream, example)
    return stream


def moments(model: nn.Module, stream: Stream, batches: Iterable[Batch]) -> Tensor:
    """[width, width] second moment, float64, of the residual states, each divided by its RMS.

    All normalizations have equal weight, and so have all tokens, including those of large norm (attention
    sinks).

    Raises:
        CompressError: there are no tokens, or the residual stream contains NaN or infinity.
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
    """A copy with `width` channels, which keeps the principal components of largest variance.

    At the full width it is equivalent to `model`. With LayerNorm `width - 1` directions remain. `model` is
    not changed.

    Args:
        model: the model of `stream`.
        stream: its residual stream.
        second: [width, width] as from `moments`.
        width: channels to keep.

    Raises:
        CompressError: the width is out of range.
    """
    basis, _ = principal(second, centered=stream.centered)
    made = narrowing(basis, width, centered=stream.centered)
    narrowed = copy.deepcopy(model)
    rewrite(narrowed, stream, made)
    return narrowed


def rewrite(model: nn.Module, stream: Stream, made: Narrowing) -> None:
    """Narrow `model`, the model of `stream` or a copy of it, in place."""
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
    """The hidden width as a site, for `huggingface` and `prune.parameters_after`.

    Its slices list the dimensions that have the width of the residual stream; their values after pruning
    come from `narrow`, not from `prune.shrink`. `writer` is the first matrix that reads the stream.
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
    """Sites and kept units to pass to `huggingface.save` for a narrow `model`.

    Both are empty if its configuration states the new width: the saved directory is then a plain model that
    loads without this package.
    """
    width = _stored(model, stream.readers[0].weight).shape[stream.readers[0].dim]
    if getattr(getattr(model, "config", None), "hidden_size", None) == width:
        return [], {}
    site = site_of(stream)
    return [site], {site.name: width}


def _try(model: nn.Module, stream: Stream, example: dict[str, Tensor]) -> None:
    """Raise unless the narrowed model is equivalent to the full-size model with projected writers."""
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
        except Exception as error:  # a forward pass may fail in any way with fewer channels
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
    """Give each reader that shares its matrix with a writer its own copy."""
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
    """Fold the scale and shift of the preceding normalization into a reader and project its inputs."""
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
    """Whether this normalization has a shift and a reader without a bias to fold it into."""
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
    """Set the new width in the configuration if the class then builds a model of exactly these shapes.

    Classes whose width is heads times head size (GPT-2, OPT) would not: their configuration keeps the old
    width, and the record that `huggingface` writes has the new one.
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
    except Exception:  # a constructor may raise anything for a width
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
    """Replace the contents of a tensor in its own dtype; modules that share it keep sharing it."""
    tensor.grad = None
    tensor.data = value.to(tensor.device, tensor.dtype).contiguous()

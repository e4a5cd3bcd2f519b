"""The residual stream of a traced model: what writes it, what reads it, and which normalizations lie between.

The walk starts at the inputs of the normalizations and goes both ways until nothing is new: back through
sums and moved data to the writers (embeddings, convolutions, stored tensors, linear products), forward to
the readers. The width can be cut only where every value is either carried along linearly, or normalized
and then read by linear products alone; otherwise the error names the value.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx import Node

from compress.errors import CompressError
from compress.ir import Document, Matmul, Slice
from compress.sites.trace import Linear, Program, evaluate

JOINED = ("add", "sub", "cat")  # every operand lies in the stream
IDENTITIES = ("to", "alias", "detach", "contiguous")
SCALED = ("mul", "div")  # one operand does, the other holds one number for all of its channels
NORM_TOLERANCE = 1e-4  # float32, values near 1


class Norm(Document):
    """One normalization of the stream by its module; `shift` is whether it has a bias."""

    module: str
    scale: bool
    shift: bool


class Reader(Document):
    """One matrix that reads the stream along `dim`: after the normalization `norm`, or raw (None)."""

    weight: str
    dim: int
    bias: str | None
    norm: str | None


class Stream(Document):
    """The residual stream of a model.

    Attributes:
        width: its channels.
        centered: it is read by LayerNorm, which takes the mean away, and not by RMSNorm.
        writers: tensors with the dimension that holds the channels.
        readers: matrices that read it.
        norms: its normalizations.
        products: the matrix products at the shape of the example, for pricing.
        batch: of the example.
        tokens: of the example.
    """

    width: int
    centered: bool
    writers: tuple[Slice, ...]
    readers: tuple[Reader, ...]
    norms: tuple[Norm, ...]
    products: tuple[Matmul, ...]
    batch: int
    tokens: int


def stream_of(model: nn.Module, program: Program, batch: int) -> Stream:
    """The stream that the normalizations of `model` read; `batch` is that of the example.

    Raises:
        CompressError: the model is not of the pre-norm kind, or something else looks at the stream.
    """
    groups: dict[tuple[int, bool], dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        kind = normalizes(module)
        if kind is not None:
            groups.setdefault(kind, {})[name] = module
    if not groups:
        raise CompressError(
            f"{type(model).__name__} has no LayerNorm or RMSNorm, so no residual stream whose width could "
            "be cut; cut heads and neurons instead"
        )
    # Attention may normalize heads, and embeddings may be narrower; the stream is the widest of all.
    (width, centered), norms = max(groups.items(), key=lambda item: item[0][0] * len(item[1]))
    return _Walk(model, program, width, norms).stream(centered=centered, batch=batch)


def normalizes(module: nn.Module) -> tuple[int, bool] | None:
    """Width, and whether the mean is taken away, of a module that acts as LayerNorm or RMSNorm; else None."""
    values: dict[str, Tensor] = dict(module.named_parameters())
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple) and len(shape) == 1:
        width = int(shape[0])
    elif set(values) <= {"weight", "bias"} and "weight" in values and values["weight"].ndim == 1:
        width = len(values["weight"])
    else:
        return None
    if width < 2 or any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    sample = torch.randn(4, width, generator=torch.Generator().manual_seed(0)) * 100 + 30
    weight, bias = values.get("weight"), values.get("bias")
    like = next(iter(values.values()), torch.empty(0))
    sample = sample.to(like)
    try:
        with torch.no_grad():
            found = module(sample)
    except Exception:  # any module is tried here; one that does not run on rows is no normalization
        return None
    if not isinstance(found, Tensor) or found.shape != sample.shape:
        return None
    for centered in (True, False):
        rows = sample - sample.mean(-1, keepdim=True) if centered else sample
        expected = rows / rows.square().mean(-1, keepdim=True).sqrt()
        expected = expected if weight is None else expected * weight
        expected = expected if bias is None else expected + bias
        if torch.allclose(found, expected, rtol=NORM_TOLERANCE, atol=NORM_TOLERANCE):
            return width, centered
    return None


class _Walk:
    """The nodes that hold the stream or its normalized form, each with the axis of the channels."""

    def __init__(self, model: nn.Module, program: Program, width: int, norms: dict[str, nn.Module]) -> None:
        self.model, self.program, self.width, self.norms = model, program, width, norms
        self.linears = {linear.node: linear for linear in program.linears}
        self.axis: dict[Node, int] = {}
        self.norm: dict[Node, str] = {}  # of normalized values
        self.used: dict[str, Norm] = {}
        self.writers: dict[tuple[str, int], None] = {}
        self.readers: dict[str, Reader] = {}
        self.products: dict[str, Matmul] = {}
        self.pending: list[Node] = []
        self.marker = torch.randn(width, generator=torch.Generator().manual_seed(1))

    def stream(self, *, centered: bool, batch: int) -> Stream:
        """Walk until nothing is new."""
        for node in self.program.module.graph.nodes:
            if node.users and self.inside(node):
                for entry in self.entries(node):
                    self.reach(entry, _rank(entry) - 1)
        while self.pending:
            node = self.pending.pop()
            if node not in self.norm:
                self.backward(node)
            self.forward(node)
        raw = next((reader for reader in self.readers.values() if reader.norm is None), None)
        if centered and raw is not None:
            raise CompressError(
                f"{raw.weight} reads the residual stream before any normalization, mean and all, while the "
                "LayerNorms take the mean away; its width cannot be cut"
            )
        if not self.readers or not self.writers:
            raise CompressError(
                f"{type(self.model).__name__} has no residual stream: nothing writes or reads it"
            )
        rows = max(product.rows for product in self.products.values())
        return Stream(
            width=self.width, centered=centered,
            writers=tuple(Slice(tensor=name, dim=dim, width=1) for name, dim in self.writers),
            readers=tuple(self.readers.values()), norms=tuple(self.used.values()),
            products=tuple(self.products.values()), batch=batch, tokens=max(1, rows // batch),
        )  # fmt: skip

    def place(self, node: Node) -> str | None:
        """The module whose forward made `node`."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return str(stack[-1][0]) if stack else None

    def inside(self, node: Node) -> str | None:
        """The normalization that `node` is part of.

        A cast at its door that changes nothing is the stream itself, and what follows goes on with it.
        """
        place = self.place(node)
        if place not in self.norms:
            return None
        if _operation(node) in IDENTITIES and self.inside(node.all_input_nodes[0]) != place:
            return None
        return place

    def entries(self, node: Node) -> Iterator[Node]:
        """What flows from outside into the normalization that `node` is part of."""
        for source in node.all_input_nodes:
            if self.inside(source) != self.inside(node) and source not in self.program.names:
                yield source

    def reach(self, node: Node, axis: int, norm: str | None = None) -> None:
        """Note that `node` holds the stream, or what `norm` made of it, along `axis`."""
        place = self.inside(node)
        if norm is None and place is not None:
            raise CompressError(
                f"the width of {type(self.model).__name__} cannot be cut: normalization after the sum "
                f"(post-norm): {place} writes into the residual stream, and its scale ties every channel to "
                "itself; only models that normalize what they read (pre-norm: ViT, GPT-2, OPT, Llama, ...) "
                "can lose width"
            )
        if node in self.axis:
            if (self.axis[node], self.norm.get(node)) != (axis, norm):
                raise self.refused(node, "mixes two normalizations or axes of the stream")
            return
        if node.meta["val"].shape[axis] != self.width:
            raise self.refused(node, f"is {list(node.meta['val'].shape)}, not {self.width} channels wide")
        self.axis[node] = axis
        if norm is not None:
            self.norm[node] = norm
        self.pending.append(node)

    def refused(self, node: Node, words: str) -> CompressError:
        """The error for a value that the stream cannot be turned around."""
        place = self.place(node)
        return CompressError(
            f"the width of {type(self.model).__name__} cannot be cut: {node.name}"
            f"{f' in {place}' if place else ''} {words}"
        )

    def backward(self, node: Node) -> None:
        """What wrote this value of the stream."""
        name, axis = _operation(node), self.axis[node]
        if node in self.linears:
            self.write_linear(self.linears[node])
        elif node in self.program.names:
            self.write(self.program.names[node], axis)
        elif name == "embedding":
            self.write(self.stored(node, node.args[0]), 1)
        elif name.startswith("conv"):
            self.write_convolution(node)
        else:
            for operand, own in self.operands(node, axis).items():
                self.reach(operand, own)

    def forward(self, node: Node) -> None:
        """What reads this value: a normalization, a linear product, or more of the stream."""
        norm = self.norm.get(node)
        for user in node.users:
            if not user.users and user.op != "output":
                continue
            place = self.inside(user)
            if norm is None and place is not None:
                self.normalize(place, self.axis[node])
            elif user in self.linears and self.linears[user].input is node:
                self.read(self.linears[user], norm)
            elif user.op == "output":
                raise self.refused(node, "is an output of the model, whose callers need all of its channels")
            else:
                self.carry(node, user, norm)

    def carry(self, node: Node, user: Node, norm: str | None) -> None:
        """More of the same: moved data, or a sum."""
        if norm is not None and _operation(user) in JOINED and len(user.all_input_nodes) > 1:
            raise self.refused(user, f"adds what {norm} normalized to something else (post-norm)")
        for axis in range(_rank(user)):
            if user.meta["val"].shape[axis] == self.width:
                operands = self.operands(user, axis, strict=False)
                if operands.get(node) == self.axis[node]:
                    self.reach(user, axis, norm)
                    return
        raise self.refused(user, f"({user.target}) computes with single channels of the stream")

    def normalize(self, place: str, axis: int) -> None:
        """A normalization reads the stream; what leaves it is normalized."""
        parameters = dict(self.norms[place].named_parameters())
        self.used[place] = Norm(module=place, scale="weight" in parameters, shift="bias" in parameters)
        for node in self.program.module.graph.nodes:
            if self.inside(node) == place and any(u.users and self.inside(u) != place for u in node.users):
                self.reach(node, axis, place)

    def operands(self, node: Node, axis: int, *, strict: bool = True) -> dict[Node, int]:
        """The operands of `node` that carry the stream to `axis` of it, each with its own axis."""
        name, rank = _operation(node), _rank(node)
        sources = [source for source in node.all_input_nodes if _floating(source)]
        found: dict[Node, int] = {}
        for source in sources:
            aligned = axis - rank + _rank(source)
            if name in JOINED:
                if aligned >= 0 and source.meta["val"].shape[aligned] == self.width:
                    found[source] = aligned
            elif len(sources) == 1 or name in SCALED:
                for own in range(_rank(source)):
                    if source.meta["val"].shape[own] == self.width and self.moves(node, source, own, axis):
                        found[source] = own
        whole = len(found) == len(sources) if name in JOINED else len(found) == 1
        if whole and (name not in JOINED or not _has_number(node)):
            return found
        if strict:
            raise self.refused(
                node, f"({node.target}) writes into the stream, but is not a sum of its writers"
            )
        return {}

    def moves(self, node: Node, source: Node, own: int, axis: int) -> bool:
        """Whether `node` moves channels from `own` of `source` to `axis` of itself, mixing none."""
        shape = list(source.meta["val"].shape)
        rows = torch.randn([*shape[:own], 1, *shape[own + 1 :]], generator=torch.Generator().manual_seed(2))
        given = rows * self.marker.reshape([-1 if i == own else 1 for i in range(len(shape))])
        try:
            others = {n: self.program.value(n) for n in node.all_input_nodes if n is not source}
            with torch.no_grad():
                result = evaluate(node, {**others, source: given}, self.program.module)
        except Exception:  # an arbitrary operation; one that does not run on this is no mere movement
            return False
        if not isinstance(result, Tensor) or result.shape[axis] != self.width:
            return False
        flat = result.movedim(axis, -1).reshape(-1, self.width).float()
        factor = flat @ self.marker / self.marker.square().sum()
        return bool(
            ((flat - factor[:, None] * self.marker).abs().max() <= NORM_TOLERANCE * flat.abs().max()).item()
        )

    def write_linear(self, linear: Linear) -> None:
        """A linear product writes: its output features are the channels."""
        name, stored = linear.weight, self.model.get_parameter(linear.weight).shape
        if linear.start or linear.out != stored[linear.dim] or linear.out != self.width:
            raise self.refused(linear.node, f"is only a part of {name}")
        name = self.own(linear.node, name)
        self.write(name, linear.dim)
        if linear.bias is not None:
            self.write(self.own(linear.node, linear.bias), 0)
        self.products[name] = _matmul(linear, name, out_per_unit=1)

    def write_convolution(self, node: Node) -> None:
        """A convolution writes: its output channels are those of the stream."""
        weight = self.stored(node, node.args[1])
        outer, inner = self.model.get_parameter(weight).shape[:2]
        source = node.args[0]
        assert isinstance(source, Node)
        if self.axis[node] != 1 or outer != self.width or inner != source.meta["val"].shape[1]:
            raise self.refused(node, "is a grouped or transposed convolution")
        self.write(weight, 0)
        if len(node.args) > 2 and node.args[2] is not None:
            self.write(self.stored(node, node.args[2]), 0)

    def stored(self, node: Node, argument: object) -> str:
        """The name of a stored tensor among the arguments of `node`."""
        name = self.program.names.get(argument) if isinstance(argument, Node) else None
        if name is None:
            raise self.refused(node, "writes into the stream from a tensor that is computed, not stored")
        return self.own(node, name)

    def own(self, node: Node, name: str) -> str:
        """The name that the module of `node` has for a tensor, which may be shared with another module."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        own = f"{self.place(node)}.{name.rpartition('.')[2]}"
        return own if own in named and named[own] is named.get(name) else name

    def write(self, name: str, dim: int) -> None:
        """Note a stored tensor that writes."""
        if name not in self.model.state_dict():
            raise CompressError(f"{name} writes into the residual stream, but is not saved with the model")
        self.writers[name, dim] = None

    def read(self, linear: Linear, norm: str | None) -> None:
        """Note a matrix that reads."""
        name = self.own(linear.node, linear.weight)
        reader = Reader(weight=name, dim=1 - linear.dim, bias=linear.bias, norm=norm)
        if self.readers.setdefault(name, reader) != reader:
            raise self.refused(linear.node, f"reads the stream through {name}, which other places read too")
        self.products[name] = _matmul(linear, name, inner_per_unit=1)


def _matmul(linear: Linear, name: str, *, out_per_unit: int = 0, inner_per_unit: int = 0) -> Matmul:
    return Matmul(
        weight=name, rows=linear.rows, out=linear.out, inner=linear.inner,
        out_per_unit=out_per_unit, inner_per_unit=inner_per_unit, bias=linear.bias is not None,
    )  # fmt: skip


def _operation(node: Node) -> str:
    """`add` for `aten.add_.Tensor`."""
    words = str(node.target).split(".")
    return words[1].rstrip("_") if len(words) > 1 else words[0]


def _rank(node: Node) -> int:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, Tensor) else 0


def _floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _has_number(node: Node) -> bool:
    """Whether a sum adds a number to every channel (`cat` names its dimension by one)."""
    return _operation(node) != "cat" and any(isinstance(part, int | float) for part in node.args[:2])

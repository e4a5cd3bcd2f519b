"""Trace an nn.Module with torch.export: the program, its linear layers and the regions between them.

A *region* is everything between some linear layers (its producers) and one that reads the result (its
writer), with no other inputs than constants, masks and positions: the attention of a layer, its activation.
"""

import inspect
import logging
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

MAX_PRODUCERS = 8  # a value made from more linear products than this is the residual stream
ATTENTION = ("scaled_dot_product", "matmul", "bmm", "einsum")
STREAM = ("embedding", "conv")


@dataclass(frozen=True)
class Linear:
    """One product `input @ weight^T + bias`; its output feature f is index `start + f` of `weight`.

    `dim` is the dimension of the stored weight that holds output features: 0 for `[out, in]`, 1 for
    `[in, out]`. `bias_start` is the index of the first output feature in the stored bias.
    """

    node: Node
    input: Node
    weight: str
    dim: int
    start: int
    bias: str | None
    bias_start: int
    out: int
    inner: int

    @property
    def rows(self) -> int:
        """Rows of the product at the shape of the example."""
        return int(self.node.meta["val"].numel()) // self.out


@dataclass(frozen=True)
class Region:
    """What lies between `producers` and `writer`; `outside` are the other inputs of its `nodes`."""

    producers: tuple[Linear, ...]
    writer: Linear
    nodes: tuple[Node, ...]
    outside: tuple[Node, ...]

    @property
    def attention(self) -> Node | None:
        """The last product of two activations: attention's weighted sum of values."""
        inside = {*self.nodes, *(producer.node for producer in self.producers)}
        for node in reversed(self.nodes):
            operands = [operand for operand in node.all_input_nodes if operand in inside]
            if any(word in str(node.target) for word in ATTENTION) and (
                len(operands) > 1 or "einsum" in str(node.target)
            ):
                return node
        return None

    @property
    def leak(self) -> Node | None:
        """A reader of the region's values that is neither inside nor the writer."""
        made = (*(producer.node for producer in self.producers), *self.nodes)
        inside = {*self.nodes, self.writer.node}
        for node in made:
            for user in node.users:
                if user not in inside and (user.users or user.op == "output"):
                    return user
        return None


class Program:
    """A traced model: `linears` in the order of execution, and values of what no product feeds."""

    def __init__(self, model: nn.Module, example: dict[str, Tensor]) -> None:
        """Trace `model` on `example`; raises whatever torch.export raises."""
        with torch.no_grad(), plain_attention(), _quiet_tracer():
            program = torch.export.export(model, (), dict(example), strict=False)
            if _reads_overwritten_values(program.graph):
                with warnings.catch_warnings():
                    # torch warns about its own deprecated calls here.
                    warnings.simplefilter("ignore", FutureWarning)
                    program = program.run_decompositions({})
        signature = program.graph_signature
        self.module: GraphModule = program.graph_module
        self.names: dict[Node, str] = {}
        self._known: dict[Node, object] = {}
        self._inputs: set[Node] = set()
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        values = {**dict(program.named_parameters()), **dict(program.named_buffers())}
        given = iter(tree_leaves(dict(example)))
        constants = signature.inputs_to_lifted_tensor_constants
        for node in self.module.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in stored:
                self.names[node] = stored[node.name]
                self._known[node] = values[stored[node.name]]
            elif node.name in constants:
                self._known[node] = program.constants[constants[node.name]]
            else:
                self._inputs.add(node)
                position = next(given)
                self._known[node] = example.get(node.name, position)
        self.parameters = {self.names[n] for n in self.names if n.name in signature.inputs_to_parameters}
        self.linears = tuple(self._find_linears())
        self._by_node = {linear.node: linear for linear in self.linears}
        self._origin = self._origins()

    def value(self, node: Node) -> object:
        """The value of `node` on the example; for nodes that cheap operations lead to."""
        with torch.no_grad():
            pending = [node]
            while pending:
                last = pending[-1]
                missing = [n for n in last.all_input_nodes if n not in self._known]
                if last in self._known or not missing:
                    pending.pop()
                    if last not in self._known:
                        self._known[last] = evaluate(last, self._known, self.module)
                else:
                    pending += missing
        return self._known[node]

    def readers(self, name: str) -> set[Node]:
        """The operations that compute with the stored tensor `name`, past mere views of it."""
        found: list[Node] = []
        pending = [node for node, own in self.names.items() if own == name]
        while pending:
            for user in pending.pop().users:
                single = len(user.all_input_nodes) == 1 and user not in self._by_node
                (pending if single and user.users else found).append(user)
        return set(found)

    def regions(self) -> Iterator[Region]:
        """Every region whose values come from linear products alone, in the order of the writers."""
        for writer in self.linears:
            if self._origin[writer.input]:
                region = self._region(writer)
                for node in region.outside:
                    region = self._widened(region, node)
                yield region

    def _widened(self, region: Region, node: Node) -> Region:
        """`region` with the computation of its outside value `node` inside, down to stored tensors.

        Unchanged when no parameter is behind `node`, or when the computation is used elsewhere too.
        """
        own: set[Node] = set()
        pending = [node]
        while pending:
            last = pending.pop()
            if last.op == "call_function" and last not in own and self.stored_behind(last):
                own.add(last)
                pending += last.all_input_nodes
        inside = {*own, *region.nodes}
        if any(user not in inside and user.users for part in own for user in part.users):
            return region
        nodes = tuple(n for n in self.module.graph.nodes if n in inside)
        return Region(region.producers, region.writer, nodes, _outside(nodes, region.producers))

    def stored_behind(self, node: Node) -> list[str]:
        """Names of the parameters that `node` is made from."""
        seen: set[Node] = set()
        pending = [node]
        while pending:
            last = pending.pop()
            if last not in seen:
                seen.add(last)
                pending += last.all_input_nodes
        return sorted({self.names.get(last, "") for last in seen} & self.parameters)

    def _region(self, writer: Linear) -> Region:
        inside: set[Node] = set()
        producers: set[Node] = set()
        pending = [writer.input]
        while pending:
            node = pending.pop()
            if node in self._by_node:
                producers.add(node)
            elif node not in inside and self._origin[node]:
                inside.add(node)
                pending += node.all_input_nodes
        nodes = tuple(n for n in self.module.graph.nodes if n in inside)
        found = tuple(linear for linear in self.linears if linear.node in producers)
        return Region(found, writer, nodes, _outside(nodes, found))

    def _origins(self) -> dict[Node, frozenset[Node] | None]:
        """The linear products behind each node; None where anything else carries the data."""
        origin: dict[Node, frozenset[Node] | None] = {}
        dynamic: set[Node] = set()
        for node in self.module.graph.nodes:
            if node in self._inputs or not dynamic.isdisjoint(node.all_input_nodes):
                dynamic.add(node)
            sources = [origin[n] for n in node.all_input_nodes]
            value = self._known.get(node)
            looked_up = node in dynamic and any(word in str(node.target) for word in STREAM)
            fed = node in self._inputs and isinstance(value, Tensor) and value.is_floating_point()
            if node in self._by_node:
                origin[node] = frozenset([node])
            elif looked_up or fed or any(source is None for source in sources):
                origin[node] = None
            else:
                union = frozenset[Node]().union(*(source for source in sources if source))
                origin[node] = union if len(union) <= MAX_PRODUCERS else None
        return origin

    def _find_linears(self) -> Iterator[Linear]:
        for node in self.module.graph.nodes:
            name = str(node.target)
            if node.op != "call_function":
                continue
            if name == "aten.linear.default":
                x, weight, bias = (*node.args, None)[:3]
                found = self._linear(node, x, weight, bias, transposed=False)
            elif name == "aten.addmm.default":
                bias, x, weight = node.args
                found = self._linear(node, x, weight, bias, transposed=True)
            elif name in ("aten.mm.default", "aten.matmul.default"):
                x, weight = node.args
                found = self._linear(node, x, weight, None, transposed=True)
            else:
                continue
            if found is not None:
                yield found

    def _linear(
        self, node: Node, x: object, weight: object, bias: object, *, transposed: bool
    ) -> Linear | None:
        """The product at `node`, None unless its weight is a plain part of one stored matrix."""
        if not isinstance(x, Node) or not isinstance(weight, Node):
            return None
        matrix = self._part(weight)
        if matrix is None or matrix[1].ndim != 2:
            return None
        name, view, (rows, columns) = matrix
        view = view.t() if transposed else view  # [out, in]
        if view.stride() == (columns, 1) and view.shape[1] == columns:
            dim, start = 0, view.storage_offset() // columns
        elif view.stride() == (1, columns) and view.shape[1] == rows:
            dim, start = 1, view.storage_offset()
        else:
            return None
        vector = self._part(bias) if isinstance(bias, Node) else None
        if bias is not None and (vector is None or vector[1].stride() != (1,)):
            return None
        return Linear(
            node=node, input=x, weight=name, dim=dim, start=start,
            bias=vector[0] if vector else None,
            bias_start=int(vector[1].storage_offset()) if vector else 0,
            out=view.shape[0], inner=view.shape[1],
        )  # fmt: skip

    def _part(self, node: Node) -> tuple[str, Tensor, torch.Size] | None:
        """Which stored tensor `node` is a view of: its name, the view (no data), the whole shape."""
        chain: list[Node] = []
        while node.op == "call_function" and len(node.all_input_nodes) == 1:
            chain.append(node)
            node = node.all_input_nodes[0]
        if self.names.get(node) not in self.parameters:
            return None
        stored = self._known[node]
        assert isinstance(stored, Tensor)
        whole = torch.empty(stored.shape, device="meta")
        values: dict[Node, object] = {node: whole}
        for step in reversed(chain):
            values[step] = evaluate(step, values, self.module)
        view = values[chain[0] if chain else node]
        # A copy has strides of its own, which tell nothing about the stored matrix.
        if not isinstance(view, Tensor) or not (view is whole or view._base is whole):
            return None
        return self.names[node], view, stored.shape


def evaluate(node: Node, values: dict[Node, object], module: GraphModule) -> object:
    """What `node` computes from `values`."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(module)
    args, kwargs = _substituted((node.args, node.kwargs), values)
    assert callable(node.target)
    # The values given here need not have the strides that a view was traced with.
    view = node.target is torch.ops.aten.view.default
    return torch.reshape(*args) if view else node.target(*args, **kwargs)


def _substituted(arguments: Any, values: dict[Node, object]) -> Any:
    """`arguments` of a node with values in the place of nodes."""
    return map_arg(arguments, lambda n: values[n])  # type: ignore[arg-type, return-value]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Torch's fused encoder kernels and transformers' mapped masks off: both hide from the tracer."""
    backend = torch.backends.mha
    before = backend.get_fastpath_enabled()
    backend.set_fastpath_enabled(False)
    try:
        with _broadcast_masks():
            yield
    finally:
        backend.set_fastpath_enabled(before)


@contextmanager
def _broadcast_masks() -> Iterator[None]:
    """Masks from transformers 4 as later ones make them: by broadcasting, not by `torch.vmap`."""
    masks = sys.modules.get("transformers.masking_utils")
    before = getattr(masks, "_vmap_for_bhqkv", None)
    if masks is None or before is None:
        yield
        return
    getitem = masks.TransformGetItemToIndex
    masks._vmap_for_bhqkv = _broadcast  # type: ignore[attr-defined]
    masks.TransformGetItemToIndex = nullcontext  # type: ignore[attr-defined]
    try:
        yield
    finally:
        masks._vmap_for_bhqkv = before  # type: ignore[attr-defined]
        masks.TransformGetItemToIndex = getitem  # type: ignore[attr-defined]


def _broadcast(function: Callable[..., Tensor], bh_indices: bool = True) -> Callable[..., Tensor]:
    """A mask over indices `(batch, head, query, key)` -> one over vectors of them, of every pair."""

    def mask(*vectors: Tensor | None) -> Tensor:
        given = [vector for vector in vectors if vector is not None]
        last = len(given) - 1
        wide = iter(vector[(..., *[None] * (last - place))] for place, vector in enumerate(given))
        indices = [None if vector is None else next(wide) for vector in vectors]
        return function(*indices).expand(*(vector.shape[0] for vector in given))

    return mask


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and afterwards every module in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def without_cache(model: nn.Module, example: dict[str, Tensor]) -> dict[str, Tensor]:
    """The example, asking a decoder not to return its keys and values."""
    arguments: dict[str, Tensor | bool] = dict(example)
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments.setdefault("use_cache", False)
    return arguments  # type: ignore[return-value]


@contextmanager
def _quiet_tracer() -> Iterator[None]:
    """No log of the tracer: whatever makes it fail is raised as well, and reported by the caller."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


def _outside(nodes: tuple[Node, ...], producers: tuple[Linear, ...]) -> tuple[Node, ...]:
    inside = {*nodes, *(producer.node for producer in producers)}
    found = (n for node in nodes for n in node.all_input_nodes if n not in inside)
    return tuple(dict.fromkeys(found))


def _reads_overwritten_values(graph: Graph) -> bool:
    """Whether a value is read under its old name after an operation has overwritten it."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        written = node.args[0]
        while isinstance(written, Node):
            if any(order[user] > order[node] for user in written.users):
                return True
            shown = getattr(written.target, "_schema", None)
            view = shown is not None and any(result.alias_info for result in shown.returns)
            written = written.args[0] if view else None
    return False

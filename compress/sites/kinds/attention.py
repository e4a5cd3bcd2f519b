"""Heads of an attention block, or groups of query heads that share a key and a value."""

from collections.abc import Iterator

from compress.errors import CompressError
from compress.ir import Matmul, Site, Slice
from compress.sites.kinds.kernel import Kernel, product
from compress.sites.kinds.kind import Builder, Kind, Value
from compress.sites.kinds.layout import Layout, NamePattern


class Attention(Kind):
    """A unit is one key-value head with all its query heads."""

    name = "heads"
    label = "attention"
    color = "#b05c8c"
    dark_color = "#dc8fb9"
    attends = True
    patterns = (
        NamePattern(("self.query", "self.key", "self.value"), "output.dense"),
        NamePattern(("attention.query", "attention.key", "attention.value"), "output.dense"),
        NamePattern(("q_lin", "k_lin", "v_lin"), "out_lin"),
        NamePattern(("q_proj", "k_proj", "v_proj"), "o_proj"),
        NamePattern(("q_proj", "k_proj", "v_proj"), "out_proj"),
        NamePattern(("q", "k", "v"), "o"),
        NamePattern(("c_attn",), "c_proj", 3),
        NamePattern(("qkv_proj",), "o_proj", 3),
        NamePattern(("qkv",), "proj", 3),
    )
    count_attributes = (
        ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
        ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"),
    )

    def matches(self, layout: Layout) -> bool:
        """Whatever multiplies activations with each other."""
        return layout.attention

    def fields(self, layout: Layout) -> dict[str, str | int]:
        """Features of a head, query heads of a unit, and whether later tokens are hidden."""
        return {
            "head_dim": layout.head_dim,
            "queries": layout.width // layout.head_dim,
            "causal": layout.causal,
        }

    def step(self, site: Site) -> Site:
        """One new token for every sequence, after as many in the cache as the example has."""
        return super().step(site).model_copy(update={"past": site.tokens})

    def levels(self, site: Site, align: int) -> list[int]:
        """Every number of heads; `align` is about features, and a head has many."""
        return list(range(site.units, 0, -1))

    def multiplications(self, site: Site) -> int:
        """Those of the projections, of the scores and of the weighted sums."""
        scores = site.units * site.queries * site.batch * site.tokens**2 * site.head_dim
        return super().multiplications(site) + 2 * scores

    def kernels(self, site: Site, units: int, width_bytes: float, *, fused: bool) -> list[Kernel]:
        """Scores, softmax and context of all kept heads."""
        if not site.head_dim:
            return []
        heads, tokens, width = site.batch * units * site.queries, site.tokens, site.head_dim
        seen = site.past + tokens
        scores = product(heads, tokens, seen, width, width_bytes)
        context = product(heads, tokens, width, seen, width_bytes)
        features, held = heads * tokens * width * width_bytes, heads * seen * width * width_bytes
        # The cache is copied to where one more token fits; a group of queries shares it.
        copies = [Kernel(2 * held / site.queries) for _ in ("k", "v") if site.past]
        if fused:  # one kernel that keeps the scores on chip
            return [Kernel(2 * (features + held), 2 * heads, tokens, seen, width), *copies]
        square = heads * tokens * seen * width_bytes
        passes = [Kernel(2 * square) for _ in ("scale", "mask", "softmax")]
        transposes = [Kernel(2 * features) for _ in ("q", "k", "v", "context")]
        return [scores, *passes, context, *transposes, *copies]

    def parts(self, site: Site) -> tuple[Matmul, list[Matmul]]:
        """The output projection, and the projections to query, key and value.

        Raises:
            CompressError: query, key and value cannot be told apart in the products.
        """
        writer, readers = super().parts(site)
        projections(site, readers)
        return writer, readers

    def body(self, builder: Builder[Value], x: Value, site: Site, units: int) -> Value:
        """Projections, from separate or fused matrices, and attention."""
        _, readers = self.parts(site)
        outs: list[Value] = []
        for reader, widths in projections(site, readers):
            out = builder.product(x, reader)
            outs += builder.split(out, [units * width for width in widths]) if len(widths) > 1 else [out]
        return builder.attention(*outs)

    def free_columns(self, site: Site, columns: int) -> int:
        """Values change places within their head."""
        return site.head_dim

    def channel_sets(self, site: Site) -> Iterator[tuple[Slice, ...]]:
        """One projection at a time with its bias: the one that makes the values is not known here."""
        others = [part for part in site.slices if part.tensor != site.writer]
        weights = {matmul.weight for matmul in site.matmuls}
        for part in others:
            if part.tensor in weights and part.width == site.head_dim:
                module = part.tensor.rpartition(".")[0]
                beside = {
                    other
                    for other in others
                    if other.tensor.rpartition(".")[0] == module
                    and (other.start, other.width) == (part.start, part.width)
                }
                yield (part, *sorted(beside - {part}, key=lambda other: other.tensor))


def projections(site: Site, readers: list[Matmul]) -> list[tuple[int, list[int]]]:
    """Which reader gives which of query, key and value: its number, and features of a unit of each.

    The widest reader comes first, which is the query where queries are grouped; otherwise their order
    makes no difference to the time.

    Raises:
        CompressError: query, key and value cannot be told apart.
    """
    wanted = [site.queries * site.head_dim, site.head_dim, site.head_dim]
    rest = list(wanted)
    found: list[tuple[int, list[int]]] = []
    for number in sorted(range(len(readers)), key=lambda k: -readers[k].out_per_unit):
        widths: list[int] = []
        while rest and sum(widths) < readers[number].out_per_unit:
            widths.append(rest.pop(0))
        if sum(widths) != readers[number].out_per_unit:
            raise CompressError(
                f"{site.name}: an attention whose products give {[m.out_per_unit for m in readers]} "
                f"features a unit, not {wanted}, cannot be timed alone"
            )
        found.append((number, widths))
    if rest:
        raise CompressError(f"{site.name}: only {3 - len(rest)} of query, key and value lie in its products")
    return found


ATTENTION = Attention()

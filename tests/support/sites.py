"""Feed-forward and attention sites of a few units, for the chains that time them."""

from compress.ir import Matmul, Site

HIDDEN, TOKENS, BATCH, WIDTH = 8, 5, 2, 4
ROWS = BATCH * TOKENS


def ffn(units=12, gated="", activation="gelu", bias=True, **keywords):
    """A feed-forward site; `gated` is "", "two" (up and gate apart) or "one" (fused)."""
    up = Matmul(weight="up", rows=ROWS, out=units, inner=HIDDEN, out_per_unit=1, bias=bias)
    ups = {
        "": (up,),
        "two": (up, up),
        "one": (up.model_copy(update={"out": 2 * units, "out_per_unit": 2}),),
    }
    down = Matmul(weight="down", rows=ROWS, out=HIDDEN, inner=units, inner_per_unit=1, bias=bias)
    return Site(
        name="ffn", kind="ffn", units=units, slices=(), matmuls=(*ups[gated], down), writer="down",
        batch=BATCH, tokens=TOKENS, gated=bool(gated), activation=activation, **keywords,
    )  # fmt: skip


def heads(units=3, queries=1, fused=(), bias=True, **keywords):
    """An attention site; `fused` lists the features that one unit has in each product."""
    parts = fused or (queries * WIDTH, WIDTH, WIDTH)
    readers = tuple(
        Matmul(weight=f"r{k}", rows=ROWS, out=units * part, inner=HIDDEN, out_per_unit=part, bias=bias)
        for k, part in enumerate(parts)
    )
    per_unit = queries * WIDTH
    out = Matmul(
        weight="o", rows=ROWS, out=HIDDEN, inner=units * per_unit, inner_per_unit=per_unit, bias=bias
    )
    return Site(
        name="heads", kind="heads", units=units, slices=(), matmuls=(*readers, out), writer="o",
        batch=BATCH, tokens=TOKENS, head_dim=WIDTH, queries=queries, **keywords,
    )  # fmt: skip

import pytest
from pydantic import ValidationError

from compress.ir import (
    BUDGETS,
    Budget,
    Candidate,
    Drop,
    Latency,
    Matmul,
    Option,
    Plan,
    Site,
    Slice,
)

UP = Matmul(weight="up", rows=32, out=1536, inner=384, out_per_unit=1, bias=True)
DOWN = Matmul(weight="down", rows=32, out=384, inner=1536, inner_per_unit=1, bias=True)


def heads(**changes):
    """12 heads of width 32: three readers with biases and a writer."""
    readers = tuple(
        Matmul(weight=name, rows=8, out=384, inner=384, out_per_unit=32, bias=True) for name in "qkv"
    )
    writer = Matmul(weight="o", rows=8, out=384, inner=384, inner_per_unit=32, bias=True)
    values = {
        "name": "layer.0.attention",
        "kind": "heads",
        "units": 12,
        "slices": (
            Slice(tensor="q", dim=0, width=32),
            Slice(tensor="o", dim=1, width=32),
            Slice(tensor="o.scale", dim=0, width=1),
        ),
        "matmuls": (*readers, writer),
        "writer": "o",
        "bias": "o.bias",
        "tokens": 8,
        "head_dim": 32,
    }
    return Site(**(values | changes))


def test_a_document_cannot_be_changed_and_refuses_what_it_does_not_know():
    part = Slice(tensor="w", dim=0, width=2)
    with pytest.raises(ValidationError, match="frozen"):
        part.dim = 1
    with pytest.raises(ValidationError, match="Extra inputs"):
        Slice(tensor="w", dim=0, width=2, step=1)
    with pytest.raises(ValidationError, match="finite"):
        Latency(p50=float("nan"), p90=1, mean=1, std=0, runs=3)


@pytest.mark.parametrize(
    "values",
    [
        {"dim": -1, "width": 1},
        {"dim": 0, "width": 0},
        {"dim": 0, "width": 1, "start": -1},
    ],
)
def test_a_slice_that_cannot_exist_is_refused(values):
    with pytest.raises(ValidationError):
        Slice(tensor="w", **values)


def test_documents_survive_json():
    site = heads(drop=Drop(module="layer.0.attention", writer=True, output=0, outputs=2))
    assert Site.model_validate_json(site.model_dump_json()) == site


def test_the_column_is_the_slice_of_the_writer():
    assert heads().column == Slice(tensor="o", dim=1, width=32)
    with pytest.raises(StopIteration):
        _ = heads(writer="nowhere").column


def test_sides_of_a_product_follow_the_units_only_where_units_own_them():
    assert UP.features(100) == (100, 384)
    assert DOWN.features(100) == (384, 100)
    assert Matmul(weight="x", rows=1, out=5, inner=7).features(3) == (5, 7)
    assert heads().matmuls[0].features(3) == (96, 384)


def test_parameters_are_counted_as_the_tensors_are_cut():
    """Brute force: columns and rows that units own, element by element."""
    site = Site(name="ffn", kind="ffn", units=1536, slices=(), matmuls=(UP, DOWN), writer="down")
    up = sum(384 + 1 for _ in range(1536))  # a row of the weight and its bias
    down = sum(384 for _ in range(1536))  # a column; the writer's bias stays
    assert site.parameters == up + down
    assert site.parameters_per_unit == 384 + 1 + 384
    no_bias = site.model_copy(update={"matmuls": (UP.model_copy(update={"bias": False}), DOWN)})
    assert no_bias.parameters_per_unit == 384 + 384
    assert heads().parameters == 3 * (384 * 384 + 384) + 384 * 384


def test_equal_shapes_share_a_key_and_every_cost_changes_it():
    site = heads()
    assert site.shape == heads(name="layer.7.attention", bias=None, slices=()).shape
    renamed = tuple(m.model_copy(update={"weight": f"{m.weight}2"}) for m in site.matmuls)
    assert site.shape == heads(matmuls=renamed).shape
    first, *rest = site.matmuls
    others = [
        heads(kind="ffn"),
        heads(units=6),
        heads(batch=2),
        heads(tokens=9),
        heads(past=8),
        heads(tokens=7, past=1),
        heads(tokens=1, past=8),
        heads(head_dim=64),
        heads(queries=2),
        heads(causal=True),
        heads(activation="gelu"),
        heads(gated=True),
        heads(matmuls=tuple(rest)),
        heads(matmuls=(*rest, first)),
    ]
    for change in ("rows", "out", "inner", "out_per_unit", "inner_per_unit"):
        changed = first.model_copy(update={change: getattr(first, change) + 1})
        others.append(heads(matmuls=(changed, *rest)))
    others.append(heads(matmuls=(first.model_copy(update={"bias": False}), *rest)))
    keys = {site.shape, *(other.shape for other in others)}
    assert len(keys) == len(others) + 1


def test_the_default_option_leaves_a_site_dense():
    option = Option()
    assert (option.units, option.pattern, option.rank, option.precision) == (None, "dense", 0, "fp32")
    assert Option(units=0).units == 0
    with pytest.raises(ValidationError):
        Option(units=-1)
    with pytest.raises(ValidationError):
        Option(rank=-1)


def test_a_candidate_has_no_negative_price_and_names_its_source():
    values = {"site": "a", "option": Option(), "error": 0, "latency_ms": 0, "weight_bytes": 0}
    assert Candidate(**values, source="measured").energy_mj is None
    for name in ("error", "latency_ms", "weight_bytes"):
        with pytest.raises(ValidationError, match=name):
            Candidate(**(values | {name: -1}), source="measured")
    with pytest.raises(ValidationError, match="source"):
        Candidate(**values, source="guessed")


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_knows_its_name_and_value(name):
    budget = Budget(**{name: 3})
    assert (budget.name, budget.value) == (name, 3.0)
    assert isinstance(budget.value, float)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"speedup": 2, "size_mb": 3},
        {"speedup": 0},
        {"latency_ms": -1},
        {"size_mb": float("inf")},
        {"power_w": float("nan")},
        {"power_w": 5, "rate_hz": 0},
        {"energy_mj": 5, "rate_hz": 10},
        {"rate_hz": 10},
    ],
)
def test_a_budget_is_exactly_one_positive_number(values):
    with pytest.raises(ValidationError):
        Budget(**values)


def test_a_budget_says_what_was_found_instead():
    with pytest.raises(ValidationError, match=r"found \['speedup', 'size_mb'\]"):
        Budget(speedup=2, size_mb=3)
    with pytest.raises(ValidationError, match="latency_ms must be a positive number, not 0"):
        Budget(latency_ms=0)


def test_a_plan_survives_json():
    plan = Plan(
        target="cpu",
        budget=Budget(speedup=2),
        choices={"a": Option(units=3), "b": Option()},
        fixed_ms=0.1,
        predicted_ms=1.2,
    )
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert again.schema_version == 1

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.ir import Budget
from compress.report.formatting import amount, digits, exact, lost, score_decimals, score_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0009, "9.0e-04"),
        (0.001, "0.00100"),
        (0.0456, "0.0456"),
        (0.5, "0.500"),
        (1.0, "1.00"),
        (10.0, "10.0"),
        (100.0, "100"),
        (123456.7, "123457"),
        (-1.5, "-1.50"),
        (-0.0001, "-1.0e-04"),
    ],
)
def test_three_digits_that_mean_something(value, text):
    assert digits(value) == text


def test_amounts_carry_the_unit_of_their_budget():
    assert [amount(*pair) for pair in (("energy_mj", 20), ("power_w", 15), ("speedup", 1.5))] == [
        "20.0 mJ",
        "15.0 W",
        "1.50x",
    ]


def test_a_narrow_miss_is_not_rounded_into_a_hit():
    assert exact(Budget(speedup=2.0), 1.9996) == "1.9996x"
    assert exact(Budget(latency_ms=5.0), 5.0004) == "5.0004 ms"


def test_a_plain_value_is_not_given_more_digits():
    assert exact(Budget(speedup=2.0), 2.0) == "2.00x"
    assert exact(Budget(speedup=2.0), 2.06) == "2.06x"


def test_shares_are_percent_and_other_metrics_are_themselves():
    assert score_text("accuracy", 0.9541) == "95.4"
    assert score_text("perplexity", 23.412) == "23.4"
    assert score_text("accuracy", None) == "not measured"
    assert lost("accuracy", 0.013) == "1.3 points"
    assert lost("accuracy", 0.0, (-0.0004, 0.0122)) == "0.0 points [0.0, 1.2]"
    assert lost("perplexity", 0.413, (-0.2, 1.0)) == "0.413 [-0.200, 1.00]"
    assert lost("perplexity", 0.41) == "0.410"


@given(
    metric=st.sampled_from(("accuracy", "cosine", "perplexity")),
    before=st.floats(0.01, 1.0),
    change=st.floats(-0.2, 0.2).filter(lambda change: abs(change) > 1e-6),
)
def test_scores_that_differ_are_never_printed_as_equal_over_a_loss(metric, before, change):
    after = max(before - change, 0.001)
    if abs(before - after) < 1e-6:
        return
    decimals = score_decimals(metric, before, after)
    first, second = (score_text(metric, value, decimals) for value in (before, after))
    said = lost(metric, before - after, decimals=decimals).removesuffix(" points")
    assert first != second
    assert abs(float(first) - float(second) - float(said)) < 1.5 * 10.0**-decimals


@given(
    metric=st.sampled_from(("accuracy", "perplexity")), right=st.integers(1, 4499), wrong=st.integers(-40, 40)
)
def test_counts_of_right_inputs_lose_what_their_scores_differ_by(metric, right, wrong):
    before, after = right / 4500, min(max(right - wrong, 1), 4500) / 4500
    decimals = score_decimals(metric, before, after)
    first, second = (score_text(metric, value, decimals) for value in (before, after))
    said = float(lost(metric, before - after, decimals=decimals).removesuffix(" points"))
    assert (first == second) == (before == after) == (said == 0)

"""The roofline against NVIDIA's own latencies: what is compared, and how far off it is."""

from collections import Counter

import pytest

from compress import profiles
from compress.cost import published_latencies
from compress.cost.roofline import DEFAULT

# Measured once; a change of the roofline that makes an estimate worse than this is noticed here.
LARGEST_MEAN_ERROR = {"a100": 0.25, "l4": 0.31, "t4": 0.39, "v100": 0.27}


def test_every_row_is_of_a_known_device_model_and_format_and_names_its_source():
    rows = published_latencies.published()
    assert Counter(row.device for row in rows) == {"a100": 100, "l4": 100, "t4": 80, "v100": 39}
    assert {row.model for row in rows} == set(published_latencies.ENCODERS)
    assert {row.tokens for row in rows} == {128, 384}
    assert {row.precision for row in rows} == {"fp16", "int8"}
    assert {row.pattern for row in rows} == {"dense", "2:4"}
    assert all(row.source.startswith("NVIDIA/TensorRT demo/BERT/README.md @") for row in rows)


def test_larger_batches_take_longer_in_what_was_published_and_in_what_is_predicted():
    profile = profiles.load("a100")
    rows = [
        row
        for row in published_latencies.published()
        if row.device == "a100" and row.series == "bert-large fp16" and row.tokens == 384
    ]
    rows.sort(key=lambda row: row.batch)
    known = [row.mean_latency_ms for row in rows]
    predicted = [published_latencies.predict_ms(row, profile) for row in rows]
    assert len(rows) == 10
    assert known == sorted(known)
    assert predicted == sorted(predicted)


@pytest.mark.parametrize("device", LARGEST_MEAN_ERROR)
def test_mean_errors_of_a_device_are_those_that_are_stated(device):
    found = published_latencies.checks(device)
    points = sum(check.points for check in found)
    assert points == {"a100": 100, "l4": 100, "t4": 80, "v100": 39}[device]
    mean = sum(check.points * check.mean_error for check in found) / points
    assert LARGEST_MEAN_ERROR[device] - 0.04 < mean < LARGEST_MEAN_ERROR[device]
    for check in found:
        assert abs(check.bias) <= check.mean_error <= check.max_error


def test_a_check_is_the_mean_of_its_rows():
    check = next(c for c in published_latencies.checks("t4") if c.series == "bert-base int8")
    profile = profiles.load("t4")
    errors = [
        published_latencies.predict_ms(row, profile) / row.mean_latency_ms - 1
        for row in published_latencies.published()
        if (row.device, row.series) == ("t4", "bert-base int8")
    ]
    assert check.points == len(errors) == 20
    assert check.mean_error == pytest.approx(sum(abs(error) for error in errors) / 20)
    assert check.bias == pytest.approx(sum(errors) / 20)
    assert check.max_error == pytest.approx(max(abs(error) for error in errors))


def test_zeros_and_integers_make_a_prediction_faster():
    profile = profiles.load("a100")
    rows = {
        row.series: published_latencies.predict_ms(row, profile)
        for row in published_latencies.published()
        if (row.device, row.tokens, row.batch) == ("a100", 384, 128)
    }
    assert rows["bert-large int8 2:4"] < rows["bert-large int8"] < rows["bert-large fp16"]
    assert rows["bert-base fp16"] < rows["bert-large fp16"]


def test_an_encoder_counts_every_product_once():
    profile = profiles.load("a100")
    row = next(
        row
        for row in published_latencies.published()
        if (row.device, row.series, row.tokens, row.batch) == ("a100", "bert-base fp16", 384, 128)
    )
    predicted = published_latencies.predict_ms(row, profile)
    flops = 12 * 2 * 128 * 384 * (12 * 768**2 + 2 * 384 * 768)
    assert predicted > flops / (312e9 * DEFAULT.compute)
    assert predicted < 3 * flops / (312e9 * DEFAULT.compute)


def test_there_is_no_check_without_published_figures():
    assert published_latencies.checks("h100") == ()
    assert published_latencies.checks("cpu-avx2") == ()

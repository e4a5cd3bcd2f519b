import pytest

from compress import profiles
from compress.cost import device_facts, published_latencies
from compress.errors import CompressError


def test_every_profile_is_one_row_with_the_peak_of_its_baseline():
    rows = device_facts.listed()
    assert [row.name for row in rows] == profiles.names()
    a100 = next(row for row in rows if row.name == "a100")
    facts = profiles.load("a100")
    assert a100.peak_tflops == facts.peak_tflops[facts.baseline_precision]
    assert (a100.kind, a100.runtime, a100.memory_gb) == ("gpu", "tensorrt", facts.memory_gb)
    assert a100.description == facts.description


def test_costs_are_called_measured_only_where_they_are(monkeypatch):
    monkeypatch.setattr(profiles, "measured", lambda name, origin: None)
    measured = [row.name for row in device_facts.listed() if row.costs == "measured"]
    assert measured == ["cpu"]
    monkeypatch.setattr(
        profiles, "measured", lambda name, origin: {} if (name, origin) == ("t4", "tensorrt") else None
    )
    measured = [row.name for row in device_facts.listed() if row.costs == "measured"]
    assert measured == ["cpu", "t4"]
    assert device_facts.facts("t4")["measured_tables"] == ["tensorrt"]
    assert device_facts.facts("l4")["measured_tables"] == []


def test_a_device_shows_its_facts_their_sources_and_how_far_off_the_roofline_is():
    found = device_facts.facts("a100")
    checks = published_latencies.checks("a100")
    assert found["bandwidth_gb_s"] == profiles.load("a100").bandwidth_gb_s
    assert found["source"]["*"]
    for row, check in zip(found["roofline"], checks, strict=True):
        assert row["series"] == check.series
        assert row["mean_error"] == pytest.approx(check.mean_error, abs=1e-4)
        assert row["max_error"] == pytest.approx(check.max_error, abs=1e-4)
        assert row["bias"] == pytest.approx(check.bias, abs=1e-4)
    assert [row["points"] for row in found["roofline"]] == [20] * 5
    (against,) = found["roofline_against"]
    assert "NVIDIA/TensorRT demo/BERT/README.md" in against
    assert "Assumed: what lies outside the layers takes no time" in against


def test_a_device_without_published_figures_claims_no_error():
    found = device_facts.facts("rpi5")
    assert "roofline" not in found
    assert "roofline_against" not in found


def test_an_unknown_device_is_refused_with_its_neighbors():
    with pytest.raises(CompressError, match="Did you mean h100"):
        device_facts.facts("h101")

import math

import pytest
from pydantic import ValidationError

from compress import profiles
from compress.errors import CompressError

SHIPPED = [
    "a100", "cpu", "cpu-avx2", "cpu-avx512-vnni", "h100", "h200", "l4", "orin-agx", "orin-nano", "rpi5",
    "rtx4090", "t4", "v100",
]  # fmt: skip
TOML = """
kind = "gpu"
runtime = "tensorrt"
description = "test"
bandwidth_gb_s = 100.0
memory_gb = 8.0
cache_mb = 4.0
processors = 4
launch_us = 1.0
align_units = 8
precisions = ["fp16"]
baseline_precision = "fp16"
peak_tflops = {fp16 = 10.0}
source = {"*" = "nowhere"}
"""


def test_every_promised_target_ships():
    assert profiles.names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_is_complete_and_consistent(name):
    profile = profiles.load(name)
    assert profile.name == name
    assert set(profile.precisions) <= profile.peak_tflops.keys()
    assert profile.baseline_precision in profile.precisions
    assert "*" in profile.source
    named = {key.split(".")[0] for key in profile.source} - {"*"}
    assert named <= set(type(profile).model_fields)
    assert (profile.idle_w is None) == (profile.load_w is None)
    if profile.idle_w is not None:
        assert profile.idle_w < profile.load_w
    assert profile.runtime == ("tensorrt" if profile.kind == "gpu" and name != "v100" else "onnxruntime")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_sparse_peak_is_stated_exactly_where_2_4_pays_and_is_twice_the_dense_one(name):
    profile = profiles.load(name)
    sparse = {key: peak for key, peak in profile.peak_tflops.items() if key.endswith(" 2:4")}
    assert bool(sparse) == ("2:4" in profile.patterns)
    for key, peak in sparse.items():
        assert peak == pytest.approx(2 * profile.peak_tflops[key.removesuffix(" 2:4")], rel=0.01)


@pytest.mark.parametrize("name", [n for n in SHIPPED if profiles.load(n).kind == "gpu"])
def test_integer_arithmetic_of_a_gpu_is_twice_or_four_times_half_precision(name):
    peaks = profiles.load(name).peak_tflops
    if "int8" in peaks:
        assert any(math.isclose(peaks["int8"], k * peaks["fp16"], rel_tol=0.01) for k in (2, 4))
    assert peaks["fp16"] > peaks["fp32"]


def test_facts_of_the_data_sheets():
    a100, h200, t4 = profiles.load("a100"), profiles.load("h200"), profiles.load("t4")
    assert (a100.peak_tflops["fp16"], a100.peak_tflops["fp16 2:4"]) == (312, 624)
    assert (a100.bandwidth_gb_s, a100.memory_gb, a100.processors, a100.align_units) == (
        2039,
        80,
        108,
        64,
    )
    assert (h200.bandwidth_gb_s, h200.memory_gb) == (4800, 141)
    assert h200.peak_tflops == profiles.load("h100").peak_tflops
    assert t4.patterns == ("dense",)
    assert profiles.load("cpu-avx512-vnni").align_units == 2 * profiles.load("cpu-avx2").align_units


def test_this_machine_is_the_only_measured_target():
    assert [name for name in SHIPPED if profiles.load(name).measured_here] == ["cpu"]


def test_an_unknown_target_names_its_neighbors_and_all_that_exist():
    with pytest.raises(CompressError, match=r"'H1000' is not known\. Did you mean h100.*Known: a100, cpu"):
        profiles.load("H1000")
    with pytest.raises(CompressError, match=r"'zzz' is not known\. Known:"):
        profiles.load("zzz")
    with pytest.raises(CompressError, match="is not known"):
        profiles.load("../a100")


def test_a_good_text_becomes_a_frozen_profile():
    profile = profiles.parse(TOML, "mine")
    assert (profile.name, profile.idle_w, profile.patterns) == ("mine", None, ("dense",))
    with pytest.raises(ValidationError, match="frozen"):
        profile.memory_gb = 1.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory_gb", "memory_gigabytes", "memory_g"),
        ("cache_mb = 4.0", "cache_mb = 4.0\ncach_mb = 1", "'cach_mb'.*did you mean 'cache_mb'"),
        ("bandwidth_gb_s = 100.0", "bandwidth_gb_s = 0", "bandwidth_gb_s"),
        ("processors = 4", "processors = 0", "processors"),
        ("cache_mb = 4.0", "cache_mb = inf", "cache_mb"),
        ('kind = "gpu"', 'kind = "tpu"', "kind"),
        ('kind = "gpu"', "kind =", "mine: not TOML"),
    ],
)
def test_a_damaged_profile_names_the_key(old, new, message):
    with pytest.raises(CompressError, match=message):
        profiles.parse(TOML.replace(old, new, 1), "mine")


def test_measured_tables_are_found_by_device_and_origin(monkeypatch, tmp_path):
    (tmp_path / "t4.tensorrt.json").write_text('{"unit": "ms"}')
    monkeypatch.setattr(profiles.resources, "files", lambda package: tmp_path)
    assert profiles.measured("t4", "tensorrt") == {"unit": "ms"}
    assert profiles.measured("v100", "tensorrt") is None
    assert profiles.measured(f"../{tmp_path.name}/t4", "tensorrt") is None

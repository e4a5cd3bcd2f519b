import json
import math
from itertools import pairwise

import pytest
import torch
from support import oracles

from compress import profiles
from compress.core.fakequant import Quantized, blocks, grid_of
from compress.cost import latency_table
from compress.cost.latency_table import Table
from compress.cost.roofline import Constants, estimate_latency_ms, kernel_ms, kernels
from compress.errors import CompressError
from compress.formats import kernel_bytes
from compress.ir import Drop, Matmul, Option, Site
from compress.sites.kinds import decode_step
from compress.sites.kinds.kernel import Kernel

EXACT = Constants(compute=1.0, bandwidth=1.0)


def ffn(hidden=64, width=256, rows=32, **keywords):
    up = Matmul(weight="up", rows=rows, out=width, inner=hidden, out_per_unit=1, bias=True)
    down = Matmul(weight="down", rows=rows, out=hidden, inner=width, inner_per_unit=1, bias=True)
    return Site(
        name="ffn", kind="ffn", units=width, slices=(), matmuls=(up, down), writer="down",
        tokens=rows, **{"activation": "gelu", **keywords},
    )  # fmt: skip


def heads(hidden=64, count=4, width=16, tokens=32, batch=2, **keywords):
    rows = batch * tokens
    readers = tuple(
        Matmul(weight=name, rows=rows, out=count * width, inner=hidden, out_per_unit=width, bias=True)
        for name in "qkv"
    )
    out = Matmul(weight="o", rows=rows, out=hidden, inner=count * width, inner_per_unit=width, bias=True)
    return Site(
        name="heads", kind="heads", units=count, slices=(), matmuls=(*readers, out), writer="o",
        batch=batch, tokens=tokens, head_dim=width, **keywords,
    )  # fmt: skip


def table(site, row, **keywords):
    return Table(**{"fingerprint": "f", "runtime": "onnxruntime", "rows": {site.shape: row}, **keywords})


DROP = Drop(module="m", writer=True)


# The roofline


@pytest.mark.parametrize("units", [256, 100, 1])
def test_the_products_of_a_feed_forward_site_are_those_counted_by_hand(units):
    flops, moved = oracles.feed_forward_work(64, units, 32, 4)
    found = kernels(ffn(), units, 4.0, fused=True)
    assert sum(2 * k.batch * k.rows * k.out * k.inner for k in found) == flops
    assert sum(k.moved_bytes for k in found) == moved


@pytest.mark.parametrize(("units", "queries"), [(4, 1), (3, 1), (2, 3)])
def test_the_products_of_attention_are_those_counted_by_hand(units, queries):
    site = heads(queries=queries)
    found = kernels(site, units, 4.0, fused=False)
    products = [2 * k.batch * k.rows * k.out * k.inner for k in found if k.rows]
    scores = oracles.attention_flops(batch=2, heads=units * queries, tokens=32, width=16)
    projections = 4 * 2 * 64 * 64 * units * 16
    assert sum(products) == scores + projections
    fused = kernels(site, units, 4.0, fused=True)
    assert sum(2 * k.batch * k.rows * k.out * k.inner for k in fused) == scores + projections
    assert len(fused) == 5


@pytest.mark.parametrize("queries", [1, 3])
def test_a_step_looks_at_its_past_and_moves_the_cache_once(queries):
    site = decode_step(heads(queries=queries, batch=2))
    assert (site.tokens, site.past) == (1, 32)
    found = kernels(site, 4, 4.0, fused=False)
    scores = 2 * 2 * (2 * 4 * queries) * 1 * 33 * 16  # both products, over 33 tokens
    projections = 2 * 2 * sum(m.features(4)[0] * m.features(4)[1] for m in site.matmuls)
    assert sum(2 * k.batch * k.rows * k.out * k.inner for k in found) == scores + projections
    copies = [k for k in found if k.moved_bytes == 2 * (2 * 4) * 33 * 16 * 4.0 and not k.rows]
    assert len(copies) == 2
    fused = kernels(site, 4, 4.0, fused=True)
    assert sum(2 * k.batch * k.rows * k.out * k.inner for k in fused) == scores + projections
    inside = next(k for k in fused if k.rows and k.out == 33)
    assert inside.moved_bytes == 2 * (2 * 4 * queries * 16 * (1 + 33)) * 4.0
    longer = site.model_copy(update={"past": 320})
    profile = profiles.load("a100")
    assert estimate_latency_ms(longer, 4, profile) > estimate_latency_ms(site, 4, profile)


def test_separate_operators_cost_what_they_read_and_write():
    rows, hidden, width = 32, 64, 100
    plain = sum(k.moved_bytes for k in kernels(ffn(), width, 4.0, fused=False))
    fused = sum(k.moved_bytes for k in kernels(ffn(), width, 4.0, fused=True))
    biases = 2 * rows * (width + hidden) * 4
    activation = 2 * rows * width * 4
    assert plain - fused == biases + activation
    up = ffn().matmuls[0]
    gated = ffn(gated=True).model_copy(update={"matmuls": (up, *ffn().matmuls)})
    more = sum(k.moved_bytes for k in kernels(gated, width, 4.0, fused=False))
    less = sum(k.moved_bytes for k in kernels(gated, width, 4.0, fused=True))
    assert more - less == biases + 2 * rows * width * 4 + activation + 3 * rows * width * 4
    square, features = 2 * 3 * 32 * 32 * 4, 2 * 3 * 32 * 16 * 4
    apart = sum(k.moved_bytes for k in kernels(heads(), 3, 4.0, fused=False) if not k.rows)
    assert apart == 2 * (3 * square + 4 * features + 3 * 64 * 3 * 16 * 4 + 64 * 64 * 4)
    flash = kernels(heads(), 3, 4.0, fused=True)[-1]
    assert flash.moved_bytes == 4 * features


def test_in_a_lower_precision_products_read_less_and_the_rest_stays():
    rows, hidden, width = 32, 64, 256
    fp8 = Option(precision="fp8")
    plain = kernels(ffn(), width, 2.0, fused=True)
    low = kernels(ffn(), width, 2.0, fused=True, option=fp8)
    assert [k.precision for k in plain] == ["", ""]
    assert [k.precision for k in low] == ["fp8", "fp8"]
    spared = [rows * hidden + hidden * width, rows * width + hidden * width]
    assert [a.moved_bytes - b.moved_bytes for a, b in zip(plain, low, strict=True)] == spared
    apart = kernels(heads(), 4, 2.0, fused=False, option=fp8)
    rounding = [k for k in apart if k.moved_bytes == 64 * 64 * 3.0 and not k.rows]
    assert len(rounding) == 2  # what query, key and value read is rounded once, and what the output reads
    inside = [k for k in apart if k.batch > 1]
    assert len(inside) == 2
    assert {k.precision for k in inside} == {""}
    h100 = profiles.load("h100")
    large = ffn(rows=65536, hidden=8192, width=32768)
    half = estimate_latency_ms(large, 32768, h100)
    assert 1.5 < half / estimate_latency_ms(large, 32768, h100, option=fp8) < 2.001
    with pytest.raises(CompressError, match="a100 states no peak for 'fp8'"):
        estimate_latency_ms(ffn(), width, profiles.load("a100"), option=fp8)


def test_a_dropped_site_costs_nothing():
    assert estimate_latency_ms(ffn(), 0, profiles.load("a100")) == 0
    assert kernels(heads(), 0, 4.0, fused=False) == []


@pytest.mark.parametrize("name", ["a100", "t4", "cpu-avx2", "rpi5"])
@pytest.mark.parametrize("site", [ffn(), heads(), ffn(768, 3072, 4096)])
def test_the_roofline_is_never_below_either_of_its_bounds(name, site):
    profile = profiles.load(name)
    parts = kernels(site, site.units, kernel_bytes(profile.baseline_precision), fused=profile.kind == "gpu")
    flops = sum(2 * k.batch * k.rows * k.out * k.inner for k in parts)
    found = estimate_latency_ms(site, site.units, profile, constants=EXACT)
    assert found >= flops / profile.peak_tflops[profile.baseline_precision] / 1e9
    assert found >= sum(k.moved_bytes for k in parts) / profile.bandwidth_gb_s / 1e6
    assert found >= len(parts) * profile.launch_us / 1e3


def test_one_kernel_is_the_slower_of_arithmetic_and_traffic_plus_a_launch():
    profile = profiles.load("cpu-avx2").model_copy(
        update={"peak_tflops": {"fp32": 1.0}, "bandwidth_gb_s": 10.0, "launch_us": 7.0}
    )
    arithmetic = Kernel(1e3, 1, 1000, 80, 100)  # 16 Mflop at 1 Tflop/s: 16 us
    traffic = Kernel(1e6, 1, 10, 80, 100)  # 1 MB at 10 GB/s: 100 us
    assert kernel_ms(arithmetic, profile, "fp32", EXACT) == pytest.approx(0.016 + 0.007)
    assert kernel_ms(traffic, profile, "fp32", EXACT) == pytest.approx(0.100 + 0.007)
    assert kernel_ms(arithmetic, profile, "fp32", EXACT, share=0.25) == pytest.approx(0.064 + 0.007)
    slow = Constants(compute=0.5, bandwidth=0.25, launches=2.0)
    assert kernel_ms(arithmetic, profile, "fp32", slow) == pytest.approx(0.032 + 0.014)
    assert kernel_ms(traffic, profile, "fp32", slow) == pytest.approx(0.400 + 0.014)
    assert kernel_ms(Kernel(0.0), profile, "fp32", EXACT) == pytest.approx(0.007)


def test_on_a_cpu_a_width_costs_as_much_as_the_next_multiple_of_the_lanes():
    profile = profiles.load("cpu-avx2")
    times = [kernel_ms(Kernel(0.0, 1, 512, out, 512), profile, "fp32") for out in (57, 63, 64, 65)]
    assert times[0] == times[1] == times[2] < times[3]


def test_on_a_gpu_the_last_wave_costs_as_much_as_a_full_one():
    profile = profiles.load("t4")  # 40 processors

    def ms(rows):
        return kernel_ms(Kernel(0.0, 1, rows, 128, 512), profile, "fp32", EXACT)

    assert ms(40 * 256) == pytest.approx(2 * 40 * 256 * 128 * 512 / 8.1e9 + profile.launch_us / 1e3)
    assert ms(41 * 256) > 1.02 * ms(40 * 256)
    one = kernel_ms(Kernel(0.0, 1, 8, 8, 512), profile, "fp32", EXACT)
    tiny = 40 * 2 * 64 * 32 * 512 / 0.4 / 8.1e9  # the smallest tile, on one processor of forty
    assert one == pytest.approx(tiny + profile.launch_us / 1e3)


def test_unaligned_widths_are_slower_on_tensor_cores_only():
    profile = profiles.load("a100")

    def ms(out, inner, precision):
        return kernel_ms(Kernel(0.0, 1, 8192, out, inner), profile, precision) - profile.launch_us / 1e3

    for out, inner in ((1022, 1024), (1024, 1022)):
        assert ms(out, inner, "fp16") / ms(1024, inner, "fp16") >= 1.44 or inner == 1022
        assert ms(out, 1024, "fp32") == pytest.approx(ms(1024, 1024, "fp32"))
    assert ms(1024, 1020, "tf32") < ms(1024, 1024, "tf32") < ms(1024, 1018, "tf32")
    assert ms(1024, 1016, "fp16") < ms(1024, 1024, "fp16") < ms(1024, 1020, "fp16")
    assert ms(1024, 1008, "int8") < ms(1024, 1024, "int8") < ms(1024, 1016, "int8")


def test_narrow_sites_gain_less_than_their_share_and_never_lose():
    profile, site = profiles.load("a100"), ffn(768, 3072, 4096)
    dense = estimate_latency_ms(site, 3072, profile)
    times = [estimate_latency_ms(site, 64 * k, profile) for k in range(1, 49)]
    assert times == sorted(times)
    assert estimate_latency_ms(site, 64, profile) > dense * 64 / 3072 * 2
    assert estimate_latency_ms(site, 1536, profile) < 0.7 * dense


def test_threads_share_out_a_cpu_and_fused_follows_the_runtime():
    cpu, gpu, site = profiles.load("cpu-avx2"), profiles.load("a100"), ffn(768, 3072, 512)
    one, all_ = (estimate_latency_ms(site, 3072, cpu, threads=n) for n in (1, 8))
    assert 6 < one / all_ <= 8
    assert estimate_latency_ms(site, 3072, cpu) == all_ == estimate_latency_ms(site, 3072, cpu, threads=99)
    assert estimate_latency_ms(site, 3072, gpu) == estimate_latency_ms(site, 3072, gpu, "fp16", fused=True)
    assert estimate_latency_ms(site, 3072, gpu) < estimate_latency_ms(site, 3072, gpu, fused=False)
    assert estimate_latency_ms(site, 3072, gpu, threads=1) == estimate_latency_ms(site, 3072, gpu)


def test_a_precision_without_a_peak_is_refused_with_those_that_have_one():
    with pytest.raises(CompressError, match=r"t4 states no peak for 'fp8'; known: fp32, fp16, int8"):
        estimate_latency_ms(ffn(), 8, profiles.load("t4"), "fp8")


def test_the_sparse_peak_doubles_arithmetic():
    profile, site = profiles.load("a100"), ffn(4096, 16384, 16384)
    gain = estimate_latency_ms(site, 16384, profile) / estimate_latency_ms(site, 16384, profile, "fp16 2:4")
    assert 1.8 < gain <= 2.0


# Tables


def test_a_measured_level_wins_and_between_two_the_time_is_interpolated():
    site = ffn()
    found = table(site, {256: 4.0, 128: 2.5, 64: 1.0})
    assert found.latency_ms(site, 128) == 2.5
    assert found.latency_ms(site, 256) == 4.0
    assert found.latency_ms(site, 96) == pytest.approx(1.75)
    assert found.latency_ms(site, 192) == pytest.approx(3.25)
    assert found.latency_ms(site, 64) == found.latency_ms(site, 1) == 1.0
    assert found.latency_ms(site, 0) == 0
    assert found.latency_ms(site, 257) is None
    assert found.latency_ms(heads(), 1) is None
    assert found.latency_ms(heads(), 0) is None


def test_merging_touches_only_the_named_shapes():
    a, b = ffn(), heads()
    both = table(a, {256: 4.0}).merged({b.shape: {4: 1.0}, a.shape: {8: 0.5}})
    assert both.rows == {a.shape: {256: 4.0, 8: 0.5}, b.shape: {4: 1.0}}


def test_a_table_survives_json():
    found = table(ffn(), {256: 4.0, 8: 0.25}, versions={"onnxruntime": "1"}, threads=2)
    assert Table.model_validate_json(found.model_dump_json()) == found
    assert '"256":4.0' in found.model_dump_json()


def test_a_price_is_measured_where_the_table_knows_and_estimated_elsewhere():
    profile, site = profiles.load("cpu-avx2"), ffn()
    known = table(site, {256: 4.0, 64: 1.0})
    found = latency_table.price(site, Option(units=64), profile=profile, table=known, error=0.25)
    assert (found.latency_ms, found.source, found.error, found.site) == (1.0, "measured", 0.25, "ffn")
    assert found.option == Option(units=64)
    assert found.energy_mj == pytest.approx((95 - 15) / 8 * 1.0)
    assert found.weight_bytes == 64 * (64 + 1 + 64) * 4
    assert latency_table.price(site, Option(units=256), profile=profile).option.units is None
    for other in (None, table(heads(), {4: 1.0}), known.model_copy(update={"threads": 2})):
        guess = latency_table.price(site, Option(units=64), profile=profile, table=other)
        assert guess.source == "estimated"
        assert guess.latency_ms == estimate_latency_ms(site, 64, profile, threads=1)
    half = known.model_copy(update={"precision": "fp16"})
    assert latency_table.price(site, Option(units=64), profile=profile, table=half).source == "estimated"
    assert (
        latency_table.price(site, Option(units=64), profile=profiles.load("a100")).weight_bytes
        == 64 * 129 * 2
    )
    assert latency_table.price(site, Option(units=0), profile=profile).weight_bytes == 0


@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-static", "int4"])
def test_bytes_in_low_precision_are_those_of_its_codes_and_steps(precision):
    site = ffn(256, 1024, 128)
    site = site.model_copy(
        update={"matmuls": tuple(m.model_copy(update={"bias": False}) for m in site.matmuls)}
    )
    total = 0
    for matmul in site.matmuls:
        out, inner = matmul.features(64)
        steps = torch.ones(out, blocks(inner, grid_of(precision).block))
        total += Quantized(precision, torch.zeros(out, inner), steps).weight_bytes()
    assert latency_table.weight_bytes(site, Option(units=64, precision=precision), "fp32") == total


# Levels


def test_the_grid_falls_by_a_tenth_down_to_a_hundredth():
    levels = latency_table.grid(ffn(64, 1000), 1)
    assert levels[:4] == [1000, 900, 810, 729]
    assert levels[-1] == 10
    assert len(levels) == oracles.steps_of_a_tenth(1000, 10)
    assert latency_table.grid(ffn(64, 1000, drop=DROP), 1) == [*levels, 0]


@pytest.mark.parametrize("align", [8, 16, 64])
def test_widths_are_aligned_and_descend(align):
    levels = latency_table.grid(ffn(64, 1536, drop=DROP), align)
    assert levels[0] == 1536
    assert levels[-1] == 0
    assert all(level % align == 0 for level in levels)
    assert all(a > b for a, b in pairwise(levels))
    assert levels[-2] == {8: 16, 16: 16, 64: 64}[align]


def test_a_narrow_site_keeps_its_dense_level_even_when_it_is_not_aligned():
    assert latency_table.grid(ffn(64, 10), 16) == [10]
    assert latency_table.grid(ffn(64, 20), 16) == [20, 16]


def test_every_head_is_a_level():
    assert latency_table.grid(heads(drop=DROP), 64) == [4, 3, 2, 1, 0]
    assert latency_table.grid(heads()) == [4, 3, 2, 1]


def test_thinning_keeps_exactly_the_levels_that_no_wider_one_matches():
    times = {10: 5.0, 9: 5.5, 8: 4.0, 7: 4.0, 6: 4.2, 5: 3.0, 0: 0.0}
    assert (
        latency_table.drop_dominated(times) == oracles.staircase(times) == {10: 5.0, 8: 4.0, 5: 3.0, 0: 0.0}
    )
    assert list(latency_table.drop_dominated(times)) == [10, 8, 5, 0]


# The cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Stopwatch:
    def __init__(self):
        self.asked = []

    def __call__(self, missing):
        self.asked.append(missing)
        return {shape: {units: units / 10 for units in levels} for shape, levels in missing.items()}


def test_only_what_is_missing_is_measured_and_the_rest_comes_from_the_cache(cache):
    site, fresh, watch = ffn(), Table(fingerprint="f", runtime="onnxruntime", created="now"), Stopwatch()
    first = latency_table.measure_missing(fresh, {site.shape: [256, 128, 0]}, watch)
    assert watch.asked == [{site.shape: [256, 128]}]
    assert first.rows == {site.shape: {256: 25.6, 128: 12.8}}
    assert latency_table.measure_missing(fresh, {site.shape: [128, 256]}, watch) == first
    assert len(watch.asked) == 1
    more = latency_table.measure_missing(fresh, {site.shape: [256, 64]}, watch)
    assert watch.asked[1:] == [{site.shape: [64]}]
    assert more.rows[site.shape] == {256: 25.6, 128: 12.8, 64: 6.4}


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": "g"}, {"threads": 2}, {"precision": "fp16"}, {"versions": {"onnxruntime": "2"}}],
)
def test_another_machine_runtime_or_thread_count_is_measured_anew(cache, change):
    site, fresh, watch = ffn(), Table(fingerprint="f", runtime="onnxruntime"), Stopwatch()
    latency_table.measure_missing(fresh, {site.shape: [256]}, watch)
    latency_table.measure_missing(fresh.model_copy(update=change), {site.shape: [256]}, watch)
    assert len(watch.asked) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema_version": 1}'])
def test_a_damaged_cache_is_measured_again_and_mended(cache, damage):
    site, fresh, watch = ffn(), Table(fingerprint="f", runtime="onnxruntime"), Stopwatch()
    good = latency_table.measure_missing(fresh, {site.shape: [256]}, watch)
    latency_table.cache_path(fresh).write_text(damage)
    assert latency_table.measure_missing(fresh, {site.shape: [256]}, watch) == good
    assert len(watch.asked) == 2
    latency_table.measure_missing(fresh, {site.shape: [256]}, watch)
    assert len(watch.asked) == 2


@pytest.mark.parametrize("ms", [-1.0, "Infinity"])
def test_impossible_times_in_a_cache_are_not_trusted(cache, ms):
    site, fresh, watch = ffn(), Table(fingerprint="f", runtime="onnxruntime"), Stopwatch()
    latency_table.measure_missing(fresh, {site.shape: [256]}, watch)
    path = latency_table.cache_path(fresh)
    stored = json.loads(path.read_text())
    stored["value"]["rows"][site.shape]["256"] = ms
    path.write_text(json.dumps(stored))
    found = latency_table.measure_missing(fresh, {site.shape: [256]}, watch)
    assert found.rows[site.shape] == {256: 25.6}
    assert len(watch.asked) == 2


def test_a_cache_that_cannot_be_written_costs_no_result(cache):
    cache.write_text("a file where a folder should be")
    site, watch = ffn(), Stopwatch()
    found = latency_table.measure_missing(
        Table(fingerprint="f", runtime="onnxruntime"), {site.shape: [256]}, watch
    )
    assert math.isclose(found.latency_ms(site, 256), 25.6)


def test_the_cache_lies_where_the_user_said(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "mine"))
    assert latency_table.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("COMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert latency_table.cache_folder() == tmp_path / "xdg" / "compress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert latency_table.cache_folder() == tmp_path / ".cache" / "compress"
    fresh = Table(fingerprint="f", runtime="onnxruntime", threads=3)
    assert latency_table.cache_path(fresh).name == "f-onnxruntime-fp32-3t.json"

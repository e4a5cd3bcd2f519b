"""Which blocks a site is offered, and that what was timed is what is written."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from support import sites as made
from support.graphs import values

from compress import profiles
from compress.core import block
from compress.errors import CompressError
from compress.export.backends import block_layouts, ort_chains
from compress.export.backends.onnx_file import OnnxRuntimeCpu
from compress.export.backends.torch_module import TorchCuda
from compress.export.onnx import block_sparse
from compress.ir import Matmul, Site, Slice
from compress.methods import apply
from compress.pipeline import block_patterns, compilation, inspection, pricing
from compress.pipeline.block_patterns import Patterns, SitePatterns, TimedProduct

pytestmark = pytest.mark.slow

CPU = OnnxRuntimeCpu(profiles.load("cpu"), 1)
SPEEDS = {"dense": 1.0, "concat": 1.5, "gather": 1.6, "batched": 1.7, "conv": 1.8}


def site(units=3072, hidden=768, rows=32):
    up = Matmul(weight="up", rows=rows, out=units, inner=hidden, out_per_unit=1, bias=True)
    down = Matmul(weight="down", rows=rows, out=hidden, inner=units, inner_per_unit=1, bias=True)
    slices = (Slice(tensor="up", dim=0, width=1), Slice(tensor="down", dim=1, width=1))
    return Site(name="ffn", kind="ffn", units=units, slices=slices, matmuls=(up, down), writer="down")


def job(folder, *own, moves=("block",), backend=None):
    @contextlib.contextmanager
    def stages(name):
        yield lambda done, work: None

    return SimpleNamespace(
        sites=own, folder=folder, work=folder, stages=stages,
        recipe=SimpleNamespace(options=SimpleNamespace(moves=moves)),
        profile=profiles.load("cpu"),
        backend=backend or OnnxRuntimeCpu(profiles.load("cpu"), 1),
    )  # fmt: skip


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Speeds in place of measurements; the shapes that were asked for."""
    asked = []
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))

    def measured(shape, threads):
        asked.append(shape)
        tall = {64: 1.0, 128: 1.05}[shape.height]
        gains = SPEEDS | ({"gather": 2.5} if shape.inner > shape.out else {})
        others = [layout for layout in shape.contenders if layout != "dense"]
        return {"dense": 6.0} | {layout: 6.0 / (gains[layout] * tall) for layout in others}

    monkeypatch.setattr(block_layouts, "measure_layouts", measured)
    return asked


def test_every_product_is_timed_in_every_pattern_that_fits_it(timed, tmp_path):
    found = block_patterns.find_patterns(job(tmp_path, site(), site()))
    assert (
        len(timed) == len(set(timed)) == 2 * len(block_patterns.BLOCK_SHAPES) * len(block_patterns.DENSITIES)
    )
    assert {(shape.out, shape.inner) for shape in timed} == {(3072, 768), (768, 3072)}
    by_inner = {
        (one.inner, one.pattern): (one.layout, one.speedup) for one in found.sites[site().shape].products
    }
    assert by_inner[768, "block:64x32@0.5"] == ("conv", 1.8)
    assert by_inner[3072, "block:128x64@0.25"] == ("gather", pytest.approx(2.5 * 1.05))


def test_the_finest_blocks_that_are_nearly_the_fastest_are_offered(timed, tmp_path):
    found = block_patterns.find_patterns(job(tmp_path, site()))
    assert found.offered(site()) == ("block:64x32@0.5", "block:64x32@0.25")
    gains = {"block:32x32@0.5": 1.0, "block:64x32@0.5": 1.5, "block:64x64@0.5": 1.9, "block:128x32@0.5": 1.95}
    assert block_patterns.select_patterns(gains | {"block:128x64@0.5": 2.0}) == ("block:128x32@0.5",)
    assert block_patterns.select_patterns(gains | {"block:128x64@0.5": 3.0}) == ("block:128x64@0.5",)
    assert block_patterns.select_patterns({}) == ()


def test_the_gain_of_a_site_is_that_of_its_products_one_after_the_other():
    small, large = block_layouts.Shape(5, 8, 8, 4, 4, 1), block_layouts.Shape(5, 8, 24, 4, 4, 1)
    assert block_patterns._gain([(small, 4.0), (large, 1.0)]) == pytest.approx(4 / (1 / 4 + 3))


def test_what_was_timed_on_this_machine_is_not_timed_again(timed, tmp_path):
    first = block_patterns.find_patterns(job(tmp_path, site()))
    count = len(timed)
    assert block_patterns.find_patterns(job(tmp_path, site())) == first
    (tmp_path / "patterns.json").unlink()
    assert block_patterns.find_patterns(job(tmp_path, site())) == first
    assert len(timed) == count
    block_patterns.find_patterns(
        job(tmp_path, site(), site(1536))
    )  # made from other sites: only the new ones are timed
    assert {(shape.out, shape.inner) for shape in timed[count:]} == {(1536, 768), (768, 1536)}


def test_other_threads_are_other_times(timed, tmp_path):
    block_patterns.find_patterns(job(tmp_path, site()))
    count = len(timed)
    two = OnnxRuntimeCpu(profiles.load("cpu"), 2)
    block_patterns.find_patterns(job(tmp_path, site(), backend=two))
    assert timed[count:] == timed[:count]


def test_nothing_is_timed_that_nobody_asked_for_or_that_is_elsewhere(timed, tmp_path):
    gpu = TorchCuda(profiles.load("h100"), 1)
    for asked in (job(tmp_path, site(), moves=("structure", "int8")), job(tmp_path, site(), backend=gpu)):
        found = block_patterns.find_patterns(asked)
        assert found == Patterns()
        assert found.offered(site()) is None
        assert found.written(site())(768, 3072, None) == "concat"
    elsewhere = job(tmp_path, site())
    elsewhere.backend = None
    assert block_patterns.find_patterns(elsewhere) == Patterns()
    assert not timed
    assert not (tmp_path / "patterns.json").exists()


def test_a_matrix_with_rows_that_no_unit_owns_is_not_timed(timed, tmp_path):
    shared = site().model_copy(
        update={"slices": (Slice(tensor="up", dim=0, width=2), Slice(tensor="down", dim=1, width=1))}
    )
    assert block_patterns.find_patterns(job(tmp_path, shared)) == Patterns()
    assert not timed


def test_a_pattern_that_does_not_keep_what_it_says_is_not_timed():
    found = block_patterns.fitting_patterns(site(1536, 384), CPU)
    # A quarter of six blocks of 64 inputs is 1.5: two stay, a third of the weight.
    quarter = {f"block:{size}@0.25" for size in ("64x32", "128x32")}
    assert set(found) == quarter | {f"block:{size}@0.5" for size in block_patterns.BLOCK_SHAPES}
    assert block_patterns.fitting_patterns(site(40, 20), CPU) == {}
    narrower = block_patterns.fitting_patterns(site(1000, 768), CPU)["block:128x64@0.5"]
    assert [(shape.out, shape.inner) for shape in narrower] == [(1024 - 128, 768), (768, 1024 - 128)]


def test_a_form_that_would_keep_no_block_has_no_levels():
    wide = site(64, 32)
    assert apply.levels(wide, "block:32x32@0.5", [64], CPU) == [64]
    assert apply.levels(wide, "block:32x32@0.25", [64], CPU) == []
    with pytest.raises(CompressError, match="must keep at least one"):
        block.choose(torch.ones(2, 1), 0.25)


def known(own, *layouts_of):
    """What patterns.json says of a site whose products were fastest in these layouts."""
    products = tuple(
        TimedProduct(
            rows=m.rows, out=m.out, inner=m.inner, pattern="block:4x4@0.5", layout=layout, speedup=2.0
        )
        for m, layout in zip(own.matmuls, layouts_of, strict=True)
    )
    return Patterns(sites={own.shape: SitePatterns(patterns=("block:4x4@0.5",), products=products)})


def test_a_site_is_priced_in_the_layouts_that_were_found(monkeypatch):
    own, seen = made.ffn(16), []
    found = known(own, "conv", "gather")
    monkeypatch.setattr(ort_chains, "open_session", lambda file, *rest: seen.append(file))
    OnnxRuntimeCpu(profiles.load("cpu"), 1).rig(found.written).make(own, 8, 1, "block:4x4@0.5")
    OnnxRuntimeCpu(profiles.load("cpu"), 1).rig().make(own, 8, 1, "block:4x4@0.5")
    chosen, plain = ({node.op_type for node in onnx.load_from_string(file).graph.node} for file in seen)
    assert {"Conv", "Gather"} <= chosen
    assert not {"Conv", "Gather"} & plain
    assert "Split" in plain
    x = values((made.ROWS, made.HIDDEN))
    same = [ort.InferenceSession(f, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0] for f in seen]
    assert np.abs(same[0] - same[1]).max() < 1e-5


def test_the_price_and_the_file_take_the_layouts_of_the_job(monkeypatch, tmp_path):
    own = made.ffn(16)
    found, seen = known(own, "conv", "gather"), []
    here = job(tmp_path, own)
    backend = SimpleNamespace(threads=1, empty_table=lambda: ort_chains.empty_table(1), rig=seen.append)
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(
        pricing.site_timing, "measure", lambda sites, missing, **rest: {key: {} for key in missing}
    )
    pricing.latency_table_of(here, backend, {"ffn": {"block:4x4@0.5": [8]}}, found)
    monkeypatch.setattr(block_patterns, "find_patterns", lambda job: found)
    monkeypatch.setattr(compilation.model_files, "write", lambda job, model, file, lower: lower(None))
    monkeypatch.setattr(
        compilation.lower, "lower", lambda graph, sites, removals, written: seen.append(written)
    )
    compilation.export(here, None, tmp_path / "model.onnx", {})
    halves = block_sparse.random("block:4x4@0.5", 16, 8, np.random.default_rng(0))
    assert [written(own)(16, 8, halves) for written in seen] == ["conv", "conv"]


def test_a_plan_prints_what_blocks_gain(timed, tmp_path):
    found = block_patterns.find_patterns(job(tmp_path, site(), site(1536)))
    rows = [row.model_dump() for row in inspection._blocks(found)]
    assert len(rows) == 4 * len(block_patterns.BLOCK_SHAPES) * len(block_patterns.DENSITIES)
    (row,) = [r for r in rows if r["product"] == "768x3072" and r["pattern"] == "block:64x32@0.25"]
    assert row == {
        "product": "768x3072", "rows": 32, "pattern": "block:64x32@0.25", "layout": "gather",
        "speedup": 2.5, "offered": True,
    }  # fmt: skip
    assert {r["pattern"] for r in rows if r["offered"]} == {"block:64x32@0.5", "block:64x32@0.25"}


def test_what_is_stored_is_read_back_whole(timed, tmp_path):
    found = block_patterns.find_patterns(job(tmp_path, site()))
    text = (tmp_path / "patterns.json").read_text()
    assert Patterns.model_validate(json.loads(text)["value"]) == found
    broken = text.replace('"conv"', '"co')
    (tmp_path / "patterns.json").write_text(broken)
    assert block_patterns.find_patterns(job(tmp_path, site())) == found

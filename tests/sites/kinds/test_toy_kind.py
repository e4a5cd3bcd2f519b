"""A new kind of site is one module and one line: a whole compilation finds, prices and prunes it."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from support.capsules import GROUPS, SIZE, task
from support.toy_kind import CAPSULES

from compress.export.backends import ort_chains
from compress.export.microbench import onnx_chain, torch_chain
from compress.ir import Budget
from compress.pipeline import compilation
from compress.recipe import Bench, Calibration, Recipe, Search
from compress.report import charts, schema
from compress.report.progress import Quiet
from compress.sites import discovery, prune
from compress.sites.kinds import KINDS


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(KINDS, "capsules", CAPSULES)


def found():
    own = task()
    return own.model, own.example(2, 6), discovery.find_sites(own.model, own.example(2, 6)).sites


def test_without_the_line_the_blocks_are_no_sites():
    assert [site.kind for site in found()[2]] == ["ffn"]


def test_with_the_line_they_are_found_and_the_attribute_that_follows_too(known):
    sites = found()[2]
    assert [site.kind for site in sites] == ["capsules", "ffn", "capsules"]
    first = sites[0]
    assert (first.units, first.column.width) == (GROUPS, SIZE)
    assert [(count.attribute, count.per_unit) for count in first.counts] == [("groups", 1)]


def test_a_document_with_a_kind_that_is_not_known_is_refused(known, monkeypatch):
    text = discovery.Sites(sites=found()[2]).model_dump_json()
    assert len(discovery.Sites.model_validate_json(text).sites) == 3
    monkeypatch.delitem(KINDS, "capsules")
    with pytest.raises(ValidationError, match="no kind of site 'capsules'; known: heads, ffn"):
        discovery.Sites.model_validate_json(text)


@pytest.mark.parametrize("kept", [[0], [1, 4, 5, 11], list(range(GROUPS))])
def test_the_shrunk_model_computes_what_the_masked_one_does(known, kept):
    model, example, sites = found()
    removals = {site.name: prune.Removal(torch.tensor(kept)) for site in sites if site.kind == "capsules"}
    with torch.no_grad():
        masked = prune.mask(model, sites, removals)(**example)
        shrunk = prune.shrink(model, sites, removals)
        assert torch.allclose(shrunk(**example), masked, atol=1e-5)
        assert torch.equal(masked, model(**example)) == (len(kept) == GROUPS)
    assert shrunk.blocks[0].groups == len(kept)


def test_it_is_timed_as_an_onnx_file_and_as_a_module(known):
    site = found()[2][0]
    answer = ort_chains.open_session(onnx_chain.chain(site, 6, 2), site, 1)()[0]
    x, mask = torch_chain.inputs(site, 6)
    assert mask is None
    chain = torch_chain.Chain(site, 6, 2)
    assert answer.shape == tuple(chain(x).shape) == tuple(x.shape)
    assert chain.bodies[0].products[0].out_features == 6 * SIZE


def test_a_whole_compilation_finds_prices_prunes_and_reports_it(known, tmp_path):
    dense = sum(value.numel() for value in task().model.parameters()) * 4e-6
    recipe = Recipe(
        model="support.capsules:task", target="cpu", budget=Budget(size_mb=0.75 * dense),
        out=str(tmp_path / "out"), calibration=Calibration(samples=64),
        search=Search(samples=32, generations=2), bench=Bench(blocks=30, block_ms=1.0),
    )  # fmt: skip
    report = compilation.run(recipe, Quiet())
    own = [site for site in report.sites if site.kind == "capsules"]
    assert len(own) == 2
    assert all(site.source == "measured" and site.dense_latency_ms > 0 for site in own)
    assert any(site.option.units < site.option.units_total == GROUPS for site in own)
    assert all((GROUPS - site.option.units) % 2 == 0 or not site.option.units for site in own)
    assert report.compressed.weight_bytes < 0.75 * report.baseline.weight_bytes
    assert report.parity.max_abs_difference <= report.parity.tolerance
    assert "sites-capsules" in charts.draw(report)
    assert "capsules" in {step.name for step in report.waterfall}
    assert schema.read(Path(recipe.out)) == report
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["compression"]["sites"]
    assert "capsules" in {kept["site"]["kind"] for kept in saved}

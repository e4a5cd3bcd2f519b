"""A new move is one module and one line: a whole compilation offers, chooses, solves and writes it."""

import onnx
import pytest
import torch
from support.classifier import wider
from support.toy_move import FACTS, FORMAT, GroupedLinear

from compress import formats
from compress.errors import CompressError
from compress.ir import Budget, Option
from compress.methods import apply, quantized_layers
from compress.pipeline import compilation
from compress.pipeline.job import prepare
from compress.recipe import Bench, Calibration, Options, Recipe, Search, read
from compress.report.progress import Quiet


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(formats.MOVES, "grouped", FACTS)


def recipe(out, megabytes):
    return Recipe(
        model="support.classifier:wider", target="cpu", budget=Budget(size_mb=megabytes), out=str(out),
        options=Options(moves=("grouped",)), calibration=Calibration(samples=32, batch=16),
        search=Search(samples=32, generations=2), bench=Bench(blocks=30, block_ms=1.0),
    )  # fmt: skip


def test_without_the_line_there_is_no_such_move():
    with pytest.raises(CompressError, match=r"cannot be 'grouped'.* Known: .*structure"):
        read(None, {"target": "cpu", "budget": {"size_mb": 1}, "options": {"moves": ["grouped"]}})


def test_with_the_line_its_format_is_an_option_of_every_site(known, tmp_path):
    job = prepare(recipe(tmp_path, 1.0), Quiet())
    assert {apply.offered_forms(site, ("grouped",), job.runtime) for site in job.sites} == {(FORMAT.name,)}
    assert Option.of(FORMAT.name, 3).number_format == FORMAT


def test_its_layer_computes_what_its_codes_stand_for(known):
    layer = torch.nn.Linear(40, 24)
    second = torch.eye(40, dtype=torch.float64)
    place, error = quantized_layers.round_linear(layer, FORMAT.name, second, torch.zeros(40).double())
    assert 0 < error < 1e-4
    model = torch.nn.Sequential(layer)
    x = torch.randn(5, 40)
    plain = layer(x)
    quantized_layers.insert(model, {"0.weight": place})
    assert isinstance(model[0], GroupedLinear)
    expected = torch.nn.functional.linear(x, place.quantized.weight(), place.bias)
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert not torch.equal(model(x), plain)


def test_a_whole_compilation_offers_chooses_solves_and_writes_it(known, tmp_path):
    dense_mb = sum(value.numel() for value in wider().model.parameters()) * 4e-6
    report = compilation.run(recipe(tmp_path / "out", 0.55 * dense_mb), Quiet())
    chosen = {site.option.precision for site in report.sites}
    assert FORMAT.name in chosen
    assert report.compressed.weight_bytes < 0.55 * report.baseline.weight_bytes
    assert report.parity.max_abs_difference <= report.parity.tolerance
    file = onnx.load(tmp_path / "out" / "model.onnx")
    assert "DequantizeLinear" in {node.op_type for node in file.graph.node}
    codes = [tensor for tensor in file.graph.initializer if tensor.name.endswith("_codes")]
    assert codes
    assert all(tensor.data_type == onnx.TensorProto.INT8 for tensor in codes)
    assert report.warnings is not None

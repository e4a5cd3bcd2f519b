import pytest
import torch
from onnx import load
from support.classifier import padded

from compress import profiles
from compress.calibration import activation_statistics
from compress.core.fakequant import grid_of
from compress.errors import CompressError
from compress.export.backends import onnxruntime
from compress.export.backends.onnx_file import OnnxFile, OnnxRuntimeCpu
from compress.export.onnx import writer
from compress.ir import Option
from compress.methods import apply, candidate_store, quantized_layers
from compress.methods import lower as in_files
from compress.search.objective import ModelObjective, compute_logits, mean_divergence
from compress.sites import prune

HALF = "block:4x4@0.5"
INTEGERS = ("int8-dynamic", "int8-static", "int4")
HERE = OnnxRuntimeCpu(profiles.load("cpu"), 1)
A100 = OnnxFile(profiles.load("a100"))


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    task, sites = padded()
    activation_statistics.collect(task, sites, list(task.batches("calibration", 16)), folder, spans=True)
    return folder


def uncut(task, site):
    weight = prune.writer_columns(task.model, site).clone()
    return prune.Removal(
        torch.arange(site.units), weight, task.model.get_parameter(site.bias).detach().clone()
    )


def treated(statistics, index, form):
    task, sites = padded()
    site = sites[index]
    found = activation_statistics.read(statistics, index)
    return apply.apply_option(task.model, site, Option.of(form, None), uncut(task, site), found, 1e-2)


def test_structure_offers_no_form_and_a_device_none_that_it_cannot_run():
    _, sites = padded()
    assert apply.offered_forms(sites[0], ["structure"], HERE) == ()
    assert set(apply.offered_forms(sites[0], ["structure", "block"], HERE)) == set(HERE.block_patterns)
    assert apply.offered_forms(sites[0], ["block", "int8"], A100) == ()
    assert apply.offered_forms(sites[0], ["2:4"], A100) == ("2:4",)
    assert apply.offered_forms(sites[0], ["int8", "int8-static", "int4"], HERE) == INTEGERS
    assert apply.offered_forms(sites[0], ["int8-static", "int4"], A100) == ()


def test_levels_lie_where_blocks_fit_near_what_structure_offers():
    _, sites = padded()
    ffn = next(site for site in sites if site.kind == "ffn")
    found = apply.levels(ffn, HALF, [ffn.units, ffn.units - 3, 5, 1, 0], HERE)
    assert found == sorted(set(found), reverse=True)
    assert all(units > 0 and units % 4 == 0 for units in found)
    assert apply.levels(ffn, "block:1000x1000@0.5", [ffn.units], HERE) == []
    assert len(apply.levels(ffn, "block:1x1@0.5", range(ffn.units, 0, -1), HERE)) == apply.MAX_LEVELS


@pytest.mark.parametrize("index", [0, 1])
def test_blocks_leave_that_share_of_every_matrix(statistics, index):
    _, sites = padded()
    found, error = treated(statistics, index, HALF)
    assert 0 < error < 1
    assert found.form == HALF
    assert set(found.readers) == set(prune.readers(sites[index]))
    for value in (found.weight, *found.readers.values()):
        tiles = value.reshape(value.shape[0] // 4, 4, value.shape[1] // 4, 4)
        kept = tiles.abs().sum((1, 3)) > 0
        assert ((kept.sum(1) - kept.shape[1] / 2).abs() <= 0.5).all()


def test_two_of_four_stay_in_every_row(statistics):
    found, error = treated(statistics, 0, "2:4")
    assert 0 < error < 1
    for value in (found.weight, *found.readers.values()):
        groups = (value != 0).reshape(value.shape[0], -1, 4).sum(2)
        assert (groups == 2).all()


def test_a_rank_is_stored_as_its_factors(statistics):
    _, sites = padded()
    found, error = treated(statistics, 1, "rank:4")
    assert 0 < error < 1
    for name, value in {sites[1].writer: found.weight, **found.readers}.items():
        left, right = found.factors[name]
        assert (left.shape[1], right.shape[0]) == (4, 4)
        assert torch.allclose(left @ right, value, atol=1e-5)
    _, lossless = treated(statistics, 1, f"rank:{min(found.weight.shape)}")
    assert lossless < error
    assert lossless == pytest.approx(0, abs=1e-9)


def test_integers_stand_for_the_weights_that_are_judged(statistics):
    found, error = treated(statistics, 1, "int8-dynamic")
    assert 0 < error < 0.01
    assert torch.allclose(found.codes[padded()[1][1].writer].weight(), found.weight, atol=1e-6)
    assert treated(statistics, 1, "int4")[1] > 10 * error


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        *((form, "concat") for form in (HALF, "rank:4", "int8-dynamic")),
        ("block:4x4@0.5+rank:2", "gather"),
        # Each is an export more; products in these forms are compared one by one in test_quantized,
        # test_linear_lowering and test_torch_layers.
        *(pytest.param(form, "concat", marks=pytest.mark.slow) for form in ("int8-static", "int4", "2:4")),
        pytest.param("block:4x4@0.5+rank:2", "concat", marks=pytest.mark.slow),
        pytest.param(HALF, "conv", marks=pytest.mark.slow),
    ],
)
def test_the_file_of_a_form_computes_what_is_judged(statistics, tmp_path, form, layout):
    """One path for all: candidates, the shrunk model (integers emulated), the rewritten file."""
    task, sites = padded()
    half = {site.name: (apply.levels(site, form, [site.units // 2], HERE) or [None])[0] for site in sites}
    options = {name: [Option.of(form, units)] for name, units in half.items()}
    candidate_store.build(task.model, sites, statistics, options, tmp_path)
    removals = {
        site.name: candidate_store.removal(tmp_path, index, options[site.name][0])
        for index, site in enumerate(sites)
    }
    shrunk = prune.shrink(task.model, sites, removals)
    reference = quantized_layers.emulated(shrunk, sites, removals)
    file = tmp_path / "model.onnx"
    example = next(iter(task.batches("calibration", 8))).inputs
    writer.export(
        shrunk,
        example,
        file,
        outputs=("logits",),
        lower=lambda graph: in_files.lower(graph, sites, removals, lambda site: lambda *product: layout),
    )
    batches = list(task.batches("calibration", 16))
    menus = [(Option(), options[site.name][0]) for site in sites]
    judged = ModelObjective(task, sites, tmp_path, menus, batches)((1,) * len(sites))
    dense = compute_logits(task, task.model, batches)
    assert judged == pytest.approx(mean_divergence(task, reference, batches, dense), rel=1e-3)
    with onnxruntime.OrtRunner(file, threads=1) as runner, torch.no_grad():
        for batch in batches:
            found = runner.infer({name: value.numpy() for name, value in batch.inputs.items()})["logits"]
            assert torch.allclose(
                torch.from_numpy(found), reference(**batch.inputs).logits, atol=1e-4, rtol=1e-4
            )
    operators = {node.op_type for node in load(file).graph.node}
    assert ("Conv" in operators) == (layout == "conv")
    for precision, operator in (
        ("int8-dynamic", "MatMulInteger"), ("int8-static", "QuantizeLinear"), ("int4", "MatMulNBits"),
    ):  # fmt: skip
        assert (operator in operators) == (form == precision)


def test_static_integers_are_the_dynamic_ones_for_inputs_in_the_range_of_what_is_kept(statistics):
    assert grid_of("int8-static") == grid_of("int8-dynamic")
    for index, site in enumerate(padded()[1]):
        found, error = treated(statistics, index, "int8-static")
        twin, same = treated(statistics, index, "int8-dynamic")
        assert (found.form, error) == ("int8-static", same)
        seen = activation_statistics.read(statistics, index)
        for name, one in found.codes.items():
            assert torch.equal(one.codes, twin.codes[name].codes)
            low, high = seen.range.span if name == site.writer else seen.reader_span
            assert one.input_step == pytest.approx((high - low) / 255, rel=1e-6)
            assert one.input_zero == round(-low / one.input_step)
        few = prune.Removal(
            torch.arange(1), found.weight[:, : site.column.width], found.bias, found.readers, "int8-dynamic",
            codes=twin.codes,
        )  # fmt: skip
        width = site.column.width
        fixed = Option(precision="int8-static")
        narrow = apply.from_twin(site, fixed, few, seen).codes[site.writer]
        most = max(0.0, min(seen.range.span[1], float(seen.range.high[:width].max())))
        assert narrow.input_step * (255 - narrow.input_zero) == pytest.approx(most, abs=narrow.input_step)


def test_static_integers_without_ranges_are_refused(tmp_path):
    task, sites = padded()
    activation_statistics.collect(task, sites, list(task.batches("calibration", 48)), tmp_path, readers=True)
    with pytest.raises(CompressError, match="no ranges of its inputs; calibrate with spans"):
        treated(tmp_path, 0, "int8-static")


def test_static_candidates_built_beside_dynamic_ones_are_those_built_alone(statistics, tmp_path):
    task, sites = padded()
    static, dynamic = (Option(units=2, precision=name) for name in ("int8-static", "int8-dynamic"))
    for folder, options in (("both", [dynamic, static]), ("alone", [static])):
        candidate_store.build(task.model, sites[:1], statistics, {sites[0].name: options}, tmp_path / folder)
    first, second = (candidate_store.removal(tmp_path / folder, 0, static) for folder in ("both", "alone"))
    assert first.form == second.form == "int8-static"
    assert torch.equal(first.weight, second.weight)
    for name, one in first.codes.items():
        other = second.codes[name]
        assert torch.equal(one.codes, other.codes)
        assert (one.input_step, one.input_zero) == (other.input_step, other.input_zero)


def test_all_blocks_kept_change_nothing(statistics):
    task, sites = padded()
    found, error = treated(statistics, 1, "block:4x4@1.0")
    assert error == pytest.approx(0, abs=1e-12)
    assert torch.allclose(found.weight, prune.writer_columns(task.model, sites[1]), atol=1e-5)
    for name, value in found.readers.items():
        assert torch.allclose(value, task.model.get_parameter(name), atol=1e-5)


def test_fewer_blocks_lose_more(statistics):
    errors = [treated(statistics, 1, f"block:4x4@{density}")[1] for density in (0.75, 0.5, 0.25)]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]


def test_without_statistics_of_the_readers_it_is_refused(tmp_path):
    task, sites = padded()
    activation_statistics.collect(task, sites, list(task.batches("calibration", 48)), tmp_path)
    with pytest.raises(CompressError, match="no statistics of its readers"):
        apply.apply_option(
            task.model,
            sites[0],
            Option.of(HALF, None),
            uncut(task, sites[0]),
            activation_statistics.read(tmp_path, 0),
            1e-2,
        )


def test_stored_candidates_of_a_form_are_judged_and_shrunk_alike(statistics, tmp_path):
    task, sites = padded()
    half = {site.name: apply.levels(site, HALF, [site.units // 2], HERE)[0] for site in sites}
    options = {
        name: [Option(units=units), Option.of(HALF, None), Option.of(HALF, units)]
        for name, units in half.items()
    }
    errors = candidate_store.build(task.model, sites, statistics, options, tmp_path)
    for site in sites:
        plain, formed, both = (errors[site.name][option.key] for option in options[site.name])
        assert both > plain
        assert both > formed * 0.5
    batches = list(task.batches("calibration", 16))
    menus = [(Option(), *options[site.name]) for site in sites]
    judge = ModelObjective(task, sites, tmp_path, menus, batches)
    removals = {
        site.name: candidate_store.removal(tmp_path, index, options[site.name][2])
        for index, site in enumerate(sites)
    }
    dense = compute_logits(task, task.model, batches)
    shrunk = prune.shrink(task.model, sites, removals)
    assert judge((3,) * len(sites)) == pytest.approx(mean_divergence(task, shrunk, batches, dense), rel=1e-4)
    assert judge((0,) * len(sites)) == pytest.approx(0, abs=1e-6)
    assert judge((1,) * len(sites)) < judge((3,) * len(sites))

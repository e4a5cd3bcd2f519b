import pytest
import torch
from support.classifier import Padded, padded

from compress.calibration import activation_statistics
from compress.calibration.activation_statistics import collect, read
from compress.core import fakequant, ranges
from compress.errors import CompressError
from compress.tasks.loading import Batch


def inputs_of(task, site, batches):
    """The writer's input rows at real tokens, float64, gathered with a hook of the test's own."""
    rows = []
    module = task.model.get_submodule(site.writer.rpartition(".")[0])
    for batch in batches:
        handle = module.register_forward_pre_hook(
            lambda _, a, real=batch.real: rows.extend(a[0][i, j].double() for i, j in real.nonzero().tolist())
        )
        with torch.no_grad():
            task.model(**batch.inputs)
        handle.remove()
    return torch.stack(rows)


def test_moments_equal_one_big_product_over_real_tokens(tmp_path):
    task, sites = padded()
    batches = list(task.batches("calibration", 16))
    collect(task, sites, batches, tmp_path)
    for index, site in enumerate(sites):
        rows = inputs_of(task, site, batches)
        found = read(tmp_path, index)
        assert found.count == len(rows) == int(task.real.sum())
        assert torch.allclose(found.mean, rows.mean(0), atol=1e-6)
        assert torch.allclose(found.second, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_how_the_data_is_split_and_padded_changes_nothing(tmp_path):
    task, sites = padded()
    collect(task, sites, list(task.batches("calibration", 48)), tmp_path / "one")
    collect(task, sites, list(task.batches("calibration", 5)), tmp_path / "many")
    wider = []
    for batch in task.batches("calibration", 16):
        more = {name: torch.nn.functional.pad(t, (0, 4)) for name, t in batch.inputs.items()}
        wider.append(Batch(more, batch.labels, torch.nn.functional.pad(batch.real, (0, 4))))
    collect(task, sites, wider, tmp_path / "wide")
    for index in range(len(sites)):
        one = read(tmp_path / "one", index)
        for other in (read(tmp_path / "many", index), read(tmp_path / "wide", index)):
            assert other.count == one.count
            assert torch.allclose(other.second, one.second, rtol=1e-5, atol=1e-6)


def test_ranges_are_those_of_all_real_values_and_each_column_knows_its_ends(tmp_path):
    task, sites = padded()
    batches = list(task.batches("calibration", 16))
    collect(task, sites, batches, tmp_path, readers=True)  # what lacks ranges is collected again
    collect(task, sites, batches, tmp_path, spans=True)
    for index, site in enumerate(sites):
        rows = inputs_of(task, site, batches).float()
        found = read(tmp_path, index)
        assert torch.equal(found.range.low, rows.amin(0))
        assert torch.equal(found.range.high, rows.amax(0))
        read_by = inputs_of(
            task, site.model_copy(update={"writer": activation_statistics.reader(site)}), batches
        ).float()
        for seen, span in ((rows, found.range.span), (read_by, found.reader_span)):
            step, zero = fakequant.affine(*map(torch.tensor, span))
            lost = (fakequant.input_codes(seen, step, zero) * step - seen).square().mean()
            low, high = torch.aminmax(seen)
            step, zero = fakequant.affine(low, high)
            whole = (fakequant.input_codes(seen, step, zero) * step - seen).square().mean()
            assert float(low) - 1e-6 <= span[0] <= 0 <= span[1] <= float(high) + 1e-6
            assert lost <= 1.05 * whole
    with_padding = [Batch(batch.inputs, batch.labels, None) for batch in batches]
    collect(task, sites, with_padding, tmp_path / "blind", spans=True)
    blind = [read(tmp_path / "blind", index).range.low for index in range(len(sites))]
    assert any(not torch.equal(low, read(tmp_path, index).range.low) for index, low in enumerate(blind))


def test_a_range_of_some_columns_is_no_wider_than_they_are():
    found = ranges.Range((-2.0, 3.0), torch.tensor([0.5, -9.0, -0.5]), torch.tensor([1.0, 9.0, 2.0]))
    assert found.of(torch.tensor([0])) == (0.0, 1.0)
    assert found.of(torch.tensor([0, 2])) == (-0.5, 2.0)
    assert found.of(torch.tensor([0, 1, 2])) == (-2.0, 3.0)


def test_counting_padding_would_be_noticed(tmp_path):
    task, sites = padded()
    batches = list(task.batches("calibration", 16))
    collect(task, sites, batches, tmp_path / "real")
    blind = [Batch(batch.inputs, batch.labels, None) for batch in batches]
    collect(task, sites, blind, tmp_path / "blind")
    assert read(tmp_path / "blind", 1).count > read(tmp_path / "real", 1).count
    gap = read(tmp_path / "blind", 1).mean - read(tmp_path / "real", 1).mean
    assert float(gap.abs().max()) > 1e-3


def test_little_memory_means_several_passes_and_the_same_moments(tmp_path):
    task, sites = padded()
    batches = list(task.batches("calibration", 16))
    seen = []
    collect(task, sites, batches, tmp_path / "one", memory_mb=64)
    collect(task, sites, batches, tmp_path / "many", memory_mb=0, progress=lambda d, t: seen.append((d, t)))
    assert seen[-1] == (len(batches) * len(sites), len(batches) * len(sites))
    for index in range(len(sites)):
        assert torch.equal(read(tmp_path / "one", index).second, read(tmp_path / "many", index).second)


def test_whole_files_are_kept_and_damaged_ones_built_again(tmp_path):
    task, sites = padded()
    batches = list(task.batches("calibration", 16))
    collect(task, sites, batches, tmp_path)
    good = (tmp_path / "001.safetensors").read_bytes()
    untouched = (tmp_path / "000.safetensors").stat().st_mtime_ns
    (tmp_path / "001.safetensors").write_bytes(good[: len(good) // 2])
    with pytest.raises(CompressError, match="missing or damaged"):
        read(tmp_path, 1)
    collect(task, sites, batches, tmp_path)
    assert (tmp_path / "001.safetensors").read_bytes() == good
    assert (tmp_path / "000.safetensors").stat().st_mtime_ns == untouched


def test_first_order_scores_equal_the_change_when_an_input_is_scaled_away(tmp_path):
    task, sites = padded()
    batch = next(task.batches("calibration", 1))
    collect(task, sites, [batch], tmp_path, taylor=True)
    site = sites[1]
    module = task.model.get_submodule(site.writer.rpartition(".")[0])
    step = 0.02

    def loss(column, scale):
        def hook(_, arguments):
            changed = arguments[0].clone()
            changed[..., column] *= 1 + scale
            return (changed,)

        handle = module.register_forward_pre_hook(hook)
        with torch.no_grad():
            value = float(task.loss(task.logits(task.model(**batch.inputs)), batch))
        handle.remove()
        return value

    found = read(tmp_path, 1).taylor
    for column in found.topk(4).indices.tolist():
        slope = (loss(column, step) - loss(column, -step)) / (2 * step)
        assert float(found[column]) == pytest.approx(slope**2, rel=0.05)


def test_activations_that_are_not_numbers_name_their_site(tmp_path):
    task = Padded()
    _, sites = padded()
    with torch.no_grad():
        task.model.bert.encoder.layer[1].intermediate.dense.bias[3] = float("nan")
    with pytest.raises(CompressError, match=r"layer\.1.*NaN"):
        collect(task, sites, list(task.batches("calibration", 16)), tmp_path)
    assert not any(task.model.get_submodule(s.writer.rpartition(".")[0])._forward_pre_hooks for s in sites)
    with pytest.raises(CompressError, match="no calibration data"):
        collect(task, sites, [], tmp_path)

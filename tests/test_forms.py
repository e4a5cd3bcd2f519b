import pytest
import torch
from classifier import padded

from compress import calibrate, database, forms, profiles, surgery
from compress.errors import CompressError
from compress.ir import Option
from compress.stitch import Stitched, divergence, logits

HALF = "block:4x4@0.5"
HERE = profiles.load("cpu")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    task, sites = padded()
    calibrate.collect(task, sites, list(task.batches("calibration", 16)), folder, readers=True)
    return folder


def uncut(task, site):
    weight = surgery.writer_columns(task.model, site).clone()
    return surgery.Removal(
        torch.arange(site.units), weight, task.model.get_parameter(site.bias).detach().clone()
    )


def treated(statistics, index, form):
    task, sites = padded()
    site = sites[index]
    found = calibrate.read(statistics, index)
    return forms.treat(task.model, site, Option.of(form, None), uncut(task, site), found, 1e-2)


def test_structure_offers_no_form_and_a_device_none_that_it_cannot_run():
    _, sites = padded()
    assert forms.of(sites[0], ["structure"], HERE) == ()
    assert set(forms.of(sites[0], ["structure", "block"], HERE)) == set(forms.BLOCKS)
    assert forms.of(sites[0], ["block"], profiles.load("a100")) == ()


def test_levels_lie_where_blocks_fit_near_what_structure_offers():
    _, sites = padded()
    ffn = next(site for site in sites if site.kind == "ffn")
    found = forms.levels(ffn, HALF, [ffn.units, ffn.units - 3, 5, 1, 0])
    assert found == sorted(set(found), reverse=True)
    assert all(units > 0 and units % 4 == 0 for units in found)
    assert forms.levels(ffn, "block:1000x1000@0.5", [ffn.units]) == []
    assert len(forms.levels(ffn, "block:1x1@0.5", range(ffn.units, 0, -1))) == forms.LEVELS


@pytest.mark.parametrize("index", [0, 1])
def test_blocks_leave_that_share_of_every_matrix(statistics, index):
    _, sites = padded()
    found, error = treated(statistics, index, HALF)
    assert 0 < error < 1
    assert found.form == HALF
    assert set(found.readers) == set(surgery.readers(sites[index]))
    for value in (found.weight, *found.readers.values()):
        tiles = value.reshape(value.shape[0] // 4, 4, value.shape[1] // 4, 4)
        kept = tiles.abs().sum((1, 3)) > 0
        assert ((kept.sum(1) - kept.shape[1] / 2).abs() <= 0.5).all()


def test_all_blocks_kept_change_nothing(statistics):
    task, sites = padded()
    found, error = treated(statistics, 1, "block:4x4@1.0")
    assert error == pytest.approx(0, abs=1e-12)
    assert torch.allclose(found.weight, surgery.writer_columns(task.model, sites[1]), atol=1e-5)
    for name, value in found.readers.items():
        assert torch.allclose(value, task.model.get_parameter(name), atol=1e-5)


def test_fewer_blocks_lose_more(statistics):
    errors = [treated(statistics, 1, f"block:4x4@{density}")[1] for density in (0.75, 0.5, 0.25)]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]


def test_without_statistics_of_the_readers_it_is_refused(tmp_path):
    task, sites = padded()
    calibrate.collect(task, sites, list(task.batches("calibration", 48)), tmp_path)
    with pytest.raises(CompressError, match="no statistics of its readers"):
        forms.treat(
            task.model,
            sites[0],
            Option.of(HALF, None),
            uncut(task, sites[0]),
            calibrate.read(tmp_path, 0),
            1e-2,
        )


def test_stored_candidates_of_a_form_are_judged_and_shrunk_alike(statistics, tmp_path):
    task, sites = padded()
    half = {site.name: forms.levels(site, HALF, [site.units // 2])[0] for site in sites}
    options = {
        name: [Option(units=units), Option.of(HALF, None), Option.of(HALF, units)]
        for name, units in half.items()
    }
    errors = database.build(task.model, sites, statistics, options, tmp_path)
    for site in sites:
        plain, formed, both = (errors[site.name][option.key] for option in options[site.name])
        assert both > plain
        assert both > formed * 0.5
    batches = list(task.batches("calibration", 16))
    menus = [(Option(), *options[site.name]) for site in sites]
    judge = Stitched(task, sites, tmp_path, menus, batches)
    removals = {
        site.name: database.removal(tmp_path, index, options[site.name][2])
        for index, site in enumerate(sites)
    }
    dense = logits(task, task.model, batches)
    shrunk = surgery.shrink(task.model, sites, removals)
    assert judge((3,) * len(sites)) == pytest.approx(divergence(task, shrunk, batches, dense), rel=1e-4)
    assert judge((0,) * len(sites)) == pytest.approx(0, abs=1e-6)
    assert judge((1,) * len(sites)) < judge((3,) * len(sites))

import pytest
import torch
from classifier import padded

from compress import calibrate, database, surgery
from compress.ir import Option
from compress.refit import refit
from compress.stitch import Stitched, divergence, logits


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Candidates and the removals that keep half of every site."""
    folder = tmp_path_factory.mktemp("half")
    task, sites = padded()
    batches = list(task.batches("calibration", 16))
    calibrate.collect(task, sites, batches, folder / "s")
    options = {site.name: [Option(units=u) for u in (site.units // 2, 1, 0)] for site in sites}
    database.build(task.model, sites, folder / "s", options, folder / "c")
    removals = {
        site.name: database.removal(folder / "c", index, Option(units=site.units // 2))
        for index, site in enumerate(sites)
    }
    return folder, batches, removals


def test_the_stitched_model_is_the_masked_model_whatever_came_before(half):
    folder, batches, removals = half
    task, sites = padded()
    menus = [tuple(Option(units=u) for u in (None, site.units // 2, 0)) for site in sites]
    judge = Stitched(task, sites, folder / "c", menus, batches)
    dense = logits(task, task.model, batches)
    everything = divergence(task, surgery.mask(task.model, sites, removals), batches, dense)
    first = judge((1,) * len(sites))
    assert first == pytest.approx(everything, rel=1e-5)
    assert judge((0,) * len(sites)) == pytest.approx(0, abs=1e-6)
    alone = judge((0, 1, *(0,) * (len(sites) - 2)))
    one = surgery.mask(task.model, sites, {sites[1].name: removals[sites[1].name]})
    assert alone == pytest.approx(divergence(task, one, batches, dense), rel=1e-5)
    assert 0 < alone < first
    assert judge((2,) * len(sites)) > first
    assert judge((1,) * len(sites)) == first


def test_judging_leaves_the_dense_model_alone(half):
    folder, batches, _ = half
    task, sites = padded()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    judge = Stitched(task, sites, folder / "c", [(Option(), Option(units=1))] * len(sites), batches)
    judge((1,) * len(sites))
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_divergence_weighs_batches_by_their_size(half):
    _, _, removals = half
    task, sites = padded()
    masked = surgery.mask(task.model, sites, removals)
    found = []
    for size in (48, 20):
        batches = list(task.batches("calibration", size))
        found.append(divergence(task, masked, batches, logits(task, task.model, batches)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_each_writer_is_the_least_squares_solution_on_the_inputs_it_will_see(half):
    _, batches, removals = half
    task, sites = padded()
    better = refit(task.model, sites, removals, batches, damping=1e-9)
    last = sites[-1]
    module = last.writer.rpartition(".")[0]
    prefix = surgery.mask(task.model, sites, {s.name: better[s.name] for s in sites[:-1]})
    xs, ys = [], []
    for batch in batches:
        for model, store, take in ((prefix, xs, 0), (task.model, ys, 1)):
            hook = model.get_submodule(module).register_forward_hook(
                lambda _, a, y, s=store, t=take, r=batch.real: s.append((a[0] if t == 0 else y)[r].double())
            )
            with torch.no_grad():
                model(**batch.inputs)
            hook.remove()
    kept = better[last.name].kept
    x = torch.cat(xs)[:, kept]
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, torch.cat(ys)).solution.T
    assert torch.allclose(better[last.name].weight.double(), solution[:, :-1], atol=2e-4)
    assert torch.allclose(better[last.name].bias.double(), solution[:, -1], atol=2e-4)


def test_the_refit_brings_the_model_nearer_to_the_dense_one_and_keeps_the_structure(half):
    _, batches, removals = half
    task, sites = padded()
    better = refit(task.model, sites, removals, batches, damping=1e-2)
    dense = logits(task, task.model, batches)
    before = divergence(task, surgery.mask(task.model, sites, removals), batches, dense)
    after = divergence(task, surgery.mask(task.model, sites, better), batches, dense)
    assert after < before
    for name, removal in removals.items():
        assert torch.equal(better[name].kept, removal.kept)
        assert better[name].weight.shape == removal.weight.shape


def test_dropped_and_untouched_sites_pass_through(half):
    folder, batches, _ = half
    task, sites = padded()
    gone = {sites[0].name: database.removal(folder / "c", 0, Option(units=0))}
    better = refit(task.model, sites, gone, batches, damping=1e-2)
    assert set(better) == {sites[0].name}
    assert len(better[sites[0].name].kept) == 0

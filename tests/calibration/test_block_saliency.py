"""LPViT's saliency against the gradient of every sample by autograd, and blocks that are chosen by it."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from support.channel_families import FAMILIES, family
from support.classifier import padded

from compress.calibration import activation_statistics, block_saliency
from compress.core import block
from compress.distributed import collectives
from compress.errors import CompressError
from compress.ir import Option
from compress.methods import candidate_store
from compress.pipeline import plan_search
from compress.pipeline.job import Stages
from compress.recipe import Calibration, Options
from compress.report.progress import Quiet
from compress.sites import prune
from compress.sites.modeling import owner
from compress.tasks.loading import Batch, Task

TILE = (4, 4)
HALF = "block:4x4@0.5"


class Subject(Task):
    """A small model of a family with labels for its inputs."""

    def __init__(self, name):
        self.model, self.given, self.sites = family(name)

    def batch(self):
        return Batch(self.given, torch.tensor([1, 0]))


def gradients(task, batch, name):
    """The gradient of each sample's loss with respect to one tensor, by autograd; a sample at a time."""
    for place in range(len(batch.labels)):
        own = {key: value[place : place + 1] for key, value in batch.inputs.items()}
        loss = torch.nn.functional.cross_entropy(task.model(**own).logits, batch.labels[place : place + 1])
        yield torch.autograd.grad(loss, task.model.get_parameter(name))[0]


def stored_across(task, name):
    """Whether a layer stores its weight as [in, out]."""
    return type(task.model.get_submodule(owner(name))).__name__ == "Conv1D"


def by_hand(task, batch, name, rows, columns):
    """[samples, out / rows, in / columns]: sums of weight times gradient, by loops over tiles."""
    weight = task.model.get_parameter(name).detach()
    weight = weight.T if stored_across(task, name) else weight
    found = []
    for gradient in gradients(task, batch, name):
        product = weight * (gradient.T if stored_across(task, name) else gradient)
        out, inner = product.shape
        found.append(
            [
                [float(product[r : r + rows, c : c + columns].sum()) for c in range(0, inner, columns)]
                for r in range(0, out, rows)
            ]
        )
    return torch.tensor(found)


@pytest.mark.parametrize("kind", ["heads", "ffn"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_kept_of_a_sample_is_its_own_gradient_summed_over_tiles(tmp_path, name, kind):
    task = Subject(name)
    site, batch = task.sites[kind], task.batch()
    block_saliency.collect(task, [site], [batch], tmp_path, TILE)
    found = block_saliency.read(tmp_path, 0)
    assert set(found) == {site.writer, *prune.readers(site)}
    for matrix, own in found.items():
        expected = by_hand(task, batch, matrix, *((4, 1) if matrix == site.writer else (1, 4)))
        assert own.shape == expected.shape
        assert torch.allclose(own, expected, atol=1e-6, rtol=1e-4)
        # The control: samples are told apart, and their gradients are not averaged first.
        assert not torch.allclose(own[0], own[1], rtol=0.1)
    assert not any(module._forward_hooks for module in task.model.modules())
    assert all(value.grad is None for value in task.model.parameters())


def test_an_effect_is_the_slope_of_the_loss_when_a_tile_fades(tmp_path):
    task = Subject("separate")
    site, batch = task.sites["ffn"], task.batch()
    block_saliency.collect(task, [site], [batch], tmp_path, TILE, samples=1)
    found = block_saliency.read(tmp_path, 0)[site.writer]
    assert len(found) == 1
    weight = task.model.get_parameter(site.writer)
    whole, step = weight.detach().clone(), 0.05

    def loss(group, column, scale):
        with torch.no_grad():
            weight[4 * group : 4 * group + 4, column] *= 1 + scale
            own = {key: value[:1] for key, value in batch.inputs.items()}
            value = float(task.loss(task.model(**own).logits, Batch(own, batch.labels[:1])))
            weight.copy_(whole)
        return value

    largest = found[0].abs().flatten().topk(4).indices.tolist()
    for group, column in (divmod(place, found.shape[2]) for place in largest):
        slope = (loss(group, column, step) - loss(group, column, -step)) / (2 * step)
        assert float(found[0, group, column]) == pytest.approx(slope, rel=0.05)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Statistics and saliency of the padded classifier."""
    folder = tmp_path_factory.mktemp("collected")
    task, sites = padded()
    batches = list(task.batches("calibration", 16, 16))
    activation_statistics.collect(task, sites, batches, folder / "statistics", readers=True)
    block_saliency.collect(task, sites, batches, folder / "felt", TILE, samples=6)
    return folder


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_blocks_of_what_stays_are_those_of_the_largest_saliency(collected, tmp_path, index, share):
    task, sites = padded()
    site = sites[index]
    option = Option.of(HALF, 4 * round(site.units * share / 4) or None)
    only = {one.name: [option] if one is site else [] for one in sites}
    found = {}
    for ranked in ("felt", "obs"):
        felt = collected / "felt" if ranked == "felt" else None
        candidate_store.build(
            task.model, sites, collected / "statistics", only, tmp_path / ranked, saliency=felt
        )
        found[ranked] = candidate_store.removal(tmp_path / ranked, index, option)
    batch = next(task.batches("calibration", 6))
    made = found["felt"]
    differ = 0
    for name in (site.writer, *prune.readers(site)):
        writes = name == site.writer
        stay = prune.kept_positions(task.model, site, name, made.kept)
        weight = task.model.get_parameter(name).detach().index_select(int(writes), stay)
        each = [g.index_select(int(writes), stay) for g in gradients(task, batch, name)]
        kept = block.choose(block.fisher(weight, each, (4, 4)), 0.5)
        values = made.weight if writes else made.readers[name]
        tiles = values.reshape(values.shape[0] // 4, 4, -1, 4).abs().sum((1, 3))
        assert [row.nonzero()[:, 0].tolist() for row in tiles] == kept.tolist()
        other = found["obs"].weight if writes else found["obs"].readers[name]
        differ += int(((values != 0) != (other != 0)).any())
        if writes and share == 1.0:  # what stays is refitted, whatever chose it
            moments = activation_statistics.read(collected / "statistics", index)
            refit = block.fit(weight, moments.second, moments.mean, (4, 4), kept)
            assert torch.allclose(values, refit.values.float(), atol=1e-5)
    assert differ


def test_whole_files_stay_damaged_ones_are_collected_again_and_passes_change_nothing(collected, tmp_path):
    task, sites = padded()
    batches = list(task.batches("calibration", 16, 16))
    seen = []
    block_saliency.collect(
        task, sites, batches, tmp_path, TILE, samples=6, memory_mb=0, progress=lambda *done: seen.append(done)
    )
    assert seen == [(done, 6 * len(sites)) for done in range(1, 6 * len(sites) + 1)]
    for index in range(len(sites)):
        one, other = (block_saliency.read(folder, index) for folder in (tmp_path, collected / "felt"))
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    path = tmp_path / "001.safetensors"
    good, untouched = path.read_bytes(), (tmp_path / "000.safetensors").stat().st_mtime_ns
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(CompressError, match="missing or damaged"):
        block_saliency.read(tmp_path, 1)
    block_saliency.collect(task, sites, batches, tmp_path, TILE, samples=6)
    assert path.read_bytes() == good
    assert (tmp_path / "000.safetensors").stat().st_mtime_ns == untouched
    block_saliency.collect(task, sites[:1], batches, tmp_path, TILE, samples=2)
    assert len(block_saliency.read(tmp_path, 0)[sites[0].writer]) == 2


def test_a_matrix_that_no_such_block_tiles_is_left_out():
    task = Subject("separate")
    site = task.sites["ffn"]
    assert set(block_saliency.matrices(task.model, site, (5, 4))) == set(prune.readers(site))
    assert set(block_saliency.matrices(task.model, site, (4, 5))) == {site.writer}


def test_without_labels_or_in_several_processes_it_is_refused(tmp_path, monkeypatch):
    task = Subject("separate")
    bare = Batch(task.given)
    with pytest.raises(CompressError, match="no labels"):
        block_saliency.collect(task, [task.sites["ffn"]], [bare], tmp_path, TILE)
    monkeypatch.setattr(collectives, "size", lambda: 2)
    with pytest.raises(CompressError, match="runs in one process, 2 were started"):
        block_saliency.collect(task, [task.sites["ffn"]], [task.batch()], tmp_path, TILE)


@pytest.mark.parametrize(("asked", "tile"), [("obs", None), ("fisher", (32, 32))])
def test_a_recipe_says_how_blocks_are_ranked(tmp_path, monkeypatch, asked, tile):
    _, sites = padded()
    said = {}
    forms = ("dense", "int8-dynamic", "block:64x32@0.5", "block:32x64@0.25", "block:16x16@0.5+rank:2")
    job = SimpleNamespace(
        recipe=SimpleNamespace(options=Options(blocks=asked), calibration=Calibration()),
        folder=tmp_path, work=tmp_path, key="key", sites=sites, calibration=(),
        task=SimpleNamespace(model=None),
        stages=Stages(Quiet()),
    )  # fmt: skip
    costs = SimpleNamespace(rows={site.name: dict.fromkeys(forms) for site in sites}, options=lambda site: [])
    monkeypatch.setattr(activation_statistics, "collect", lambda *_, **__: None)
    monkeypatch.setattr(
        block_saliency, "collect", lambda *given, **_: said.update(tile=given[4], at=given[3])
    )
    monkeypatch.setattr(candidate_store, "build", lambda *_, **words: said.update(felt=words["saliency"]))
    plan_search.build_candidates(job, costs)
    assert said.get("tile") == tile
    assert said["felt"] == said.get("at")


def test_tiles_of_a_block_are_added_before_they_are_squared():
    each = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = block.pooled(each, (2, 3))
    for group, place in itertools.product(range(2), range(2)):
        sums = each[:, 2 * group : 2 * group + 2, 3 * place : 3 * place + 3].sum((1, 2))
        assert float(found[group, place]) == pytest.approx(0.5 * float((sums**2).mean()), rel=1e-12)

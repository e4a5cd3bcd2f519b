import pytest
import torch
import transformers
from support.classifier import padded

from compress.calibration import activation_statistics
from compress.ir import Option
from compress.methods import candidate_store
from compress.methods import sequential_refit as refitting
from compress.methods.sequential_refit import refit
from compress.search.objective import ModelObjective, compute_logits, mean_divergence
from compress.sites import prune
from compress.tasks.loading import Batch


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Candidates and the removals that keep half of every site."""
    folder = tmp_path_factory.mktemp("half")
    task, sites = padded()
    batches = list(task.batches("calibration", 16))
    activation_statistics.collect(task, sites, batches, folder / "s")
    options = {site.name: [Option(units=u) for u in (site.units // 2, 1, 0)] for site in sites}
    candidate_store.build(task.model, sites, folder / "s", options, folder / "c")
    removals = {
        site.name: candidate_store.removal(folder / "c", index, Option(units=site.units // 2))
        for index, site in enumerate(sites)
    }
    return folder, batches, removals


def test_the_stitched_model_is_the_masked_model_whatever_came_before(half):
    folder, batches, removals = half
    task, sites = padded()
    menus = [tuple(Option(units=u) for u in (None, site.units // 2, 0)) for site in sites]
    judge = ModelObjective(task, sites, folder / "c", menus, batches)
    dense = compute_logits(task, task.model, batches)
    everything = mean_divergence(task, prune.mask(task.model, sites, removals), batches, dense)
    first = judge((1,) * len(sites))
    assert first == pytest.approx(everything, rel=1e-5)
    assert judge((0,) * len(sites)) == pytest.approx(0, abs=1e-6)
    alone = judge((0, 1, *(0,) * (len(sites) - 2)))
    one = prune.mask(task.model, sites, {sites[1].name: removals[sites[1].name]})
    assert alone == pytest.approx(mean_divergence(task, one, batches, dense), rel=1e-5)
    assert 0 < alone < first
    assert judge((2,) * len(sites)) > first
    assert judge((1,) * len(sites)) == first


def test_judging_leaves_the_dense_model_alone(half):
    folder, batches, _ = half
    task, sites = padded()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    judge = ModelObjective(task, sites, folder / "c", [(Option(), Option(units=1))] * len(sites), batches)
    judge((1,) * len(sites))
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_divergence_weighs_batches_by_their_size(half):
    _, _, removals = half
    task, sites = padded()
    masked = prune.mask(task.model, sites, removals)
    found = []
    for size in (48, 20):
        batches = list(task.batches("calibration", size))
        found.append(mean_divergence(task, masked, batches, compute_logits(task, task.model, batches)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_each_writer_is_the_least_squares_solution_on_the_inputs_it_will_see(half):
    _, batches, removals = half
    task, sites = padded()
    better = refit(task.model, sites, removals, batches, damping=1e-9)
    last = sites[-1]
    module = last.writer.rpartition(".")[0]
    prefix = prune.mask(task.model, sites, {s.name: better[s.name] for s in sites[:-1]})
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
    dense = compute_logits(task, task.model, batches)
    before = mean_divergence(task, prune.mask(task.model, sites, removals), batches, dense)
    after = mean_divergence(task, prune.mask(task.model, sites, better), batches, dense)
    assert after < before
    for name, removal in removals.items():
        assert torch.equal(better[name].kept, removal.kept)
        assert better[name].weight.shape == removal.weight.shape


def test_dropped_and_untouched_sites_pass_through(half):
    folder, batches, _ = half
    task, sites = padded()
    gone = {sites[0].name: candidate_store.removal(folder / "c", 0, Option(units=0))}
    better = refit(task.model, sites, gone, batches, damping=1e-2)
    assert set(better) == {sites[0].name}
    assert len(better[sites[0].name].kept) == 0


def test_how_much_is_held_at_a_time_changes_nothing(half, monkeypatch):
    _, batches, removals = half
    task, sites = padded()
    whole = refit(task.model, sites, removals, batches, damping=1e-2)
    passes = []
    collect = refitting._Goals._collect
    monkeypatch.setattr(
        refitting._Goals, "_collect", lambda self, wanted: (passes.append(len(wanted)), collect(self, wanted))
    )
    single = refit(task.model, sites, removals, batches, damping=1e-2, memory_mb=0)
    assert passes == list(range(len(sites), 0, -1))
    for name, removal in whole.items():
        assert torch.equal(single[name].weight, removal.weight)
    passes.clear()
    refit(task.model, sites, removals, batches, damping=1e-2)
    assert passes == [len(sites)]


class Between(torch.nn.Module):
    """A list of blocks with something between them that no block answers."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x + number)
        return x


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 4))

    def forward(self, x):
        return x + self.inner(x)


def prefix_of(model, writers, xs):
    batches = [Batch({"x": x}, None, torch.ones(x.shape[:2], dtype=torch.bool)) for x in xs]
    return refitting._Prefix(model, writers, batches)


def test_blocks_that_were_run_are_not_run_again_and_nothing_else_changes(half, monkeypatch):
    _, batches, removals = half
    task, sites = padded()
    quick = refit(task.model, sites, removals, batches, damping=1e-2)
    monkeypatch.setattr(refitting, "_list_of_blocks", lambda model, writers: None)
    slow = refit(task.model, sites, removals, batches, damping=1e-2)
    for name, removal in slow.items():
        assert torch.equal(quick[name].weight, removal.weight)
        assert torch.equal(quick[name].bias, removal.bias)


@pytest.mark.parametrize("chained", [True, False])
def test_what_lies_between_blocks_is_noticed(chained):
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList([Block() for _ in range(3)])
    model = Between(blocks)
    if chained:
        model.forward = lambda x: blocks[2](blocks[1](blocks[0](x)))
    writers = [f"blocks.{number}.inner.2.weight" for number in range(3)]
    xs = [torch.randn(2, 5, 4) for _ in range(3)]
    runs = []
    blocks[0].register_forward_hook(lambda *_: runs.append(0))
    prefix = prefix_of(model, writers, xs)
    with torch.no_grad():
        for number, writer in enumerate(writers):
            found = list(prefix.of(writer))
            blocks[number].inner[2].weight.mul_(0.5)  # as a refit would: later blocks must see it
            for x, rows in zip(xs, found, strict=True):
                for before in range(number):
                    x = blocks[before](x if chained else x + before)
                read = blocks[number].inner[:2](x if chained else x + number)
                assert torch.allclose(rows, read.reshape(-1, 6), atol=1e-6)
    runs_of_the_test = 2 * len(xs)
    assert len(runs) - runs_of_the_test == (3 + 2 if chained else 3 + 2 * 3)


def test_a_call_with_a_cache_is_never_repeated(monkeypatch):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=16)
    model = transformers.GPT2Model(config).eval()
    ids = [torch.randint(20, (2, 6)) for _ in range(2)]
    batches = [Batch({"input_ids": x}, None, torch.ones(x.shape, dtype=torch.bool)) for x in ids]
    writers = [f"h.{number}.{name}.c_proj.weight" for number in range(2) for name in ("attn", "mlp")]
    prefix = refitting._Prefix(model, writers, batches)
    for writer in writers:
        seen = []
        handle = model.get_submodule(writer.rpartition(".")[0]).register_forward_pre_hook(
            lambda _, arguments, seen=seen: seen.append(arguments[0])
        )
        with torch.no_grad():
            for x in ids:
                model(x)
        handle.remove()
        for rows, whole in zip(prefix.of(writer), seen, strict=True):
            assert torch.equal(rows, whole.reshape(-1, whole.shape[-1]))

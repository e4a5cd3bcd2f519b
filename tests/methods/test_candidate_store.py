import pytest
import torch
from support.classifier import padded

from compress.calibration import activation_statistics
from compress.errors import CompressError
from compress.ir import Option
from compress.methods import candidate_store
from compress.sites import prune

LEVELS = {"heads": [3, 2, 1, 0], "ffn": [30, 18, 6, 0]}


def kept(units):
    return Option(units=units)


def options_of(levels):
    return {name: [kept(units) for units in row] for name, row in levels.items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Candidates of every score, their errors and the statistics behind them."""
    folder = tmp_path_factory.mktemp("candidates")
    task, sites = padded()
    batches = list(task.batches("calibration", 16))
    activation_statistics.collect(task, sites, batches, folder / "statistics", taylor=True)
    levels = {site.name: LEVELS[site.kind] for site in sites}
    errors = {
        score: candidate_store.build(
            task.model, sites, folder / "statistics", options_of(levels), folder / score, score=score
        )
        for score in ("obs", "magnitude", "wanda", "taylor")
    }
    return folder, levels, errors


def rows_of(task, site):
    """The writer's inputs at real tokens."""
    rows = []
    module = task.model.get_submodule(site.writer.rpartition(".")[0])
    for batch in task.batches("calibration", 48):
        handle = module.register_forward_pre_hook(lambda _, a, b=batch: rows.append(a[0][b.real].double()))
        with torch.no_grad():
            task.model(**batch.inputs)
        handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("score", ["obs", "magnitude", "wanda", "taylor"])
def test_errors_are_those_of_the_layer_on_the_data_itself(built, score):
    folder, levels, errors = built
    task, sites = padded()
    for index, site in enumerate(sites):
        x = rows_of(task, site)
        weight = prune.writer_columns(task.model, site).detach().double()
        bias = task.model.get_parameter(site.bias).detach().double()
        dense = x @ weight.T + bias
        for units in levels[site.name]:
            made = candidate_store.removal(folder / score, index, kept(units))
            stay = (made.kept[:, None] * site.column.width + torch.arange(site.column.width)).reshape(-1)
            answer = x[:, stay] @ made.weight.double().T + made.bias.double()
            lost = float((answer - dense).square().sum() / (dense - dense.mean(0)).square().sum())
            assert errors[score][site.name][kept(units).key] == pytest.approx(lost, rel=2e-3, abs=1e-6)


def test_refitted_candidates_lose_less_than_any_choice_without_a_refit(built):
    _, levels, errors = built
    for name, row in levels.items():
        for units in row:
            others = [errors[score][name][kept(units).key] for score in ("magnitude", "wanda", "taylor")]
            assert errors["obs"][name][kept(units).key] <= min(others) * (1 + 1e-9)
        assert errors["obs"][name][kept(0).key] == pytest.approx(1, abs=1e-9)
        own = [errors["obs"][name][kept(units).key] for units in row]
        assert own == sorted(own)


def test_the_mean_output_is_exactly_kept(built):
    folder, _, _ = built
    task, sites = padded()
    x = rows_of(task, sites[1])
    weight = prune.writer_columns(task.model, sites[1]).double()
    dense = x @ weight.T + task.model.get_parameter(sites[1].bias).double()
    made = candidate_store.removal(folder / "obs", 1, kept(6))
    answer = x[:, made.kept] @ made.weight.double().T + made.bias.double()
    assert torch.allclose(answer.mean(0), dense.mean(0), atol=1e-5)
    plain = candidate_store.removal(folder / "magnitude", 1, kept(6))
    assert torch.equal(plain.bias, task.model.get_parameter(sites[1].bias))


def test_a_second_build_reads_and_a_damaged_file_is_built_again(built, tmp_path):
    folder, levels, errors = built
    task, sites = padded()
    again = candidate_store.build(task.model, sites, tmp_path / "nowhere", options_of(levels), folder / "obs")
    assert again == errors["obs"]
    path = folder / "obs" / "001.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:100])
    with pytest.raises(CompressError, match="missing or damaged"):
        candidate_store.removal(folder / "obs", 1, kept(6))
    rebuilt = candidate_store.build(
        task.model, sites, folder / "statistics", options_of(levels), folder / "obs"
    )
    assert rebuilt == errors["obs"]
    assert path.read_bytes() == good
    more = {name: [*row, 1] for name, row in levels.items()}
    wider = candidate_store.build(
        task.model, sites, folder / "statistics", options_of(more), tmp_path / "wider"
    )
    assert set(wider[sites[1].name]) == {kept(units).key for units in (30, 18, 6, 1, 0)}
    activation_statistics.collect(task, sites, list(task.batches("calibration", 48)), tmp_path / "s")
    with pytest.raises(CompressError, match="no first-order scores"):
        candidate_store.build(
            task.model, sites, tmp_path / "s", options_of(levels), tmp_path / "t", score="taylor"
        )

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import crew
from support.classifier import padded
from support.lessons import lesson, student

from compress.calibration import activation_statistics
from compress.distributed import collectives
from compress.distributed.collectives import BatchShare
from compress.distributed.process_env import ProcessInfo, process_info
from compress.tasks.loading import Batch
from compress.training import distillation

pytestmark = pytest.mark.timeout(900)  # two interpreters may have to share a core

EXACT = 1e-10  # sums in float64 in another order
STEPS = 1e-7  # of float64 gradients; Adam divides those that are zero but for rounding by 1e-8

TESTS = Path(__file__).parents[1]


@pytest.fixture
def number(monkeypatch):
    """Pretend to be one process of some, exchanging nothing."""

    def pretend(rank, size):
        monkeypatch.setattr(collectives, "rank", lambda: rank)
        monkeypatch.setattr(collectives, "size", lambda: size)

    return pretend


def gradients(model):
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("rows", [7, 3, 2])
def test_losses_and_gradients_of_the_parts_add_up_to_those_of_the_batch(tmp_path, number, rows):
    plan = lesson(tmp_path / "a")
    batch = next(iter(plan.batches()))
    batch = Batch(
        {name: value[:rows] for name, value in batch.inputs.items()}, batch.labels[:rows], batch.real[:rows]
    )
    model = student()
    whole = plan.loss(model, 0, batch)
    whole.backward()
    expected = gradients(model)
    model.zero_grad()
    total, uneven = 0.0, []
    for rank in range(3):
        number(rank, 3)
        share = collectives.split(batch)[1]
        uneven.append(abs(share.tokens - share.samples))
        part = lesson(tmp_path / f"part {rank}").loss(model, 0, batch)
        part.backward()
        total += part.item()
    assert total == pytest.approx(whole.item(), rel=1e-5)
    found = gradients(model)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()) + 1e-7)
    if rows > 3:
        assert max(uneven) > 1e-2


def test_parts_are_every_row_once_and_what_is_no_batch_is_given_whole(number):
    batch = Batch({"x": torch.arange(14).reshape(7, 2), "positions": torch.arange(2)[None]}, torch.arange(7))
    seen = []
    for rank in range(3):
        number(rank, 3)
        mine, part = collectives.split(batch)
        assert torch.equal(mine.inputs["positions"], batch.inputs["positions"])
        assert torch.equal(mine.inputs["x"][:, 0], 2 * mine.labels)
        assert mine.real is None
        assert part.before == len(seen)
        assert part.before + len(mine.labels) + part.after == 7
        assert part.samples == part.tokens == len(mine.labels) / 7
        seen += mine.labels.tolist()
    assert seen == list(range(7))
    assert [collectives.share(range(8)) for rank in range(3) if number(rank, 3) is None] == [
        range(0, 8, 3), range(1, 8, 3), range(2, 8, 3),
    ]  # fmt: skip


def test_pairs_of_texts_in_two_parts_count_as_in_one(monkeypatch):
    hidden = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    goal = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = hidden.clone().requires_grad_()
    expected = distillation.margin_loss(distillation.cosines(whole, Batch({})), goal)
    expected.backward()
    units = torch.nn.functional.normalize(hidden.mean(1), dim=-1)
    monkeypatch.setattr(collectives, "all_reduce", lambda tensors: tensors[0].copy_(units))
    for start, stop in ((0, 2), (2, 5)):
        mine = hidden[start:stop].clone().requires_grad_()
        part = BatchShare(0.0, 0.0, 1.0, start, 5 - stop)
        found = distillation.margin_loss(distillation.cosines(mine, Batch({}), part), goal)
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        assert torch.allclose(mine.grad, whole.grad[start:stop], rtol=1e-10)


def test_small_tensors_travel_together_and_others_apart(monkeypatch):
    monkeypatch.setattr(collectives, "BUCKET_ELEMENTS", 10)
    sizes = [(2, 2), (3,), (9,), (30,), (1,)]
    tensors = [torch.full(shape, float(place)) for place, shape in enumerate(sizes)]
    tensors.append(torch.zeros(2, dtype=torch.float64))
    flat = list(collectives._buckets(tensors))
    assert [[list(one.shape) for one in group] for _, group in flat] == [
        [[2, 2], [3]], [[9]], [[30]], [[1]], [[2]],
    ]  # fmt: skip
    assert torch.equal(flat[0][0], torch.tensor([0.0] * 4 + [1.0] * 3))


def test_alone_everything_is_as_it_was(tmp_path):
    assert (collectives.rank(), collectives.size()) == (0, 1)
    collectives.join()
    batch = Batch({"x": torch.ones(2, 1)})
    assert collectives.split(batch) == (batch, collectives.WHOLE)
    assert collectives.share([1, 2, 3]) == [1, 2, 3]
    tensors = {"a": torch.ones(2)}
    collectives.all_reduce(list(tensors.values()))
    assert torch.equal(tensors["a"], torch.ones(2))
    assert collectives.broadcast({"score": 0.1}, tensors).words == {"score": 0.1}
    collectives.send_command("load", {})
    collectives.check_identical("data", iter([b"never", 3]))
    with pytest.raises(KeyError), collectives.synchronized():
        raise KeyError
    collectives.stop_followers(0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, ProcessInfo()),
        ({"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, ProcessInfo(2, 4)),
        ({"RANK": "2", "WORLD_SIZE": "4", "MASTER_PORT": "1"}, ProcessInfo()),
        ({"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "here"}, ProcessInfo()),
        ({"RANK": "", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, ProcessInfo()),
    ],
)
def test_a_process_is_one_of_several_only_where_they_can_meet(monkeypatch, words, expected):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    assert process_info() == expected


@pytest.mark.parametrize(("words", "code"), [(["doctor"], 0), (["--help"], 0), (["--no-such-flag"], 2)])
def test_a_process_that_is_not_the_first_does_nothing_alone_and_never_speaks(words, code):
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "compress", *words], env=os.environ | place, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


def together(command, folder, seconds=800):
    """Run a command in two processes that meet; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own = os.environ | place | {"OMP_NUM_THREADS": "1"}
    running = []
    for rank in "01":
        with (folder / f"log{rank}").open("wb") as log:
            running.append(
                subprocess.Popen(
                    command,
                    cwd=TESTS,
                    env=own | {"RANK": rank, "PYTHONPATH": str(TESTS)},
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        return [process.wait(seconds) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Everything that two processes did, and what they said."""
    folder = tmp_path_factory.mktemp("crew")
    codes = together([sys.executable, crew.__file__, str(folder)], folder)
    assert codes == [7, 7], (folder / "log0").read_text() + (folder / "log1").read_text()
    return folder, json.loads((folder / "said.json").read_text())


@pytest.mark.slow
def test_a_whole_compilation_by_two_processes_is_that_of_one(tmp_path):
    """Two whole copies of the model, and two halves of it, beside one process."""

    def words(name):
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(
            'model = "support.classifier:Padded"\ntarget = "a100"\n'
            "[budget]\nspeedup = 1.1\n[shapes]\ntokens = 9\n"
            "[calibration]\nbatch = 5\n[search]\ngenerations = 2\nsamples = 32\n"
            f'[recovery]\nmode = "fast"\nepochs = 1\nbatch = 7\nshard = {str(name == "halves").lower()}\n'
        )
        own = ["--recipe", str(recipe), "--quiet", "--json", "--out", str(tmp_path / name)]
        return [sys.executable, "-m", "compress", *own]

    alone = subprocess.run(
        words("one"), cwd=TESTS, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    one = json.loads(alone.stdout)
    for name in ("copies", "halves"):
        codes = together(words(name), tmp_path)
        said = (tmp_path / "log0").read_text()
        assert codes == [3, 3], said
        assert (tmp_path / "log1").read_text() == ""
        two = json.loads(said)
        assert [site["option"] for site in two["sites"]] == [site["option"] for site in one["sites"]]
        assert two["compressed"]["score"] == pytest.approx(one["compressed"]["score"], abs=1 / 48 + 1e-9)
        assert not (tmp_path / name / "compression" / "error.log").exists()


def furthest(folder, first, second):
    """The largest relative difference between the statistics in two folders, by the name of the tensor."""
    found = {}
    for path in sorted((folder / first).glob("*.safetensors")):
        one, other = load_file(path), load_file(folder / second / path.name)
        assert set(one) == set(other) == {"count", "mean", "second", "taylor", "reader"}
        for name, value in one.items():
            gap = float((value - other[name]).abs().max() / value.abs().max())
            found[name] = max(found.get(name, 0.0), gap)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("other", ["two", "passes", "after"])
def test_statistics_of_two_processes_are_those_of_one(done, other):
    assert max(furthest(done[0], "one", other).values()) < EXACT
    assert activation_statistics.read(done[0] / other, 0).count == int(padded()[0].real.sum())


@pytest.mark.slow
def test_without_sums_over_the_processes_they_are_not(done):
    assert min(furthest(done[0], "one", "blind").values()) > 1e-3


def apart(folder, first, second):
    """The largest difference between two tuned models."""
    one, other = (load_file(folder / f"tuned {name}" / "w.safetensors") for name in (first, second))
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


@pytest.mark.slow
def test_a_model_tuned_by_two_processes_is_the_one_tuned_by_one(done):
    assert apart(done[0], "one", "two") < STEPS
    assert apart(done[0], "one", "blind") > 1e-3


@pytest.mark.slow
def test_a_run_killed_alone_is_finished_by_two(done):
    assert apart(done[0], "one", "late") < STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("Poisoned", "RemoteRequestError", "process 1 of 2: bert.encoder.layer.0.attention: its inputs"),
        ("Other", "RemoteRequestError", "process 1 of 2 has another calibration data than the first"),
        ("Buggy", "RemoteFailureError", "process 1 of 2: IndexError: list index out of range\nTraceback"),
        ("Unreadable", "RemoteRequestError", "process 1 of 2: no such file here"),
    ],
)
def test_what_goes_wrong_in_one_process_is_told_by_the_first(done, kind, error, words):
    name, message = done[1][kind]
    assert name == error
    assert message.startswith(words)

"""The public Python API: modules, tasks and directories as models, families, files, and many calls."""

import gc
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from contextlib import contextmanager
from pathlib import Path

import onnxruntime
import psutil
import pytest
import torch
from support.classifier import Padded
from torch import nn

import compress
from compress import artifacts
from compress.errors import CompressError
from compress.recipe import Recipe

QUICK = {"calibration": {"samples": 64}, "search": {"samples": 16, "generations": 1, "offspring": 1}}
ROWS = 128


class Block(nn.Module):
    """A residual block with one hidden layer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Two blocks and a classifier of two classes."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.blocks(x))


def net():
    torch.manual_seed(0)
    return Net()


def loader(labelled=True):
    """Four batches of seeded rows."""
    rows = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(1))
    return [(x, (x[:, 0] > 0).long()) if labelled else x for x in rows.split(32)]


def recipe(out, **changes):
    """A short compilation for a device that is not here, so that nothing is timed."""
    request = {"target": "rpi5", "budget": {"speedup": 1.1}, "out": str(out)}
    return Recipe.model_validate(QUICK | request | changes)


def compiled(out, model=None, labelled=True, **others):
    given = {"example_inputs": torch.randn(1, 16), "data_loader": loader(labelled)}
    return compress.compile(model or net(), recipe=recipe(out), **given, **others)


def state():
    """What a call must leave as it was: signal handlers, threads, folder, streams."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM)]
    return handlers, torch.get_num_threads(), Path.cwd(), sys.stdout, sys.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three calls in one process, and what they left behind."""
    place, calls = tmp_path_factory.mktemp("api"), []
    given = net().double().train()
    weights = {name: value.clone() for name, value in given.state_dict().items()}
    with temporary(place / "temporary"):
        before = state()
        found = types.SimpleNamespace(
            labelled=compiled(place / "labelled"),
            double=compiled(place / "double", given),
            unlabelled=compiled(place / "plain", labelled=False, progress=lambda *call: calls.append(call)),
        )
        found.unchanged = before == state()
    found.calls, found.left, found.given, found.weights = calls, left(place / "temporary"), given, weights
    return found


@pytest.fixture(scope="module")
def result(runs):
    return runs.labelled


@contextmanager
def temporary(folder):
    """Temporary files go to a folder of their own."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("TMPDIR", str(folder))
        yield


def left(folder):
    """What is there still, without the cache that torch keeps for its compiler."""
    return [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]


def test_calls_leave_no_temporary_files_and_no_state(runs):
    assert runs.left == []
    assert runs.unchanged


def test_a_module_gives_a_typed_result_whose_model_loads_when_it_is_asked_for(result):
    assert (result.verdict.status, result.exit_code) == ("not_measured", 3)
    assert result.verdict.predicted.speedup >= 1.1
    assert result.report.score.metric == "accuracy"
    assert "model" not in vars(result)
    small = result.model
    assert isinstance(small, Net)
    parameters = sum(value.numel() for value in small.parameters())
    assert (
        parameters == result.report.compressed.parameters < sum(value.numel() for value in net().parameters())
    )
    assert small(torch.randn(3, 16)).shape == (3, 2)
    assert result.model is small


def test_the_loaded_model_computes_what_the_file_computes(result):
    session = onnxruntime.InferenceSession(str(result.out / "model.onnx"))
    x = torch.randn(1, 16)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = compress.load(result.out, net)(x)
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)


def test_the_caller_s_module_stays_as_it_was(runs):
    assert runs.given.training
    assert {value.dtype for value in runs.given.parameters()} == {torch.float64}
    assert all(torch.equal(runs.weights[name], value) for name, value in runs.given.state_dict().items())
    assert runs.double.report.compressed.parameters == runs.labelled.report.compressed.parameters


def test_without_labels_the_score_is_how_near_outputs_are_to_the_dense_model_s(runs):
    report = runs.unlabelled.report
    assert report.score.metric == "cosine"
    assert report.baseline.score == pytest.approx(1.0)
    assert 0 < report.compressed.score <= 1


def test_progress_calls_the_caller_s_function_for_stages_and_messages(runs):
    began = {stage for stage, *rest in runs.calls if rest == [0, None, None]}
    ended = {stage for stage, *rest in runs.calls if rest == [None, None, None]}
    assert {"load", "find sites"} < began
    assert began == ended


def test_a_task_of_the_caller_is_inspected():
    found = compress.inspect(Padded(), tokens=8)
    assert found.model == "Padded"
    assert {site.kind for site in found.sites} >= {"heads", "ffn"}


@pytest.mark.slow
def test_a_task_of_the_caller_is_planned_with_each_plan_once(tmp_path):
    plans = compress.plan(Padded(), recipe=recipe(tmp_path / "plan"))
    assert plans.source == "estimated"
    speedups = [row.speedup_estimate for row in plans.plans]
    assert len(set(speedups)) == len(speedups) > 0


def test_a_module_is_inspected_and_planned_without_a_budget(tmp_path):
    example = torch.randn(1, 16)
    found = compress.inspect(net(), example_inputs=example)
    assert [site.name for site in found.sites] == ["blocks.0", "blocks.1"]
    plans = compress.plan(
        net(), example_inputs=example, data_loader=loader(), target="rpi5", out=tmp_path / "out"
    )
    assert plans.reachable_speedup_estimate["everything"] > 1


def test_clean_leaves_what_ships_and_everything_still_works(tmp_path, result):
    out = shutil.copytree(result.out, tmp_path / "out")
    work = out / artifacts.MARKER / artifacts.WORK
    assert list(work.rglob("*.safetensors"))
    before = artifacts.size_mb(out)
    found = compress.clean(out)
    assert not work.exists()
    assert found.remaining_mb == round(artifacts.size_mb(out), 1)
    assert found.freed_mb == round(before - artifacts.size_mb(out), 1)
    assert compress.clean(out).freed_mb == 0
    assert compress.write_report(out).verdict.status == "not_measured"
    assert compress.export(out, to="onnx", out=tmp_path / "files") != []
    assert isinstance(compress.load(out, net), Net)
    timed = compress.bench(out, blocks=30)
    assert timed.artifacts[0].speedup == 1
    with pytest.raises(CompressError, match="`compress clean` removes the dense model"):
        compress.export(out, to="edge", out=tmp_path / "bundle")


@pytest.mark.slow
def test_a_run_after_clean_makes_the_working_files_anew_with_the_same_result(tmp_path, result):
    out = shutil.copytree(result.out, tmp_path / "out")
    compress.clean(out)
    again = compiled(out)
    assert again.report.compressed == result.report.compressed
    assert (out / artifacts.MARKER / artifacts.WORK).is_dir()


def test_only_an_output_of_a_run_is_cleaned(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    with pytest.raises(CompressError, match=r"is not an output of compress; give the --out directory"):
        compress.clean(tmp_path / "mine")
    assert (tmp_path / "mine" / "file").read_text() == "kept"


def test_several_speedups_make_a_family_that_every_verb_takes(tmp_path):
    given = {"example_inputs": torch.randn(1, 16), "data_loader": loader()}
    made = compress.compile(net(), recipe=recipe(tmp_path / "out"), speedup=[1.1, 1.3], **given)
    assert isinstance(made, compress.FamilyResult)
    assert [member.out.name for member in made.members] == ["1.1x", "1.3x"]
    assert made.members[1].report.compressed.parameters < made.members[0].report.compressed.parameters
    assert isinstance(made.members[1].model, Net)
    assert [row.speedup for row in compress.write_report(made.out).members] == [1.1, 1.3]
    assert len(compress.bench(made.out, blocks=30).artifacts) == 2
    written = compress.export(made.out, to="onnx", out=tmp_path / "files")
    assert {path.parent.name for path in written} == {"1.1x", "1.3x"}
    assert compress.clean(made.out).freed_mb > 0
    assert not list(made.out.rglob(artifacts.WORK))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compress.compile(net(), target="cpu", speedup=2), r"Net is a module of your own; give exa"),
        (lambda: compress.inspect(net()), r"Net is a module of your own; give example_inputs="),
        (lambda: compress.compile(Padded(), data="d.csv", target="cpu", speedup=2), "brings its own data"),
        (lambda: compress.compile("m", data_loader=[], target="cpu", speedup=2), "belong to an nn.Module"),
        (lambda: compress.compile("m", target="cpu"), r"no budget was given; add for example --speedup 2x"),
        (lambda: compress.compile("m", target="cpu", sped=2), r"'sped' is no option of a compilation; known"),
        (lambda: compress.compile(target="cpu", speedup=2, progress="loud"), r"progress='loud' is not known"),
        (lambda: compress.targets("a1000"), "a100"),
    ],
)
def test_what_cannot_be_done_is_a_compress_error_that_says_what_can(call, message):
    with pytest.raises(compress.CompressError, match=message):
        call()


def test_targets_are_listed_and_shown():
    assert {"cpu", "a100", "rpi5"} <= {device.name for device in compress.targets()}
    assert compress.targets("a100")["bandwidth_gb_s"] == 2039


ORDERS = {
    "at first": "import compress; verb = compress.export",
    "after a submodule": "import compress, compress.export.onnx.writer; verb = compress.export",
}


@pytest.mark.parametrize("order", ORDERS)
def test_export_is_a_package_and_a_verb(order, tmp_path):
    code = f"""
{ORDERS[order]}
import compress.export.backends
assert compress.export is verb and callable(verb) and verb.backends
try:
    verb({str(tmp_path)!r}, to="onnx")
except compress.CompressError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(tmp_path) in done.stdout


def used_mb():
    gc.collect()
    return psutil.Process().memory_info().rss / 1e6


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thirty_calls_do_not_grow_memory_nor_leave_temporary_files(tmp_path):
    used = []
    with temporary(tmp_path / "temporary"):
        for number in range(30):
            assert compiled(tmp_path / f"out{number}").verdict.status == "not_measured"
            used.append(used_mb())
    assert left(tmp_path / "temporary") == []
    # Megabytes; in the first calls libraries fill their caches.
    assert max(used[20:]) - max(used[5:15]) < 20, used

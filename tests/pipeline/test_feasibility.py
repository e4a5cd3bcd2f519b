"""What cannot be had is refused from the prices, from one timing in doubt, and never where it can be had."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from support.sites import ffn, heads

from compress import profiles
from compress.cost.model_latency import Whole
from compress.errors import CompressError
from compress.export.backends.onnx_file import OnnxFile, OnnxRuntimeCpu
from compress.ir import Budget, Slice
from compress.pipeline import feasibility
from compress.pipeline.job import Stages
from compress.pipeline.pricing import Costs
from compress.recipe import Bench
from compress.search.closed_loop import OutOfReachError, Timing

CPU, H100, PI = profiles.load("cpu"), profiles.load("h100"), profiles.load("rpi5")
HERE = OnnxRuntimeCpu(CPU, 1)
SITES = (
    ffn(64).model_copy(
        update={"slices": (Slice(tensor="up", dim=0, width=1), Slice(tensor="down", dim=1, width=1))}
    ),
    heads().model_copy(
        update={
            "slices": (
                *(Slice(tensor=f"r{k}", dim=0, width=4) for k in range(3)),
                Slice(tensor="o", dim=1, width=4),
            )
        }
    ),
)


class Heard:
    """Progress that keeps what was said."""

    def __init__(self):
        self.lines = []

    @contextmanager
    def stage(self, name):
        yield lambda done, work: None

    def say(self, line):
        self.lines.append(line)


def job(moves=("structure",), profile=CPU, backend=HERE, folder=None, **budget):
    return SimpleNamespace(
        profile=profile, backend=backend, runtime=backend or OnnxFile(profile),
        folder=folder, work=folder, dense_file=folder and folder / "dense.onnx",
        sites=SITES, stages=Stages(Heard()),
        task=SimpleNamespace(model="dense"),
        recipe=SimpleNamespace(
            budget=Budget(**(budget or {"speedup": 2.0})), bench=Bench(),
            options=SimpleNamespace(moves=moves),
        ),
    )  # fmt: skip


def costs(ffn_row=None, heads_row=None, gains=None, untimed=()):
    """A model of 10 ms: 8 in sites, which may all go, and 2 outside."""
    rows = {
        "ffn": {"dense": {64: 5.0, 32: 2.5, 0: 0.0}} if ffn_row is None else ffn_row,
        "heads": {"dense": {3: 3.0, 1: 1.0, 0: 0.0}} if heads_row is None else heads_row,
    }
    whole = Whole(inside_ms=(8.0,), whole_ms=(10.0,))
    return Costs(whole=whole, rows=rows, gains=gains or {}, untimed=untimed, source="measured")


def timed(monkeypatch, speedup, low=0.98, high=1.02):
    """The fastest plan takes as long as that; what was built and timed is kept in the list."""
    built = []

    def shrink(model, sites, removals):
        built.append({name: removal.kept.tolist() for name, removal in removals.items()})
        return "small"

    found = Timing(
        speedup=speedup, interval95=(low * speedup, high * speedup), dense_ms=10.0, measured_ms=10 / speedup
    )
    monkeypatch.setattr(feasibility.prune, "shrink", shrink)
    monkeypatch.setattr(feasibility.model_files, "write", lambda job, model, file: file.write_bytes(b"onnx"))
    monkeypatch.setattr(
        feasibility.evaluation, "compare", lambda job, backend, model, file, *, blocks: (model, blocks)
    )
    monkeypatch.setattr(feasibility.evaluation, "timing_of", lambda comparison: found)
    return built


def test_a_budget_far_beyond_the_fastest_plan_is_refused_untimed(monkeypatch, tmp_path):
    built = timed(monkeypatch, 5.0)
    with pytest.raises(OutOfReachError, match=r"^9\.00x \(1\.11 ms\) .* reaches 5\.00x \(2 ms, estimated\)"):
        feasibility.check(job(folder=tmp_path), costs(), 9.0)
    assert built == []


def test_in_doubt_the_fastest_plan_decides_by_its_time(monkeypatch, tmp_path):
    built = timed(monkeypatch, 4.0)
    with pytest.raises(OutOfReachError, match=r"reaches 4\.00x \(2\.5 ms, measured\)[\s\S]*--speedup 3\.80x"):
        feasibility.check(job(folder=tmp_path), costs(), 4.5)
    assert built == [{"ffn": [], "heads": []}]
    assert list(tmp_path.iterdir()) == []
    timed(monkeypatch, 4.4, high=1.03)  # its interval holds what was asked
    feasibility.check(job(folder=tmp_path), costs(), 4.5)
    timed(monkeypatch, 6.1)  # the prices were wrong: more can be had
    feasibility.check(job(folder=tmp_path), costs(), 6.0)


def test_a_budget_well_within_reach_is_not_timed(monkeypatch, tmp_path):
    built = timed(monkeypatch, 1.0)
    feasibility.check(job(folder=tmp_path), costs(), 3.7)
    feasibility.check(job(folder=tmp_path), costs(), 0.0)
    assert built == []


def test_sites_that_stay_whole_are_left_out_of_the_fastest_plan(monkeypatch, tmp_path):
    built = timed(monkeypatch, 2.0)
    feasibility.check(job(folder=tmp_path), costs(heads_row={"dense": {3: 3.0}}), 1.9)
    assert built == [{"ffn": []}]


def test_forms_need_their_weights_so_that_only_the_loop_can_tell(monkeypatch, tmp_path):
    built = timed(monkeypatch, 1.0)
    formed = costs(heads_row={"dense": {3: 3.0}, "int8-dynamic": {3: 1.0}})
    feasibility.check(job(("structure", "int8"), folder=tmp_path), formed, 4.0)
    assert built == []
    with pytest.raises(OutOfReachError, match="estimated"):
        feasibility.check(job(("structure", "int8"), folder=tmp_path), formed, 9.0)


def test_elsewhere_an_estimate_is_all_there_is():
    away = job(profile=H100, backend=None)
    feasibility.check(away, costs(), 4.9)
    with pytest.raises(OutOfReachError, match="estimated"):
        feasibility.check(away, costs(), 5.1)


def test_moves_that_gain_nothing_are_refused_with_what_they_gain(tmp_path):
    dense = costs(
        {"dense": {64: 5.0}}, {"dense": {3: 3.0}}, {"ffn": {"2:4": 1.02}, "heads": {"2:4": 0.99}}, ("fp8",)
    )
    with pytest.raises(CompressError) as refusal:
        feasibility.check(job(("2:4", "fp8"), folder=tmp_path), dense, 2.0)
    assert str(refusal.value) == (
        "--moves 2:4,fp8 gains nothing on cpu:\n"
        "  2:4: 0.99x to 1.02x as fast as dense on a whole site (measured); onnxruntime does not "
        "skip zeros\n"
        "  fp8: could not be timed at any site here\n"
        "  An option is used from 1.03x on. Use --moves structure, which removes whole heads and neurons "
        "and gains on every target"
    )


@pytest.mark.parametrize(
    ("asked_mb", "words"),
    [(2.0, "already met: the dense model takes 1.0 MB"), (0.99, r"out of reach: 1\.0 MB of 1\.0 MB")],
)
def test_a_size_is_refused_before_anything_is_computed(tmp_path, asked_mb, words):
    (tmp_path / "dense.onnx").write_bytes(b"0" * 1_000_000)
    with pytest.raises(CompressError, match=words):
        feasibility.check(job(folder=tmp_path, size_mb=asked_mb), costs(), 0.0)
    feasibility.check(job(folder=tmp_path, size_mb=0.9999), costs(), 0.0)


@pytest.mark.parametrize(
    ("moves", "profile", "why"),
    [
        (("fp8",), CPU, "fp8 is not supported on cpu: a processor has no product of it."),
        (("int8",), PI, "int8 is not supported on rpi5: what integers gain there is not known before"),
        (("2:4",), PI, "2:4 is not supported on rpi5: its profile knows fp32"),
        (("block",), CPU, "block is not supported on cpu: no matrix of this model fits it."),
    ],
)
def test_moves_that_no_site_can_take_are_refused_at_once(monkeypatch, moves, profile, why):
    if moves == ("block",):
        monkeypatch.setattr(feasibility.apply, "offered_forms", lambda *words, **more: ())
    backend = HERE if profile is CPU else None
    with pytest.raises(CompressError, match=f"leaves no option:\n  {why}") as refusal:
        feasibility.check_moves(job(moves, profile, backend))
    assert "--moves structure" in str(refusal.value)
    other = job((*moves, "structure"), profile, backend)
    feasibility.check_moves(other)
    (line,) = other.stages.progress.lines
    assert why.removesuffix(".") in line


def test_moves_that_can_be_taken_are_not_spoken_of():
    fine = job(("structure", "width", "int8", "2:4"))
    feasibility.check_moves(fine)
    assert fine.stages.progress.lines == []

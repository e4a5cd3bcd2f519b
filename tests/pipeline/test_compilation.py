"""A whole compilation of a small decoder, to its time per token."""

import json
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import tiny

from compress.export.backends.onnxruntime import OrtRunner
from compress.export.onnx.kv_cache import MASK, PAST
from compress.ir import Budget
from compress.pipeline import compilation
from compress.pipeline.job import Stages
from compress.recipe import Bench, Calibration, Options, Recipe, Recovery, Search, Shapes
from compress.report.progress import Quiet
from compress.report.schema import read
from compress.tasks.task import Batch, Task


def request(folder, *, words, size_mb, **more):
    """A small compilation of a tiny decoder by the size of its file, with texts of so many random words."""
    model = tiny.decoder(
        folder / "model", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=256, max_position_embeddings=64,
    )  # fmt: skip
    drawn = random.Random(0).choices(tiny.WORDS, k=words)
    lines = [" ".join(drawn[start : start + 12]) for start in range(0, len(drawn), 12)]
    (folder / "text.txt").write_text("\n".join(lines))
    return Recipe(
        model=str(model), data=str(folder / "text.txt"), task="text-generation", target="cpu",
        budget=Budget(size_mb=size_mb), out=str(folder / "out"), calibration=Calibration(samples=64),
        search=Search(samples=32, generations=1), bench=Bench(blocks=30, block_ms=2.0), **more,
    )  # fmt: skip


@pytest.mark.slow
def test_a_decoder_is_compiled_and_both_of_its_phases_are_told(tmp_path):
    phase = Shapes(batch=1, tokens=16, phase="decode")
    found = compilation.run(request(tmp_path, words=6000, size_mb=0.12, shapes=phase), Quiet())
    assert found == read(tmp_path / "out")
    assert (found.target.phase, found.phases.asked, found.phases.tokens) == ("decode", "decode", 16)
    assert found.phases.compressed.per_token_ms == found.compressed.latency_ms
    assert found.phases.per_token == found.verdict.measured
    assert found.phases.dense.ttft_ms.p50 > 0
    assert found.parity.inputs == 14  # at once, and token by token
    sites = json.loads((tmp_path / "out" / "config.json").read_text())["compression"]["sites"]
    assert {(kept["site"]["tokens"], kept["site"]["past"]) for kept in sites} == {(1, 16), (1, 0)}
    with OrtRunner(tmp_path / "out" / "model.onnx", 1) as runner:
        assert any(name.startswith(PAST) for name in runner.inputs())
        ids = np.ones((2, 5), dtype=np.int64)
        assert np.isfinite(runner.infer({"input_ids": ids, MASK: ids})["logits"]).all()


@pytest.mark.slow
def test_the_seconds_of_all_stages_add_up_to_the_wall_clock(tmp_path):
    began = time.perf_counter()
    found = compilation.run(
        request(tmp_path, words=3000, size_mb=0.12, shapes=Shapes(batch=1, tokens=16)), Quiet()
    )
    took = time.perf_counter() - began
    assert sum(stage.seconds for stage in found.stages) == pytest.approx(found.wall_seconds, rel=0.05)
    assert found.wall_seconds == pytest.approx(took, rel=0.25)
    assert {"load", "plan", "build", "check and report"} <= {stage.name for stage in found.stages}


def test_the_time_of_a_stage_inside_another_is_counted_once():
    stages = Stages(Quiet())
    with stages("outer"):
        with stages("inner"):
            time.sleep(0.05)
        time.sleep(0.02)
    inner, outer = stages.seconds
    assert (inner.name, outer.name) == ("inner", "outer")
    assert inner.seconds >= 0.05
    assert outer.seconds >= 0.02
    assert inner.seconds + outer.seconds <= stages.wall_seconds() + 0.002  # each rounds to milliseconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("move", "form", "name"), [("int4", "int4", "int4"), ("int8", "int8-dynamic", "int8")]
)
def test_a_budget_of_bytes_is_met_with_few_bits_that_have_learned(tmp_path, move, form, name):
    asked = request(
        tmp_path, words=3000, size_mb=0.08, shapes=Shapes(batch=1, tokens=16),
        options=Options(moves=("structure", move)), recovery=Recovery(mode="fast", epochs=1, samples=64),
    )  # fmt: skip
    found = compilation.run(asked, Quiet())
    assert form in {site.option.precision for site in found.sites}
    assert found.compressed.precision == f"fp32 + {name}" != found.baseline.precision == "fp32"
    assert any(f"learning in {form}" in note for note in found.notes)
    assert any(line.startswith(f"{form}: ") for line in found.attribution)
    smoothed = any(note.startswith("SmoothQuant: activation outliers") for note in found.notes)
    assert smoothed == (move == "int8")
    # Codes that had not learned with the model would not give its answers.
    assert found.parity.max_abs_difference <= found.parity.tolerance


@pytest.mark.parametrize(
    ("asked", "first", "last", "lengths"),
    [
        (2.0, (2.05, 1.97), False, [80]),
        (2.0, (2.05, 1.95), False, [80, 160]),
        (2.0, (1.95, 1.80), False, [80]),  # missed: another plan is needed, not another look
        (2.0, (1.95, 1.80), True, [80, 160]),  # there is no other, and it reaches what was asked
        (2.0, (2.05, 1.97), True, [80, 160]),  # nor is a hit within its error believed sooner than a miss
        (2.0, (2.05, 2.01), True, [80]),
        (2.0, (1.95, 1.92), True, [80]),  # it is too slow without a doubt
        (0.0, (1.10, 0.90), True, [80]),  # no speedup was asked for
    ],
)
def test_a_proof_that_is_too_uncertain_is_timed_for_longer(monkeypatch, asked, first, last, lengths):
    seen = []

    def compare(job, backend, model, file, *, blocks):
        seen.append(blocks)
        return first if len(seen) == 1 else (2.04, 2.0)

    def timing(found):
        return SimpleNamespace(speedup=found[0], interval95=(found[1], 2 * found[0] - found[1]))

    monkeypatch.setattr(compilation.model_files, "deployed", lambda job, model, removals: model)
    monkeypatch.setattr(compilation.evaluation, "compare", compare)
    monkeypatch.setattr(compilation.evaluation, "timing_of", timing)
    job = SimpleNamespace(
        backend="here", file=None, recipe=SimpleNamespace(bench=Bench(blocks=40)), stages=Stages(Quiet())
    )
    found = compilation._final_timing(job, None, {}, asked, last=last)
    assert seen == lengths
    assert found == (first if len(lengths) == 1 else (2.04, 2.0))
    assert compilation._final_timing(SimpleNamespace(backend=None), None, {}, asked, last=last) is None


class Answers:
    """A runner that answers the same to everything."""

    def __init__(self, file, threads):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def infer(self, inputs):
        return {"logits": np.array([[0.0, 1.0], [1.0, 0.0]])}


class Pairs(Task):
    def batches(self, split, size, limit=None):
        yield Batch({}, torch.tensor([1, 1]))


class Strict(Pairs):
    def score(self, run, split="test", limit=None):
        return float(super().score(run, split, limit) == 1)


def test_a_score_of_a_users_own_stands_and_has_no_interval(monkeypatch, tmp_path):
    monkeypatch.setattr(compilation.evaluation.onnxruntime, "OrtRunner", Answers)
    job = SimpleNamespace(task=Pairs(), stages=Stages(Quiet()))
    found = compilation.evaluation.judged(job, tmp_path / "model.onnx")
    assert (found.score, found.outcomes.tolist()) == (0.5, [[1.0], [0.0]])
    assert compilation.evaluation._drop_interval(job, found, found) == (0.0, 0.0)
    job.task = Strict()
    found = compilation.evaluation.judged(job, tmp_path / "model.onnx")
    assert (found.score, found.outcomes) == (0.0, None)
    assert compilation.evaluation._drop_interval(job, found, found) is None

import json

import pytest
from pydantic import ValidationError
from support.reports import A100, matches, report, whole

from compress.errors import CompressError
from compress.ir import Budget
from compress.report import schema as reporting
from compress.report.next_steps import ruin
from compress.report.schema import (
    Figures,
    Measured,
    Predicted,
    Report,
    Samples,
    Target,
    exit_code,
    judge,
    read,
    steps,
)
from compress.report.summary import device, verdict_line

HERE = "on this CPU (onnxruntime 1.32, fp32, 1 thread, batch 1 x 32)"
THERE = "on a100 (tensorrt, fp16, batch 8 x 128)"
TAIL = "compression/report.html"


def plain(**values):
    return Figures(parameters=1, weight_bytes=4, **values)


def test_a_met_request_reads_as_the_issue_wants_it():
    assert verdict_line(report(), "out/compression/report.html") == (
        f"asked 2.00x · measured 2.06x [2.03, 2.09], 4.12 -> 2.00 ms {HERE} · accuracy 95.4 -> 94.1 · MET · "
        "out/compression/report.html"
    )


def test_a_miss_says_by_how_much():
    line = verdict_line(report(Budget(speedup=2.2)))
    assert line == (
        f"asked 2.20x · measured 2.06x [2.03, 2.09], 4.12 -> 2.00 ms {HERE} · accuracy 95.4 -> 94.1 · "
        f"MISSED (6.36% short of what was asked) · {TAIL}"
    )


def test_another_machine_s_speedup_is_an_estimate():
    assert verdict_line(report(measured=None)) == (
        f"asked 2.00x · predicted 2.10x (estimate, roofline) {THERE} · not measured · "
        f"accuracy 95.4 -> 94.1 · NOT MEASURED · {TAIL}"
    )


def test_a_latency_budget_names_milliseconds_and_the_ratio():
    assert verdict_line(report(Budget(latency_ms=5.0))) == (
        f"asked 5.00 ms · measured 2.00 ms (2.06x [2.03, 2.09]) {HERE} · accuracy 95.4 -> 94.1 · MET · {TAIL}"
    )
    assert "MISSED (33.33% over what was asked)" in verdict_line(report(Budget(latency_ms=1.5)))


def test_a_size_is_measured_on_any_machine():
    line = verdict_line(report(Budget(size_mb=30.0), measured=None))
    assert line.startswith(f"asked 30.0 MB · measured 22.6 MB {THERE} · accuracy")
    assert " · MET · " in line


def test_energy_counts_only_from_a_counter():
    def with_source(source):
        energy = (
            {"energy_mj": 40.0, "energy_source": source},
            {"energy_mj": 18.0, "energy_source": source},
        )
        return report(Budget(energy_mj=20.0), figures=energy)

    assert "measured 18.0 mJ (2.06x [2.03, 2.09])" in verdict_line(with_source("measured"))
    assert exit_code(with_source("measured")) == 0
    line = verdict_line(with_source("estimated"))
    assert "predicted 18.0 mJ (estimate, roofline)" in line
    assert "not measured · measured 2.06x [2.03, 2.09]" in line
    assert exit_code(with_source("estimated")) == 3


def test_power_is_its_own_figure():
    power = ({}, {"power_w": 9.0, "energy_mj": 30.0, "energy_source": "measured"})
    assert "asked 10.0 W · measured 9.00 W" in verdict_line(report(Budget(power_w=10.0), figures=power))


def test_average_power_names_its_rate_and_a_device_that_cannot_keep_up_has_missed():
    asked = Budget(power_w=10.0, rate_hz=2.0)
    power = ({}, {"power_w": 9.0, "energy_mj": 30.0, "energy_source": "measured"})
    made = report(asked, figures=power)
    assert "asked 10.0 W at 2 runs/s · measured 9.00 W" in verdict_line(made)
    assert made.verdict.status == "met"
    took_ms = made.compressed.latency_ms.p50
    quick = made.compressed
    for rate_hz, status in ((0.99e3 / took_ms, "met"), (1.01e3 / took_ms, "missed")):
        found, reason = judge(Budget(power_w=10.0, rate_hz=rate_hz), made.verdict.measured, quick, None, None)
        assert found == status
        assert reason is None or "a second leave" in reason


def test_no_prediction_is_said_plainly():
    line = verdict_line(report(measured=None, predicted=Predicted()))
    assert f"asked 2.00x · no prediction {THERE} · not measured" in line


def test_scores_that_were_not_taken_are_said_to_be_missing():
    assert "accuracy not measured" in verdict_line(report(scores=(0.9, None)))


def test_several_threads_and_no_shape():
    target = Target(name="rpi5", runtime="onnxruntime", threads=4, shapes={})
    assert "on rpi5 (onnxruntime, fp32, 4 threads) ·" in verdict_line(report(target=target))


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (report(), 0),
        (report(Budget(speedup=2.2)), 1),
        (report(max_drop=0.01), 1),
        (report(max_drop=0.02), 0),
        (report(measured=None), 3),
        (report(measured=None, max_drop=0.01), 1),
        (report(scores=(0.9, None), max_drop=0.01), 3),
    ],
)
def test_exit_codes(made, code):
    assert exit_code(made) == code


def test_a_speedup_that_costs_too_much_quality_is_missed_for_that_reason():
    line = verdict_line(report(max_drop=0.01))
    assert "MISSED (the score fell by 0.013, at most 0.01 was allowed)" in line


def test_a_higher_perplexity_is_a_drop():
    made = report(metric="perplexity", scores=(20.0, 23.0), max_drop=2.0)
    assert "perplexity 20.0 -> 23.0 · MISSED (the score fell by 3, at most 2" in verdict_line(made)


def test_a_model_of_which_little_is_left_is_said_to_be_so():
    said = ruin(report(scores=(0.948, 0.007), fixed_ms=1.37))
    assert said.startswith(
        "Little is left of the model (accuracy 94.8 -> 0.7): 33% of the dense model's time"
    )
    assert "--batch" in said
    assert "33%" not in ruin(report(scores=(0.948, 0.007)))
    for scores in ((0.954, 0.941), (0.95, 0.475), (None, None), (0.0, 0.0)):
        assert ruin(report(scores=scores)) is None
    assert ruin(report(metric="perplexity", scores=(20.0, 8000.0))) is None


@pytest.mark.parametrize(
    ("asked", "figures", "measured", "status"),
    [
        (Budget(speedup=2.0), plain(), Measured(speedup=2.0, interval95=(1.9, 2.1)), "met"),
        (Budget(speedup=2.0), plain(), Measured(speedup=1.9999, interval95=(1.9, 2.1)), "missed"),
        (Budget(speedup=2.0), plain(), None, "not_measured"),
        (Budget(size_mb=1.0), plain(file_bytes=1_000_000), None, "met"),
        (Budget(size_mb=1.0), plain(file_bytes=1_000_001), None, "missed"),
        (Budget(size_mb=1.0), plain(), None, "not_measured"),
        (Budget(energy_mj=1.0), plain(energy_mj=1.0, energy_source="measured"), None, "met"),
        (Budget(energy_mj=1.0), plain(energy_mj=1.0, energy_source="estimated"), None, "not_measured"),
        (Budget(power_w=1.0), plain(power_w=1.1, energy_source="measured"), None, "missed"),
        (Budget(latency_ms=1.0), plain(), None, "not_measured"),
    ],
)
def test_the_status_follows_from_the_figures(asked, figures, measured, status):
    assert judge(asked, measured, figures, None, None)[0] == status


def test_a_drop_of_exactly_what_is_allowed_is_allowed():
    fast = Measured(speedup=3.0, interval95=(2.9, 3.1))
    assert judge(Budget(speedup=2.0), fast, plain(), 0.01, 0.01) == ("met", None)


def broken(**changes):
    words = json.loads(report().model_dump_json())
    for path, value in changes.items():
        place = words
        *parents, last = path.split("__")
        for step in parents:
            place = place[step]
        place[last] = value
    return json.dumps(words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verdict__status": "missed"}, "the figures say 'met'"),
        ({"verdict__measured__speedup": 1.5}, "the figures say 'missed'"),
        ({"verdict__measured": None, "verdict__status": "not_measured"}, "measured together"),
        ({"baseline__latency_ms": None}, "needs baseline.latency_ms"),
        ({"verdict__measured__interval95": [2.1, 2.0]}, "interval95"),
        ({"verdict__score_drop": -0.2}, "score_drop"),
        ({"compressed__energy_mj": 3.0}, "energy_source"),
        ({"schema_version": 2}, "schema_version"),
        ({"verdict__reson": "x"}, "did you mean 'reason'"),
        ({"samples__baseline": [0.0]}, "0.0"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(changes, words, tmp_path):
    (tmp_path / "report.json").write_text(broken(**changes), encoding="utf-8")
    with pytest.raises(CompressError, match="Delete it and run compress again") as caught:
        read(tmp_path)
    assert words in str(caught.value)


def test_an_estimated_power_needs_a_source_too():
    with pytest.raises(ValidationError, match="energy_source"):
        plain(power_w=3.0)


def test_a_report_survives_the_disk(tmp_path):
    made = whole()
    (tmp_path / "compression").mkdir()
    (tmp_path / "compression" / "report.json").write_text(made.model_dump_json(), encoding="utf-8")
    assert read(tmp_path) == made
    assert read(tmp_path / "compression") == made


@pytest.mark.parametrize("content", [b"", b'{"schema_version": 1', b"\xff\xfe\x00"])
def test_a_damaged_report_is_one_clear_message(content, tmp_path):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(CompressError, match=r"(?s)report\.json.*[Dd]elete it and run compress again"):
        read(tmp_path)


def test_a_mistake_never_prints_the_whole_report(tmp_path):
    (tmp_path / "report.json").write_text(broken(verdict__status="missed"), encoding="utf-8")
    with pytest.raises(CompressError) as caught:
        read(tmp_path)
    assert str(caught.value).removeprefix(str(tmp_path)) == (
        "/report.json: status 'missed', but the figures say 'met'\n  Delete it and run compress again."
    )


def test_a_missing_report_says_what_to_give(tmp_path):
    with pytest.raises(CompressError, match=r"report\.json cannot be read.*--out"):
        read(tmp_path)


def test_more_samples_than_a_chart_can_show_are_refused():
    with pytest.raises(ValidationError, match="600"):
        Samples(baseline=[1.0] * 601)


def test_the_waterfall_adds_up():
    made = steps(4.0, 2.0, report(layers=4).sites)
    assert [step.name for step in made] == ["dense", "heads", "ffn", "unexplained", "compressed"]
    assert made[0].ms == 4.0
    assert made[-1].ms == 2.0
    assert sum(step.ms for step in made[:-1]) == pytest.approx(made[-1].ms)
    saved = {"heads": 0.0, "ffn": 0.0}
    for site in report(layers=4).sites:
        saved[site.kind] += site.dense_latency_ms - site.latency_ms
    assert made[1].ms == pytest.approx(-saved["heads"])
    assert made[2].ms == pytest.approx(-saved["ffn"])


def test_a_waterfall_without_a_rest_has_no_bar_for_it():
    part = report(layers=1).sites
    saved = sum(site.dense_latency_ms - site.latency_ms for site in part)
    assert [step.name for step in steps(3.0, 3.0 - saved, part)] == [
        "dense",
        "heads",
        "ffn",
        "compressed",
    ]


def test_the_contract_s_keys_are_there():
    words = json.loads(whole().model_dump_json())
    promised = {
        "": "schema_version created model target verdict baseline compressed score parity sites rounds "
        "stages environment protocol inputs",
        "target": "name runtime provider threads precision shapes",
        "verdict": "status asked measured predicted score_drop",
        "baseline": "latency_ms score parameters weight_bytes file_bytes energy_mj energy_source",
        "compressed": "latency_ms score parameters weight_bytes file_bytes energy_mj energy_source",
        "score": "metric split samples",
        "parity": "max_abs_difference tolerance agreement inputs products product_difference",
    }
    for place, keys in promised.items():
        assert set(keys.split()) <= set(words[place] if place else words)
    parts = (
        (words["baseline"]["latency_ms"], "p50 p90 p99 mean std runs"),
        (words["sites"][0], "name kind option error latency_ms dense_latency_ms source"),
        (words["sites"][0]["option"], "units units_total pattern rank precision"),
        (words["rounds"][0], "budget_ms predicted_ms measured_ms"),
    )
    for part, keys in parts:
        assert set(keys.split()) <= set(part)
    assert words["verdict"]["measured"] == {"speedup": 2.06, "interval95": [2.03, 2.09]}


def integers(base, *options):
    """A report whose first sites have these options."""
    changed = [
        site.model_copy(update={"option": site.option.model_copy(update=words)})
        for site, words in zip(base.sites, options, strict=False)
    ]
    return base.model_copy(update={"sites": (*changed, *base.sites[len(changed) :])})


def test_a_line_never_calls_a_file_with_integers_plainly_fp32():
    plain = report(layers=1)
    assert ", fp32, 1 thread" in verdict_line(plain)
    mixed = integers(plain, {"precision": "int8-dynamic", "units": 6}, {"precision": "int4", "units": 9})
    assert ", fp32 + int8 + int4, 1 thread" in verdict_line(mixed)
    assert reporting.precision(mixed.target, mixed.sites) == "fp32 + int8 + int4"
    # What was dropped runs in nothing; two kinds of int8 are one; and half precision is the target's word.
    gone = integers(plain, {"precision": "int8-static", "units": 0})
    assert ", fp32, 1 thread" in verdict_line(gone)
    both = integers(
        plain, {"precision": "int8-static", "units": 6}, {"precision": "int8-dynamic", "units": 9}
    )
    assert ", fp32 + int8, 1 thread" in verdict_line(both)
    there = integers(report(measured=None, layers=1), {"precision": "fp8", "units": 6})
    assert "(tensorrt, fp16 + fp8, batch 8 x 128)" in verdict_line(there)


def test_a_report_that_claims_another_precision_than_its_plan_is_refused():
    mixed = integers(report(layers=1), {"precision": "int8-dynamic", "units": 6})
    words = mixed.model_dump()
    words["compressed"]["precision"] = "fp32 + int8"
    assert Report.model_validate(words).compressed.precision == "fp32 + int8"
    words["compressed"]["precision"] = "fp32"
    with pytest.raises(ValidationError, match=r"fp32.*fp32 \+ int8"):
        Report.model_validate(words)


def test_report_json_is_the_stored_one():
    assert matches("report.json", whole().model_dump_json(indent=1) + "\n")
    assert Report.model_validate_json(whole().model_dump_json()) == whole()


def test_the_target_of_the_tests_is_another_machine():
    assert A100.name != "cpu"
    assert device(A100) == THERE.removeprefix("on ")

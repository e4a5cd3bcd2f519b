import pytest
from support.outputs import GPU_RUNTIME, PI_RUNTIME, RASPBERRY, measurement, write_output
from support.reports import A100, CPU, TIMED

from compress.cli import main
from compress.errors import CompressError
from compress.export.edge import bundle_schema as documents
from compress.export.edge import merge
from compress.export.edge.bundle_schema import Golden, Pair, Span, Used
from compress.ir import Budget
from compress.report import next_steps, render, schema

A100_FACTS = {"gpu": "NVIDIA A100-SXM4-80GB", "model": "server", "cpu": "AMD EPYC 7742"}
XEON = {"model": "rack", "cpu": "Intel Xeon", "machine": "x86_64", "flags": "avx2 fma avx512_vnni"}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_a_measurement_turns_an_estimate_into_a_verdict(out):
    before = write_output(out)
    assert schema.exit_code(before) == 3
    after = merge.merge(before, measurement(before))
    assert (after.verdict.status, schema.exit_code(after)) == ("met", 0)
    assert after.verdict.measured.speedup == pytest.approx(2.5, rel=0.02)
    assert after.compressed.latency_ms.p50 == pytest.approx(1.6, rel=0.02)
    assert after.baseline.latency_ms.p50 == pytest.approx(4.0, rel=0.02)
    assert (after.target.runtime_version, after.target.threads) == ("1.23.0", 1)
    assert after.environment["model"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert after.protocol["blocks"] == 30
    assert after.samples.baseline
    assert after.waterfall[0].ms == after.baseline.latency_ms.p50
    assert after.warnings == before.warnings


def test_a_slow_device_is_a_miss(out):
    before = write_output(out)
    after = merge.merge(before, measurement(before, now_ms=2.2))
    assert (after.verdict.status, schema.exit_code(after)) == ("missed", 1)
    assert "short of what was asked" in after.verdict.reason


@pytest.mark.parametrize(("limit", "status"), [(1.7, "met"), (1.5, "missed")])
def test_a_latency_budget_is_judged_by_the_device_s_median(out, limit, status):
    before = write_output(out, asked=Budget(latency_ms=limit))
    assert before.verdict.status == "not_measured"
    assert merge.merge(before, measurement(before)).verdict.status == status


def test_a_size_budget_keeps_its_verdict_and_gains_the_latency(out):
    before = write_output(out, asked=Budget(size_mb=1.0))
    after = merge.merge(before, measurement(before, now_ms=4.0))
    assert before.verdict.status == after.verdict.status == "missed"
    assert after.verdict.measured is not None


def test_energy_of_a_meter_decides_and_a_missing_one_leaves_no_verdict(out):
    before = write_output(out, asked=Budget(energy_mj=8.0))
    used = Used(energy_mj=7.5, power_w=6.0, idle_w=3.0, runs=900, seconds=5.0, meter="INA3221 VDD_IN")
    after = merge.merge(before, measurement(before, energy=used))
    assert (after.verdict.status, after.compressed.energy_source) == ("met", "measured")
    assert after.compressed.power_w == 6.0
    without = merge.merge(before, measurement(before))
    assert (without.verdict.status, without.compressed.energy_mj) == ("not_measured", None)


@pytest.mark.parametrize(("rate_hz", "power_w", "status"), [(100.0, 3.75, "met"), (900.0, 9.75, "missed")])
def test_average_power_is_that_of_the_rate_that_was_asked_for(out, rate_hz, power_w, status):
    before = write_output(out, asked=Budget(power_w=4.0, rate_hz=rate_hz))
    used = Used(energy_mj=7.5, power_w=6.0, idle_w=3.0, runs=900, seconds=5.0, meter="INA3221 VDD_IN")
    after = merge.merge(before, measurement(before, energy=used))
    assert after.compressed.power_w == pytest.approx(power_w)
    assert after.verdict.status == status


def test_a_score_that_fell_too_far_is_a_miss_whatever_the_speed(out):
    before = write_output(out, max_drop=0.001)
    assert merge.merge(before, measurement(before)).verdict.status == "missed"


def test_merging_again_replaces_the_figures_and_keeps_the_identity(out):
    before = write_output(out, warnings=("kept",))
    doubtful = measurement(before, device={"model": "Banana Pi", "cpu": "arm"}, drift=0.2)
    once = merge.merge(before, doubtful)
    assert len(once.warnings) == 3
    assert documents.identity(once) == documents.identity(before)
    twice = merge.merge(once, measurement(before, now_ms=1.0))
    assert twice.warnings == ("kept",)
    assert twice.verdict.measured.speedup == pytest.approx(4, rel=0.02)
    assert twice.environment["compiled_on"] == once.environment["compiled_on"]


@pytest.mark.parametrize("side", ["dense", "compressed"])
def test_other_files_are_refused(out, side):
    before = write_output(out)
    models = measurement(before).models.model_copy(update={side: "f" * 64})
    with pytest.raises(CompressError, match=rf"the {side} model that was measured.*ffff") as error:
        merge.merge(before, measurement(before, models=models))
    assert before.inputs["dense_sha256" if side == "dense" else "file_sha256"][:16] in str(error.value)


def test_another_request_of_the_same_files_is_refused(out):
    before = write_output(out)
    with pytest.raises(CompressError, match="batch 1 x tokens 64, this output is for batch 1 x tokens 16"):
        merge.merge(before, measurement(before, shapes={"batch": 1, "tokens": 64}))
    with pytest.raises(CompressError, match="another request"):
        merge.merge(before, measurement(before, report="0" * 24))


@pytest.mark.parametrize("side", ["dense", "compressed"])
@pytest.mark.parametrize(
    ("passed", "gap", "words"),
    [(False, 0.5, "0.500 away"), (True, 0.5, "0.500 away"), (False, None, "cannot")],
)
def test_a_device_that_computes_other_numbers_is_refused(out, side, passed, gap, words):
    before = write_output(out)
    bad = Golden(passed=passed, max_abs_difference=gap, tolerance=1e-3, agreement=0.5, examples=3)
    golden = measurement(before).golden.model_copy(update={side: bad})
    with pytest.raises(CompressError, match=f"its outputs of the {side} model.*{words}"):
        merge.merge(before, measurement(before, golden=golden))


def test_figures_that_do_not_follow_from_the_blocks_are_refused(out):
    before = write_output(out)
    good = measurement(before)
    better = Span(value=good.ratio.value * 1.01, low=good.ratio.low, high=good.ratio.high)
    with pytest.raises(CompressError, match="is inconsistent"):
        merge.merge(before, good.model_copy(update={"ratio": better}))
    with pytest.raises(CompressError, match="no timings"):
        merge.merge(before, measurement(before, timings=None, ratio=None, drift=None))
    with pytest.raises(CompressError, match="28 blocks, too few"):
        merge.merge(before, measurement(before, blocks=28))


def a100(out):
    return write_output(out, target=A100.model_copy(update={"shapes": {"batch": 1, "tokens": 16}}))


def test_a_cpu_is_no_a100_unless_somebody_vouches_for_it(out):
    before = a100(out)
    answer = measurement(before, device=XEON)
    with pytest.raises(
        CompressError,
        match=r"a100 is a GPU, but this was measured on the CPU of rack(.|\n)*vouch|--device-is-target",
    ):
        merge.merge(before, answer)
    after = merge.merge(before, answer, device_is_target=True)
    assert after.verdict.status == "met"
    assert any("was not recognised as a100; --device-is-target was given" in w for w in after.warnings)
    assert any("plan was made for tensorrt" in w for w in after.warnings)
    assert any("ran in fp32, but the plan was made for fp16" in w for w in after.warnings)
    assert (after.compressed.precision, after.baseline.precision) == ("fp32", "fp32")


def test_the_right_gpu_is_taken_and_another_one_refused(out):
    before = a100(out)
    after = merge.merge(before, measurement(before, device=A100_FACTS, runtime=GPU_RUNTIME))
    assert (after.verdict.status, after.target.runtime_version) == ("met", "10.3.0")
    assert (after.target.threads, after.warnings) == (None, ())
    other = A100_FACTS | {"gpu": "NVIDIA H100 80GB HBM3"}
    with pytest.raises(CompressError, match="measured on NVIDIA H100 80GB HBM3: h100"):
        merge.merge(before, measurement(before, device=other, runtime=GPU_RUNTIME))
    unknown = A100_FACTS | {"gpu": "NVIDIA A30", "flags": "avx2"}
    doubt = merge.merge(before, measurement(before, device=unknown, runtime=GPU_RUNTIME)).warnings
    assert doubt == (
        "On the device: NVIDIA A30 could not be recognised as a100, nor as another known device.",
    )


@pytest.mark.parametrize(
    ("name", "words", "same"),
    [
        ("rpi5", "Raspberry Pi 5 Model B Rev 1.0", True),
        ("rpi5", "Raspberry Pi 500", False),
        ("rpi5", "Raspberry Pi 4 Model B", False),
        ("orin-nano", "NVIDIA Jetson Orin Nano Developer Kit", True),
        ("orin-agx", "NVIDIA Jetson AGX Orin", True),
        ("orin-agx", "NVIDIA Jetson Orin Nano", False),
        ("rtx4090", "NVIDIA GeForce RTX 4090", True),
        ("h200", "NVIDIA GH200 480GB", False),
        ("l4", "NVIDIA L40S", False),
        ("t4", "Tesla T4", True),
    ],
)
def test_devices_are_recognised_by_their_names(out, name, words, same):
    answer = measurement(write_output(out), device={"model": words})
    assert merge.recognised(name, answer) is same


def test_a_class_of_processors_is_recognised_by_its_instructions(out):
    before = write_output(out)
    new, old = measurement(before, device=XEON), measurement(before, device=XEON | {"flags": "avx2 fma"})
    assert [merge.recognised("cpu-avx512-vnni", one) for one in (new, old)] == [True, False]
    assert [merge.recognised("cpu-avx2", one) for one in (new, old)] == [True, True]


def test_the_target_cpu_is_the_machine_that_compiled(out):
    target = CPU.model_copy(update={"shapes": {"batch": 1, "tokens": 16}})
    before = write_output(out, target=target, measured=TIMED, environment=XEON)
    assert merge.merge(before, measurement(before, device=XEON)).verdict.status == "met"
    with pytest.raises(CompressError, match="another one: its processor is arm 0x41 0xd0b, not Intel Xeon"):
        merge.merge(before, measurement(before), device_is_target=True)
    with pytest.raises(CompressError, match="architecture is aarch64"):
        merge.merge(before, measurement(before, device=XEON | {"machine": "aarch64"}))
    with pytest.raises(CompressError, match="measured on its GPU"):
        merge.merge(before, measurement(before, device=XEON, runtime=GPU_RUNTIME))


def test_more_threads_than_asked_and_a_restless_device_are_told(out):
    before = write_output(out)
    protocol = measurement(before).protocol | {"threads": 4}
    runtime = PI_RUNTIME.model_copy(update={"threads": 4})
    lines = merge.merge(before, measurement(before, protocol=protocol, runtime=runtime, drift=-0.1)).warnings
    assert lines[0] == "On the device: it ran 4 threads, but 1 were asked for."
    assert lines[1].startswith("On the device: The dense model was 10.0% faster")


# The command line


def merged(capfd, out, answer, *words):
    path = out.parent / "measured.json"
    path.write_text(answer if isinstance(answer, str) else answer.model_dump_json())
    code = main.perform(["report", str(out), "--merge", str(path), *words])
    return code, *capfd.readouterr()


def test_merging_writes_every_page_and_the_card_and_gives_the_verdict(out, capfd):
    before = write_output(out, card=True)
    code, line, _ = merged(capfd, out, measurement(before))
    assert code == 0
    assert "MET" in line
    assert "measured 2.5" in line
    assert schema.read(out).verdict.status == "met"
    for name in ("compression/report.md", "compression/report.html", "README.md"):
        assert "2.5" in (out / name).read_text()
        assert "estimate, roofline" not in (out / name).read_text()
    assert merged(capfd, out, measurement(before, now_ms=3.0))[0] == 1


def test_a_card_that_somebody_wrote_in_is_left_alone(out, capfd):
    before = write_output(out, card=True)
    (out / "README.md").write_text("my own words")
    assert merged(capfd, out, measurement(before))[0] == 0
    assert (out / "README.md").read_text() == "my own words"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON, or only a part of it"),
        ("{}", "is missing"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "not JSON"),
    ],
)
def test_a_damaged_measurement_is_refused_kindly_and_changes_nothing(out, capfd, text, words):
    write_output(out)
    before = (out / "compression" / "report.json").read_text()
    code, _, err = merged(capfd, out, text)
    assert code == 2
    assert words in err
    assert "run verify.py" in err
    assert (out / "compression" / "report.json").read_text() == before


def test_a_missing_measurement_and_a_lone_vouch_are_bad_requests(out, capfd):
    write_output(out)
    assert main.perform(["report", str(out), "--merge", str(out / "no.json")]) == 2
    assert "no.json cannot be read" in capfd.readouterr().err
    assert main.perform(["report", str(out), "--device-is-target"]) == 2
    assert "--merge measured.json" in capfd.readouterr().err


def test_a_report_that_was_not_measured_says_how_to_get_a_verdict(out):
    before = a100(out)
    step = next_steps.next_step(before, "out")
    for words in ("export out --to edge", "verify.py", "a100", "report out --merge measured.json"):
        assert words in step
    assert "--merge measured.json" in render.markdown(before)
    assert "--merge measured.json" in render.html(before)
    after = merge.merge(before, measurement(before, device=A100_FACTS, runtime=GPU_RUNTIME))
    assert next_steps.next_step(after) is None
    assert "--merge" not in render.markdown(after)


def test_blocks_and_medians_must_fit_each_other(out):
    before = write_output(out)
    good = measurement(before)
    short = good.timings.dense.model_copy(
        update={"block_medians_ms": good.timings.dense.block_medians_ms[:-2]}
    )
    pair = Pair[documents.Timings](dense=short, compressed=good.timings.compressed)
    with pytest.raises(ValueError, match="the same number of blocks"):
        measurement(before, timings=pair)
    far = good.timings.dense.latency_ms.model_copy(update={"p50": 9.0})
    pair = Pair[documents.Timings](
        dense=good.timings.dense.model_copy(update={"latency_ms": far}), compressed=good.timings.compressed
    )
    with pytest.raises(ValueError, match="outside of all its blocks"):
        measurement(before, timings=pair)
    with pytest.raises(ValueError, match="belong together"):
        measurement(before, drift=None)
    assert RASPBERRY["model"] == good.device["model"]

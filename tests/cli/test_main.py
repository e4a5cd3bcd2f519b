import contextlib
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
import types

import click
import pytest

import compress
from compress import recipe
from compress.api.request import make
from compress.cli import command, main
from compress.errors import CompressError
from compress.ir import Budget, Latency
from compress.report import family, schema, summary

VERBS = ["run", "inspect", "plan", "bench", "export", "report", "clean", "targets", "recipe", "doctor"]
ASK = ["--target", "cpu", "--speedup", "2x"]


def latency(ms):
    return Latency(p50=ms, p90=ms, mean=ms, std=0.0, runs=100)


def a_report(speedup=2.06):
    """What a compilation would return: met at 2x and above, missed below, None not measured."""
    measured = None
    if speedup is not None:
        measured = schema.Measured(speedup=speedup, interval95=(speedup - 0.03, speedup + 0.03))
    status = "not_measured" if speedup is None else "met" if speedup >= 2 else "missed"
    dense = schema.Figures(parameters=10, weight_bytes=40, latency_ms=latency(2.0), score=0.954)
    small = schema.Figures(
        parameters=5, weight_bytes=20, latency_ms=latency(1.0) if measured else None, score=0.941
    )
    return schema.Report(
        created="2025-01-01T00:00:00+00:00",
        model="demo",
        target=schema.Target(name="cpu", runtime="onnxruntime", shapes={"batch": 1, "tokens": 32}),
        verdict=schema.Verdict(status=status, asked=Budget(speedup=2.0), measured=measured, score_drop=0.013),
        baseline=dense,
        compressed=small,
        score=schema.Score(metric="accuracy", samples=100),
    )


@pytest.fixture
def pipeline(monkeypatch):
    """Stands in for pipeline and survey, which load torch; keeps what it was called with."""
    fake = types.ModuleType("compress.fake")
    fake.calls = []
    fake.result = a_report()

    def outcome(*call):
        fake.calls.append(call)
        if isinstance(fake.result, BaseException):
            raise fake.result
        return fake.result() if callable(fake.result) else fake.result

    def document(*call):
        found = outcome(*call)
        return types.SimpleNamespace(model_dump=lambda mode: found)

    def run(asked, progress, task):
        with progress.stage("search") as tick:
            tick(1, 2)
            progress.say("turn 1: 1.9x")
        return outcome("run", asked)

    doubles = {
        "compilation.run": run,
        "inspection.inspect": lambda name, module, example: document("inspect", *example),
        "inspection.plan": lambda asked, progress, task: document("plan", asked),
        "inspection.time_files": lambda *call: document("bench", *call[:-1]),
        "inspection.measure_target": lambda progress, *call: outcome("measure", *call),
    }
    for name, double in doubles.items():
        monkeypatch.setattr(f"compress.pipeline.{name}", double)
    monkeypatch.setattr(
        "compress.tasks.loading.load_example", lambda model, batch, tokens: (None, (model, batch, tokens))
    )
    monkeypatch.setattr("compress.cli.console.use_cores", lambda: fake.calls.append("cores"))
    return fake


def asked(pipeline, words):
    """The recipe that reaches the pipeline."""
    assert main.perform(words) == 0
    return pipeline.calls[-1][1]


# Words -> request


def test_a_model_and_a_target_are_a_run_with_or_without_the_verb(pipeline):
    short = asked(pipeline, ["path/to/model", *ASK])
    assert short == asked(pipeline, ["run", "path/to/model", *ASK])
    assert short == asked(pipeline, [*ASK, "path/to/model"])
    assert (short.model, short.target, short.budget) == ("path/to/model", "cpu", Budget(speedup=2.0))


def test_without_a_model_the_default_is_compiled_with_default_settings(pipeline):
    assert asked(pipeline, ASK) == recipe.Recipe(target="cpu", budget=Budget(speedup=2.0))


def test_every_option_reaches_its_place_in_the_recipe(pipeline):
    words = "m --target a100 --latency-ms 5 --data d --test t --task text-generation --text q --label l"
    words += " --max-drop 0.01 -o place --batch 2 --tokens 64 --phase decode --threads 3 --seed 7"
    words += " --recover full"
    found = asked(pipeline, words.split())
    expected = recipe.Recipe(
        model="m",
        data="d",
        test="t",
        task="text-generation",
        text="q",
        label="l",
        target="a100",
        budget=Budget(latency_ms=5.0),
        max_drop=0.01,
        out="place",
        shapes=recipe.Shapes(batch=2, tokens=64, phase="decode"),
        search=recipe.Search(seed=7),
        recovery=recipe.Recovery(mode="full"),
        bench=recipe.Bench(threads=3),
    )
    assert found == expected


@pytest.mark.parametrize(
    ("flag", "words", "budget"),
    [
        ("--speedup", "1.5x", Budget(speedup=1.5)),
        ("--latency-ms", "5", Budget(latency_ms=5.0)),
        ("--energy-mj", "20mJ", Budget(energy_mj=20.0)),
        ("--size-mb", "30MB", Budget(size_mb=30.0)),
    ],
)
def test_each_budget_has_its_flag(pipeline, flag, words, budget):
    assert asked(pipeline, ["--target", "cpu", flag, words]).budget == budget


def test_several_speedups_ask_for_a_family_and_one_for_a_model(tmp_path):
    def request(*words):
        params = main.app.commands["run"].make_context("run", list(words)).params
        return make(params.pop("recipe"), main._options_of(params))

    found = request("--target", "cpu", "--speedup", "1.5x,2,4x")
    assert (found.budget, found.speedups) == (Budget(speedup=1.5), (1.5, 2.0, 4.0))
    path = tmp_path / "r.toml"
    path.write_text('target = "cpu"\nspeedups = [2, 3]\n')
    found = request("--recipe", str(path))
    assert (found.budget, found.speedups) == (Budget(speedup=2.0), (2.0, 3.0))
    assert recipe.read(written(tmp_path, recipe.to_toml(found)), {}) == found
    assert request("--recipe", str(path), "--speedup", "4x").speedups == ()
    assert request("--recipe", str(path), "--latency-ms", "4").budget == Budget(latency_ms=4.0)
    with pytest.raises(CompressError, match="asks for no gain"):
        request("--target", "cpu", "--speedup", "2x,1x")


def written(folder, text):
    path = folder / "written.toml"
    path.write_text(text)
    return path


def test_a_family_is_answered_by_its_table_and_its_worst_member(pipeline, monkeypatch, capfd):
    members = family.of(a_report(), [family.member("2x", a_report()), family.member("3x", a_report(1.9))])
    monkeypatch.setattr("compress.pipeline.family_compilation.run", lambda asked, progress, task: members)
    monkeypatch.setattr("compress.report.schema.read", lambda directory: a_report())
    assert main.perform(["--target", "cpu", "--speedup", "2x,3x"]) == 1
    assert capfd.readouterr().out == family.text(members) + "\n"
    assert main.perform(["--target", "cpu", "--speedup", "2x,3x", "--json"]) == 1
    assert family.Family.model_validate_json(capfd.readouterr().out) == members


def test_words_are_laid_over_the_recipe_and_replace_its_budget(pipeline, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(
        'target = "a100"\nmodel = "m"\n[budget]\nlatency_ms = 5\n[shapes]\nbatch = 4\ntokens = 16\n'
    )
    found = asked(pipeline, ["--recipe", str(path), "--speedup", "3x", "--tokens", "8"])
    assert (found.model, found.target, found.budget) == ("m", "a100", Budget(speedup=3.0))
    assert found.shapes == recipe.Shapes(batch=4, tokens=8)


def test_a_recipe_alone_is_a_whole_request(pipeline, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('target = "h100"\nbudget = {size_mb = 3}\n')
    assert asked(pipeline, ["--recipe", str(path)]).budget == Budget(size_mb=3.0)


def test_plan_needs_no_budget_but_keeps_the_one_it_is_given(pipeline, tmp_path):
    pipeline.result = {"reachable": 3.0}
    assert asked(pipeline, ["plan", "--target", "a100"]).budget == Budget(speedup=2.0)
    assert asked(pipeline, ["plan", "--target", "a100", "--size-mb", "9"]).budget == Budget(size_mb=9.0)
    path = tmp_path / "r.toml"
    path.write_text('target = "h100"\nbudget = {size_mb = 3}\n')
    assert asked(pipeline, ["plan", "--recipe", str(path)]).budget == Budget(size_mb=3.0)


def test_inspect_and_bench_pass_on_what_they_were_given(pipeline, capfd):
    pipeline.result = {"model": "é", "parameters": 5}
    assert main.perform(["inspect", "m", "--tokens", "9"]) == 0
    assert main.perform(["inspect"]) == 0
    assert main.perform(["bench", "a", "b", "--batch", "3", "--threads", "2", "--blocks", "50"]) == 0
    assert main.perform(["bench", "a"]) == 0
    assert main.perform(["bench", "a", "--phase", "decode"]) == 0
    assert main.perform(["bench", "a", "--phase", "sideways"]) == 2
    assert pipeline.calls == [
        ("inspect", "m", 1, 9),
        ("inspect", None, 1, 32),
        ("bench", ["a", "b"], recipe.Shapes(batch=3), 2, 50),
        ("bench", ["a"], recipe.Shapes(), 1, 40),
        ("bench", ["a"], recipe.Shapes(phase="decode"), 1, 40),
    ]
    assert "parameters: 5" in capfd.readouterr().out
    assert main.perform(["inspect", "--json"]) == 0
    assert '"é"' in capfd.readouterr().out


@pytest.mark.parametrize(("verb", "work"), [("run", "run"), ("plan", "plan"), ("targets", "measure")])
def test_what_computes_takes_all_cores_first(pipeline, verb, work):
    pipeline.result = a_report() if verb == "run" else {}
    assert main.perform([verb, "measure"] if verb == "targets" else [verb, *ASK]) == 0
    assert (pipeline.calls[0], pipeline.calls[1][0]) == ("cores", work)


def test_measuring_takes_a_target_and_a_model_which_mean_nothing_to_a_listing(pipeline, capfd):
    pipeline.result = {}
    words = ["--target", "h100", "--model", "mine:task", "--batch", "8"]
    assert main.perform(["targets", "measure", *words]) == 0
    assert pipeline.calls[-1] == ("measure", "h100", "mine:task", recipe.Shapes(batch=8))
    assert main.perform(["targets", "h100", *words[:2]]) == 2
    assert "--target belongs to `compress targets measure`" in capfd.readouterr().err


def test_average_power_is_asked_for_at_a_rate_of_runs(pipeline, tmp_path, capfd):
    words = ["--target", "h100", "--power-w", "90"]
    assert main.perform([*words, "--rate-hz", "50"]) == 0
    assert pipeline.calls[-1][1].budget == Budget(power_w=90.0, rate_hz=50.0)
    path = tmp_path / "r.toml"
    path.write_text('target = "h100"\nbudget = { power_w = 90, rate_hz = 50 }\n')
    assert main.perform(["--recipe", str(path)]) == 0
    assert pipeline.calls[-1][1].budget == Budget(power_w=90.0, rate_hz=50.0)
    for bad, message in (
        (words, "--power-w 90 needs --rate-hz: a device that never rests draws its full power"),
        ([*words, "--rate-hz", "0"], "--rate-hz 0 must be above zero"),
        (["--target", "cpu", "--speedup", "2x", "--rate-hz", "5"], "goes with --power-w only"),
        (["--target", "cpu", "--rate-hz", "5"], "--rate-hz goes with --power-w"),
    ):
        assert main.perform(bad) == 2
        assert message in capfd.readouterr().err


def test_libraries_are_asked_to_be_brief(pipeline, monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    assert main.perform([*ASK, "-q"]) == 0
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


# Results -> exit codes and output


@pytest.mark.parametrize(("speedup", "code"), [(2.06, 0), (1.8, 1), (None, 3)])
def test_the_exit_code_is_the_verdict(pipeline, capfd, speedup, code):
    pipeline.result = a_report(speedup)
    assert main.perform([*ASK, "--out", "there"]) == code
    out, err = capfd.readouterr()
    assert out == summary.verdict_line(pipeline.result, "there/compression/report.html") + "\n"
    assert ("compress export there --to edge" in err) is (code == 3)


def test_json_is_one_document_on_standard_output_even_when_libraries_print(pipeline, capfd):
    def noisy():
        print("a library talks")
        print("and warns", file=sys.stderr)
        os.write(1, b"native code\n")
        os.write(2, b"native code\n")
        return a_report()

    pipeline.result = noisy
    assert main.perform([*ASK, "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["verdict"]["status"] == "met"
    assert schema.Report.model_validate_json(out) == a_report()
    assert err == "turn 1: 1.9x\n"


def test_quiet_leaves_only_the_answer(pipeline, capfd):
    assert main.perform([*ASK, "-q"]) == 0
    out, err = capfd.readouterr()
    assert (out.count("\n"), err) == (1, "")


def test_the_streams_are_given_back_afterwards(pipeline, capfd):
    main.perform([*ASK, "--quiet"])
    os.write(1, b"after\n")
    print("after too", file=sys.stderr)
    out, err = capfd.readouterr()
    assert out.endswith("MET · out/compression/report.html\nafter\n")
    assert err == "after too\n"


@pytest.mark.parametrize("verb", ["inspect", "plan", "bench x", "targets measure"])
def test_every_verb_answers_in_text_and_in_json(pipeline, capfd, verb):
    pipeline.result = {"sites": [{"name": "layer.0", "units": 12}], "total": 3}
    words = verb.split() + (["--target", "cpu"] if verb == "plan" else [])
    assert main.perform(words) == 0
    text = capfd.readouterr().out
    assert "total: 3" in text
    assert re.search(r"layer\.0 +12\n", text)
    assert main.perform([*words, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == pipeline.result


def test_targets_lists_devices_and_shows_one(capfd):
    assert main.perform(["targets", "--json"]) == 0
    names = [row["name"] for row in json.loads(capfd.readouterr().out)["targets"]]
    assert {"cpu", "a100", "orin-nano", "rpi5"} <= set(names)
    assert main.perform(["targets", "a100"]) == 0
    assert "bandwidth_gb_s: 2,039" in capfd.readouterr().out


@pytest.mark.parametrize("given", ["", "compression"])
def test_report_writes_the_pages_again_and_repeats_the_verdict(tmp_path, capfd, given):
    folder = tmp_path / "compression"
    folder.mkdir()
    (folder / "report.json").write_text(a_report(1.8).model_dump_json())
    assert main.perform(["report", str(tmp_path / given)]) == 1
    line = capfd.readouterr().out
    assert line == summary.verdict_line(a_report(1.8), str(folder / "report.html")) + "\n"
    assert "<html" in (folder / "report.html").read_text()
    assert not list(tmp_path.glob("*.html"))


# Mistakes


def failure(capfd, words):
    code = main.perform(words)
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    assert out == ""
    assert err.startswith("compress: ")
    return code, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "--target", "cpu"], "no budget was given; add for example --speedup 2x"),
        (["m", "--speedup", "2x"], "no target was given; add for example --target cpu"),
        ([*ASK, "--speedpu", "3"], r"'--speedpu'.*'--speedup'"),
        ([*ASK, "--size-mb", "3"], "--speedup and --size-mb were both given"),
        (["--target", "cpu", "--latency-ms", "5,6"], "--latency-ms 5,6 names several budgets"),
        (["--target", "cpu", "--speedup", "fast"], "'fast' is not a budget"),
        ([*ASK, "--batch", "0"], "'--batch': 0 is not"),
        ([*ASK, "--task", "poetry"], "'task' cannot be 'poetry'"),
        ([*ASK, "--max-drop", "nan"], "'max_drop'"),
        (["inspct", "m"], "'inspct' is neither a verb nor a file; did you mean 'inspect'"),
        (["bench"], "FILE-OR-DIR"),
        (["bench", "a", "--blocks", "7"], "7 is not in the range"),
        ([*ASK, "--recipe", "absent.toml"], "absent.toml cannot be read"),
        (["targets", "a101"], "target 'a101' is not known. Did you mean a100"),
        (["report", "nowhere"], "report.json cannot be read"),
        (["recipe"], "no recipe was given; name a TOML file, or list the keys with --reference"),
        (["clean", "nowhere"], "nowhere is not an output of compress; give the --out directory of a run"),
        (["m", "n", *ASK], r"unexpected extra argument \(n\)"),
    ],
)
def test_a_bad_request_gets_one_message_and_exit_2(pipeline, capfd, words, message):
    code, err = failure(capfd, words)
    assert code == 2
    assert re.search(message, err), err
    assert pipeline.calls == []


def test_with_json_a_mistake_is_a_document_too(pipeline, capfd):
    for words in (["m", "--target", "cpu", "--json"], [*ASK, "--sped", "2", "--json"]):
        assert main.perform(words) == 2
        document = json.loads(capfd.readouterr().out)
        assert document["exit_code"] == 2
        assert re.search("budget|--sped", document["error"])


def test_no_words_at_all_show_the_help_and_are_a_bad_request(capfd):
    assert main.perform([]) == 2
    assert "Usage: compress" in capfd.readouterr().err


def test_a_file_named_like_a_verb_in_error_is_still_a_model(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    assert asked(pipeline, ["reports", *ASK]).model == "reports"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (CompressError("2x is out of reach"), 2, "compress: 2x is out of reach\n"),
        (OSError(errno.ENOSPC, "x", "f.bin"), 2, "the disk is full (f.bin)"),
        (PermissionError(errno.EACCES, "x", "f.bin"), 2, "permission was denied (f.bin)"),
        (OSError(errno.EDQUOT, "x"), 2, "the disk quota is used up;"),
        (OSError(errno.EPERM, "x"), 2, "the operation was not permitted;"),
        (OSError(errno.EROFS, "x"), 2, "the file system is read-only;"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "the disk is full;"),
        (KeyboardInterrupt(), 130, "interrupted; nothing had to be kept"),
    ],
)
def test_failures_of_the_work_become_one_message(pipeline, capfd, tmp_path, error, code, message):
    pipeline.result = error
    found, err = failure(capfd, [*ASK, "--quiet", "--out", str(tmp_path / "out")])
    assert found == code
    assert message in err


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_a_disk_error_behind_another_error_is_still_a_disk_error(pipeline, capfd, link):
    def raised():
        error = ValueError("could not serialize")
        setattr(error, link, OSError(errno.ENOSPC, "x", "f.bin"))
        raise error

    pipeline.result = raised
    code, err = failure(capfd, [*ASK, "--quiet"])
    assert (code, "the disk is full (f.bin)" in err) == (2, True)


def test_a_bug_leaves_its_trace_and_the_libraries_words_beside_the_artifacts(pipeline, capfd, tmp_path):
    def broken():
        print("a library talks")
        raise ZeroDivisionError("in the middle")

    (tmp_path / "compression").mkdir()
    pipeline.result = broken
    code, err = failure(capfd, [*ASK, "--quiet", "--out", str(tmp_path)])
    log = tmp_path / "compression" / "error.log"
    assert code == 70
    assert err.count("\n") == 2
    assert "ZeroDivisionError: in the middle" in err
    assert str(log) in err
    assert "Traceback" in log.read_text()
    assert "a library talks" in log.read_text()


def test_a_bug_without_an_output_directory_leaves_its_trace_in_a_temporary_file(
    pipeline, capfd, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pipeline.result = ZeroDivisionError()
    code, err = failure(capfd, [*ASK, "--quiet", "--out", str(tmp_path / "out")])
    (log,) = tmp_path.glob("compress-*.log")
    assert code == 70
    assert str(log) in err
    assert "ZeroDivisionError" in log.read_text()


def test_a_bug_whose_log_cannot_be_written_shows_its_trace_instead(pipeline, capfd, tmp_path):
    (tmp_path / "compression" / "error.log").mkdir(parents=True)
    pipeline.result = ZeroDivisionError("in the middle")
    assert main.perform([*ASK, "--quiet", "--out", str(tmp_path)]) == 70
    assert "Traceback" in capfd.readouterr().err


def test_an_interruption_before_any_work_is_an_interruption(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise click.Abort

    monkeypatch.setattr(main.app, "main", interrupted)
    assert main.perform(ASK) == 130
    assert capsys.readouterr().err == "compress: interrupted\n"


# The whole process

FAKE = """
import sys, types, os, time
import compress
from pathlib import Path
from compress.pipeline import compilation, inspection
from compress.report.overviews import Inspection
from compress.tasks import loading
import compress.cli.console
compress.cli.console.use_cores = lambda: None
def run(recipe, progress, task):
    folder = Path(recipe.out, "compression")
    folder.mkdir(parents=True, exist_ok=True)
    with progress.stage("slow stage") as tick:
        print("ready", flush=True)
        (folder / "started").touch()
        for done in range(6000):
            tick(done, 6000)
            time.sleep(0.05)
compilation.run = run
loading.load_example = lambda model, batch, tokens: (None, tokens)
inspection.inspect = lambda model, module, example: Inspection(
    model=chr(0xB7) * example, sites=(), parameters=0, parameters_in_sites=0
)
inspection.time_files = lambda *call: os.abort()
from compress.cli.main import main
main()
"""


@contextlib.contextmanager
def started(words, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FAKE), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        # Whoever runs the tests in the background has Ctrl-C ignored, and what is started there inherits it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def wait_for(path, process):
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_control_c_ends_with_130_and_says_what_was_kept(tmp_path):
    with started([*ASK, "--out", str(tmp_path)]) as process:
        wait_for(tmp_path / "compression" / "started", process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1] == (
        f"compress: interrupted; finished stages are kept in {tmp_path}/compression, "
        "and the same command resumes from there"
    )


def test_a_reader_that_goes_away_is_no_error():
    with started(["inspect", "--json", "--tokens", "200000"]) as process:
        assert process.stdout.read(11) == '{\n  "model"'
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141


def test_a_reader_that_was_never_there_is_no_error():
    with started(["inspect"]) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141


def test_a_terminal_that_cannot_show_a_character_gets_a_question_mark():
    narrow = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    with started(["inspect", "--tokens", "3"], **narrow) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out.splitlines()[0], err) == (0, "model: ???", "")


def test_native_code_that_dies_says_where():
    with started(["bench", "file"]) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in err
    assert "in act" in err


def test_closed_standard_streams_do_not_stop_the_work(tmp_path):
    code = textwrap.dedent(FAKE).replace("\nmain()", "\nos.close(1); os.close(2)\nmain()")
    done = subprocess.run([sys.executable, "-c", code, "inspect"], check=False)
    assert done.returncode == 0


def test_help_is_quick_and_loads_neither_torch_nor_pydantic():
    code = (
        "import sys; from compress.cli.main import perform; code = perform(['--help']);"
        "heavy = {'torch', 'pydantic', 'numpy', 'rich', 'transformers'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: compress")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, because a busy machine stretches the wall clock; with torch it is seconds.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_python_m_compress_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "compress", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"compress {compress.__version__}\n")


# The surface


def test_help_lists_the_verbs_in_the_order_of_need(capsys):
    assert main.perform(["--help"]) == 0
    text = capsys.readouterr().out
    assert main.perform(["run", "--help"]) == 0
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE)
    assert (options[0], options[-3:]) == ("--target", ["--json", "--quiet", "--help"])
    listed = re.findall(r"^  (\w+)  +\w", text.split("Commands:")[1], re.MULTILINE)
    assert listed == VERBS
    assert not re.search(r"\w\.\.\.\n", text)  # click cuts what does not fit
    assert "compress --target cpu --speedup 2x" in text


def test_help_lists_options_by_group_and_general_ones_last(capsys):
    assert main.perform(["run", "--help"]) == 0
    text = capsys.readouterr().out
    titles = re.findall(r"^([A-Z][\w ]+):$", text, re.MULTILINE)
    assert titles == ["Target and budget", "Data", "Compression", "What is timed", "General"]
    sections = dict(zip(titles, re.split(r"^[A-Z][\w ]+:$", text, flags=re.MULTILINE)[1:], strict=True))
    for title, flag in zip(titles, ("--speedup", "--label", "--recover", "--phase", "--out"), strict=True):
        assert flag in sections[title]


def test_help_states_every_exit_code(capsys):
    assert main.perform(["--help"]) == 0
    stated = re.findall(r"^ +(\d+) +\w", capsys.readouterr().out.split("Exit codes:")[1], re.MULTILINE)
    known = {*schema.EXIT_CODES.values(), command.BAD_REQUEST, command.CRASHED, command.INTERRUPTED}
    assert set(map(int, stated)) == known


def test_recipe_lists_its_keys_or_fills_in_the_defaults(tmp_path, capfd):
    assert main.perform(["recipe", "--reference"]) == 0
    assert (
        "\n[shapes]\nbatch: integer (at least 1); default 1. Inputs in one run.\n" in capfd.readouterr().out
    )
    assert main.perform(["recipe", "--reference", "--json"]) == 0
    keys = json.loads(capfd.readouterr().out)["keys"]
    assert {"table": "search", "key": "seed", "type": "integer", "default": "default 0"}.items() <= next(
        key.items() for key in keys if (key["table"], key["key"]) == ("search", "seed")
    )
    path = tmp_path / "r.toml"
    path.write_text('target = "cpu"\nbudget = { speedup = 2.0 }\n')
    assert main.perform(["recipe", str(path)]) == 0
    text = capfd.readouterr().out
    (tmp_path / "full.toml").write_text(text)
    assert recipe.read(tmp_path / "full.toml", {}) == recipe.read(path, {})
    assert "generations = 24" in text


def test_clean_says_how_much_was_removed_and_what_remains(tmp_path, capfd):
    work = tmp_path / "compression" / "work"
    work.mkdir(parents=True)
    (work / "statistics.safetensors").write_bytes(b"0" * 3_000_000)
    (tmp_path / "model.onnx").write_bytes(b"0" * 2_000_000)
    assert main.perform(["clean", str(tmp_path)]) == 0
    assert capfd.readouterr().out == f"3 MB removed, 2 MB remain in {tmp_path}\n"
    assert not work.exists()
    assert main.perform(["clean", str(tmp_path), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {
        "directory": str(tmp_path),
        "freed_mb": 0.0,
        "remaining_mb": 2.0,
    }


def test_the_options_of_each_verb_are_frozen():
    common = {"--json", "--quiet", "-q"}
    shapes = {"--batch", "--tokens"}
    request = {
        "--target",
        "--speedup",
        "--latency-ms",
        "--energy-mj",
        "--power-w",
        "--rate-hz",
        "--size-mb",
        "--data",
    }
    request |= {
        "--test",
        "--task",
        "--text",
        "--label",
        "--recipe",
        "--recover",
        "--moves",
        "--max-drop",
        "--out",
        "-o",
        "--seed",
    }
    request |= shapes | {"--phase", "--threads"}
    expected = {
        "run": request,
        "plan": request,
        "inspect": shapes,
        "bench": shapes | {"--phase", "--threads", "--blocks"},
        "export": {"--to", "--out", "-o", "--archive"},
        "report": {"--merge", "--device-is-target"},
        "clean": set(),
        "recipe": {"--reference"},
        "targets": shapes | {"--target", "--model"},
        "doctor": set(),
    }
    found = {
        name: {flag for p in command.params if isinstance(p, click.Option) for flag in p.opts}
        for name, command in main.app.commands.items()
    }
    assert found == {name: flags | common for name, flags in expected.items()}


def test_bench_names_the_unit_of_every_latency(pipeline, capfd):
    row = {"artifact": "a.onnx", "p50": 1.25, "p90": 1.5, "p99": None, "mean": 1.3, "std": 0.1, "runs": 40}
    pipeline.result = {"artifacts": [row], "drift": 0.01}
    assert main.perform(["bench", "a.onnx"]) == 0
    text = capfd.readouterr().out
    assert all(f"{name}_ms" in text for name in ("p50", "p90", "mean", "std"))
    assert "runs_ms" not in text
    assert main.perform(["bench", "a.onnx", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == pipeline.result

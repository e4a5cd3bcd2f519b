import json
import re
import xml.etree.ElementTree as ET

import pytest
from support.html_blocks import EVIL, Cells, blocks
from support.reports import CPU, TIMED, latency, matches, report, whole

from compress.errors import CompressError
from compress.ir import Budget, Engine
from compress.report import charts, metrics_table, render, snippets
from compress.report.schema import (
    ClassScore,
    Figures,
    Measured,
    Parity,
    Phases,
    PhaseTimes,
    Predicted,
    SiteReport,
    read,
)
from compress.sites.kinds import KINDS

AWAY = Predicted(speedup=3.17, latency_ms=77.7, baseline_latency_ms=246.3, energy_mj=88.8, power_w=66.6)


def test_an_engine_without_24_kernels_says_that_its_zeros_gain_nothing():
    made = report(layers=1)
    engine = Engine(device="NVIDIA A100", tensorrt="11.0", sparse=True, eligible=tuple("abcdefgh"))
    (line,) = [line for line in render.limits(made.model_copy(update={"engine": engine})) if "engine" in line]
    assert line == (
        "The engine for NVIDIA A100 (TensorRT 11.0) may use 2:4 kernels in 8 layers (a, b, c, d, e, f and 2 "
        "more) and does in 0 layers; so its 2:4 zeros gain no time."
    )
    assert not [line for line in render.limits(made) if "engine" in line]


def away(**more):
    """A report for another machine in which every number that was only predicted is recognizable."""
    made = report(measured=None, predicted=AWAY, layers=2, **more)
    energy = {"energy_mj": 88.8, "power_w": 66.6, "energy_source": "estimated"}
    sites = tuple(
        site.model_copy(update={"latency_ms": 7.89, "dense_latency_ms": 45.6}) for site in made.sites
    )
    changed = {
        "compressed": made.compressed.model_copy(update=energy),
        "sites": sites,
        "reachable_speedup": 9.87,
        "fixed_ms": 5.43,
        "waterfall": page_steps(sites),
    }
    return made.model_copy(update=changed)


def page_steps(sites):
    from compress.report.schema import steps

    return steps(246.3, 77.7, sites)


GUESSES = re.compile(r"3\.17x|77\.7 ms|77\.7\b|246 ms|88\.8|66\.6|\b7\.89|\b45\.6|9\.87x|5\.43 ms")


@pytest.mark.parametrize(
    "asked",
    [Budget(speedup=2.0), Budget(latency_ms=100.0), Budget(energy_mj=90.0), Budget(power_w=70.0)],
)
def test_a_predicted_figure_never_stands_without_the_word_estimate(asked):
    made = away(asked=asked)
    assert made.verdict.status == "not_measured"
    texts = [render.verdict_line(made)]
    texts += render.markdown(made).splitlines()
    texts += render.card(made, name="x").splitlines()
    texts += blocks(render.html(made))
    guessed = [text for text in texts if GUESSES.search(text)]
    assert len(guessed) > 10
    assert [text for text in guessed if "estimate" not in text] == []


def test_nothing_claims_to_have_been_timed_when_nothing_was():
    made = away()
    for text in (render.markdown(made), render.card(made, name="x"), render.html(made)):
        assert "timed in turn" not in text
        assert not re.search(r"[Ss]ame exporter", text)
        assert "ot measured" in text
    assert "Nothing was timed on a100." in render.card(made, name="x")


def test_markdown_is_the_stored_one():
    assert matches("report.md", render.markdown(whole()))


def test_the_card_is_the_stored_one():
    card = render.card(
        whole(),
        name="demo at 2x",
        base_model="someone/demo",
        license_name="apache-2.0",
        datasets=["clinc_oos"],
    )
    assert matches("card.md", card)


def test_a_card_without_a_hub_name_claims_none():
    head = render.card(report(task=None), name="mine").split("---")[1]
    for key in ("base_model", "license", "datasets", "pipeline_tag"):
        assert key not in head
    assert 'metrics: ["accuracy"]' in head


def test_a_card_quotes_what_would_end_its_front_matter():
    text = render.card(report(), name="x", license_name='mit"\n---\nevil: 1')
    assert 'license: "mit\\"\\n---\\nevil: 1"\n' in text


def test_the_page_holds_no_script_and_asks_no_network():
    text = render.html(whole())
    tags = Cells(text).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "embed"}
    for _, attrs in tags:
        assert not [key for key in attrs if key.startswith("on") or key in ("src", "href")]
    assert set(re.findall(r"https?://[^\"'<\s]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_whatever_comes_from_outside_is_escaped_everywhere():
    base = whole()
    sites = (
        base.sites[0].model_copy(update={"name": EVIL}),
        SiteReport.model_validate(base.sites[1].model_dump() | {"name": "$x^2$ & <b>"}),
    )
    made = base.model_copy(
        update={
            "model": EVIL,
            "created": EVIL,
            "warnings": (EVIL,),
            "attribution": (EVIL,),
            "environment": {EVIL: EVIL},
            "inputs": {EVIL: EVIL},
            "sites": sites,
            "target": CPU.model_copy(update={"name": EVIL, "runtime": EVIL}),
            "score": base.score.model_copy(update={"metric": EVIL, "split": EVIL}),
            "stages": (base.stages[0].model_copy(update={"name": EVIL}),),
        }
    )
    text = render.html(made)
    assert "<script" not in text
    assert "<b>" not in text
    assert text.count("&lt;script&gt;") > 8
    for chart in charts.draw(made).values():
        assert "<script" not in chart.page + chart.file
    assert "$x^2$ &amp; &lt;b&gt;" in charts.draw(made)["sites-ffn"].page
    for words in (render.markdown(made), render.card(made, name=EVIL)):
        body = words.split("\n---\n")[-1]
        assert not re.search(r"(?<!\\)<script", body)
        assert not re.search(r"(?<!\\)\]\(javascript", body)
        for line in body.splitlines():
            if line.startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", line)) in (5, 7)


def test_an_outside_newline_starts_no_markdown_of_its_own():
    text = render.markdown(report(model="a\n\n# b", warnings=("_x_ a_b\n| c",)))
    assert "a \\# b" in text.splitlines()[0]
    assert "- \\_x\\_ a_b \\| c" in text.splitlines()


def test_ids_are_unique_across_all_plots_of_a_page():
    ids = [attrs["id"] for _, attrs in Cells(render.html(whole())).tags if "id" in attrs]
    assert ids
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("made", "status", "mark"),
    [
        (report(), "Met", "✓"),
        (report(Budget(speedup=2.2)), "Missed", "✕"),
        (report(measured=None), "Not measured", "?"),
    ],
)
def test_the_verdict_is_at_the_top(made, status, mark):
    found = blocks(render.html(made))
    assert found[0] == f"{status}: demo on {made.target.name}"
    assert f"{mark} {status}" in found[:5]


def test_the_headlines_hold_asked_found_quality_and_size():
    found = blocks(render.html(report(max_drop=0.02)))
    assert "Asked 2.00x losing at most 2.0 points" in found
    assert "Measured 2.06x 4.12 → 2.00 ms, 95 % interval [2.03, 2.09]" in found
    assert "Accuracy 95.4 → 94.1 lost 1.3 points" in found
    assert "Weights 22.4 MB from 43.2 MB, -48%" in found
    slow = blocks(render.html(report(Budget(latency_ms=5.0), scores=(0.9, 0.92))))
    assert "Asked 5.00 ms" in slow
    assert "Measured 2.00 ms 4.12 → 2.00 ms, 2.06x, 95 % interval [2.03, 2.09]" in slow
    assert "Accuracy 90.0 → 92.0 gained 2.0 points" in slow
    there = blocks(render.html(report(measured=None, scores=(0.9, None))))
    assert "Predicted (estimate) 2.10x roofline, not measured" in there
    assert "Accuracy not measured not measured" in there
    blank = blocks(render.html(report(measured=None, predicted=Predicted())))
    assert "Predicted (estimate) none roofline, not measured" in blank
    assert "Measured 22.6 MB of the file that ships" in blocks(
        render.html(report(Budget(size_mb=30.0), measured=None))
    )


def cells(made):
    return {row.label: row[1:] for row in metrics_table.rows(made)}


def test_the_table_compares_both_models():
    table = cells(report())
    assert table["latency, median"] == ("4.12 ms", "2.00 ms", "2.06x [2.03, 2.09]")
    assert table["latency, p90"] == ("4.53 ms", "2.20 ms", "2.06x")
    assert table["latency, deviation"] == ("0.0500 ms", "0.0500 ms", "")
    assert table["runs"] == ("2,400", "2,400", "")
    assert table["accuracy"] == ("95.4", "94.1", "lost 1.3 points")
    assert table["parameters"] == ("10,812,345", "5,612,345", "-48%")
    assert table["file"] == ("43.5 MB", "22.6 MB", "-48%")
    assert "energy" not in table


def test_what_was_not_measured_has_no_row_or_says_so():
    base = report()
    short = base.compressed.latency_ms.model_copy(update={"p99": None})
    few = base.model_copy(
        update={
            "compressed": base.compressed.model_copy(update={"latency_ms": short}),
            "baseline": base.baseline.model_copy(update={"file_bytes": None}),
        }
    )
    assert "latency, p99" not in cells(few)
    assert cells(few)["file"] == ("not measured", "22.6 MB", "")
    assert cells(report(scores=(0.9, None)))["accuracy"] == ("90.0", "not measured", "not measured")
    assert cells(report(scores=(0.9, 0.9)))["accuracy"][2] == "unchanged"
    bare = Figures(parameters=0, weight_bytes=0)
    empty = cells(report(measured=None).model_copy(update={"compressed": bare, "baseline": bare}))
    assert empty["parameters"] == ("0", "0", "")
    assert "file" not in empty


def test_two_sources_of_energy_are_not_compared():
    measured = {"energy_mj": 40.0, "energy_source": "measured"}
    both = cells(report(figures=(measured, measured | {"energy_mj": 10.0})))
    assert both["energy"] == ("40.0 mJ", "10.0 mJ", "-75%")
    mixed = cells(report(figures=(measured, {"energy_mj": 10.0, "energy_source": "estimated"})))
    assert mixed["energy"] == ("40.0 mJ", "10.0 mJ (estimate)", "")
    alone = cells(report(figures=({}, {"power_w": 9.0, "energy_source": "measured"})))
    assert alone["power"] == ("not measured", "9.00 W", "")


def test_the_notes_say_what_weakens_a_verdict():
    wide = report(measured=Measured(speedup=2.01, interval95=(1.97, 2.05)))
    assert render.notes(wide) == ["The median is above 2.00x, the interval reaches down to 1.97x."]
    assert render.notes(report()) == []
    assert render.notes(report(Budget(speedup=2.2))) == [
        "6.36% short of what was asked.",
        "To reach 2.2x, add techniques with `--moves` (`compress plan` shows which pay off on this target); "
        "`--speedup 2.03x` is met by this result.",
    ]
    torn = Parity(max_abs_difference=0.2, tolerance=0.1, agreement=0.5, inputs=2)
    assert render.notes(report(parity=torn)) == [
        "The exported file and PyTorch differ by more than the tolerance."
    ]
    assert render.notes(whole()) == list(whole().warnings)


def test_the_limits_say_what_no_plan_can_remove():
    assert render.limits(report()) == []
    assert render.limits(whole()) == [
        "The fastest plan there is reaches 6.40x (estimate).",
        "0.400 ms (estimate) lie outside every site, 20% of the compressed model's time.",
        "0.40 ms lie in the embedding and the classifier.",
    ]
    alone = report(fixed_ms=0.4, predicted=Predicted())
    assert render.limits(alone) == ["0.400 ms (estimate) lie outside every site."]


def test_other_moves_than_fewer_units_are_named():
    base = report(layers=1)
    option = base.sites[1].option.model_copy(
        update={"units": 1536, "pattern": "2:4", "rank": 8, "precision": "int8"}
    )
    made = base.model_copy(update={"sites": (base.sites[1].model_copy(update={"option": option}),)})
    assert "| 1536/1536, 2:4, int8, rank 8 |" in render.markdown(made)
    assert "| dropped |" in render.markdown(base)


def test_parity_and_facts_are_in_words():
    text = " ".join(blocks(render.html(whole())))
    assert "Over 256 inputs the exported file differs from PyTorch by at most 3.1e-06" in text
    assert "100.00% of the answers agree." in text
    assert "PyTorch against the exported file: not measured." in render.markdown(report())
    for fact in ("avx2yes", "vnnino", "clocksunknown", "block ms60.0", "calibration99ab"):
        assert fact in text
    assert "34.2 seconds in all, loading and reporting included." in text


def test_everything_is_written_and_reads_back(tmp_path):
    where = render.write(whole(), tmp_path / "compression")
    assert where == tmp_path / "compression" / "report.html"
    assert read(tmp_path) == whole()
    assert where.read_text(encoding="utf-8") == render.html(whole())
    assert (where.parent / "report.md").read_text(encoding="utf-8") == render.markdown(whole())
    names = {path.name for path in (where.parent / "plots").iterdir()}
    assert names == {
        f"{name}.svg"
        for name in ("latency", "front", "sites-heads", "sites-ffn", "waterfall", "rounds", "stages")
    }
    for path in (where.parent / "plots").iterdir():
        assert "var(--" not in path.read_text(encoding="utf-8")
        assert ET.fromstring(path.read_text(encoding="utf-8")).tag.endswith("svg")
    assert json.loads((where.parent / "report.json").read_text(encoding="utf-8"))["model"] == "demo"


def test_a_directory_that_cannot_be_written_is_one_clear_message(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CompressError, match=r"report cannot be written.*--out"):
        render.write(report(), tmp_path / "file")


def test_a_decoder_shows_both_phases_and_which_one_was_asked_for():
    phases = Phases(
        asked="decode",
        tokens=64,
        dense=PhaseTimes(ttft_ms=latency(40.5), per_token_ms=latency(4.12)),
        compressed=PhaseTimes(ttft_ms=latency(30.5), per_token_ms=latency(2.0)),
        ttft=Measured(speedup=1.33, interval95=(1.31, 1.35)),
        per_token=TIMED,
    )
    target = CPU.model_copy(update={"phase": "decode", "shapes": {"batch": 1, "tokens": 64}})
    found = report(target=target, phases=phases)
    shown = blocks(render.html(found))
    assert "time to first token, median40.5 ms30.5 ms1.33x [1.31, 1.35]" in shown
    assert "time per token, median4.12 ms2.00 ms2.06x [2.03, 2.09]" in shown
    for text in (render.html(found), render.markdown(found), render.card(found, name="demo")):
        assert "one token after a past of batch 1 x 64" in " ".join(text.split())
    prompt = target.model_copy(update={"phase": "prefill"})
    assert "prompts of batch 1 x 64" in render.markdown(report(target=prompt))
    assert "time per token" not in render.html(report())


def test_every_kind_of_site_has_a_color_on_a_light_and_on_a_dark_page():
    light, _, dark = render.html(whole()).partition("prefers-color-scheme: dark")
    for name, kind in KINDS.items():
        assert f"--{name}: {kind.color};" in light
        assert f"--{name}: {kind.dark_color};" in dark


@pytest.mark.parametrize("model", ["/home/me/models/minilm", "../models/minilm", "~/models/minilm"])
def test_title_and_card_never_show_a_local_path(model):
    made = report(model=model)
    assert "<title>Met: minilm on cpu</title>" in render.html(made)
    for text in (render.html(made), render.card(made, name="minilm"), render.markdown(made)):
        assert model not in text
        assert "models/" not in text
    assert "Met: owner/name on cpu" in render.html(report(model="owner/name"))


def test_cards_suit_the_task_and_the_plan():
    own = render.card(report(task="own-module"), name="x")
    assert "library_name: pytorch" in own
    assert "pipeline_tag" not in own
    assert 'load(".", factory=make_model)' in own
    embeddings = render.card(report(task="feature-extraction"), name="x")
    assert "SentenceTransformer" in embeddings
    assert "mean pooling" in embeddings
    assert 'tags: ["compress", "structured-pruning", "sentence-transformers", "onnx"]' in embeddings
    assert "model.generate(" in render.card(report(task="text-generation"), name="x")
    int8 = report()
    sites = tuple(
        s.model_copy(update={"option": s.option.model_copy(update={"precision": "int8-dynamic"})})
        for s in int8.sites
    )
    now = int8.compressed.model_copy(update={"precision": "fp32 + int8"})
    low = render.card(int8.model_copy(update={"sites": sites, "compressed": now}), name="x")
    assert '"quantization"' in low
    assert "matrix products of `model.onnx` run in int8" in low


def test_every_snippet_is_a_program():
    for task in (None, "own-module", "text-classification", "image-classification", "feature-extraction"):
        made = report(task=task)
        for code in (snippets.run_snippet(made), snippets.load_snippet(made)):
            assert compile(code, "snippet", "exec").co_names


def test_notes_classes_and_how_it_was_run_stand_on_the_page():
    made = report(
        notes=("Sequential refit was used.",),
        classes=(
            ClassScore(name="refund", samples=30, dense=0.9, compressed=0.8),
            ClassScore(name="same", samples=30, dense=0.9, compressed=0.9),
        ),
        dense_agreement=0.981,
        command="compress --speedup 2x",
        revision="git 0123456789ab",
        wall_seconds=65.0,
    )
    text = " ".join(blocks(render.html(made)))
    for words in (
        "1 note of the compilation",
        "-10.0 points",
        "98.1%",
        "compress --speedup 2x",
        "git 0123456789ab",
    ):
        assert words in text
    assert "same class as dense" in text
    assert [row[0] for row in render.class_rows(made)] == ["refund"]
    assert "Sequential refit was used." not in render.notes(made)


def test_a_size_budget_explains_why_it_is_not_smaller():
    page = render.html(report(Budget(size_mb=30.0), fixed_ms=0.4))
    assert "<h2>Why not smaller</h2>" in page
    assert "<h2>Why not faster</h2>" in render.html(report(fixed_ms=0.4))

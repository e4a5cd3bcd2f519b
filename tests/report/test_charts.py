import re
import xml.etree.ElementTree as ET

import pytest
from support.reports import report, whole

from compress.recipe import Budget
from compress.report import charts
from compress.report.charts import Axis, Bar, Point, Share, Strip, Turn, short
from compress.report.formatting import digits
from compress.report.schema import Stage
from compress.report.svg import PALETTE

SVG = "{http://www.w3.org/2000/svg}"
WIDEST = 0.64  # of the font size: the mean width of a character in a wide font (DejaVu Sans digits)


def texts(chart):
    """Every text of a chart as (left, right, base line, size, words), in the widest usual font."""
    found = []
    for node in ET.fromstring(chart.file).iter(f"{SVG}text"):
        style = node.attrib["style"]
        size = float(re.search(r"([\d.]+)px", style)[1])
        x, y = (
            (float(node.attrib["x"]), float(node.attrib["y"]))
            if "x" in node.attrib
            else map(
                float,
                re.search(r"translate\(([-\d.]+)[ ,]+([-\d.]+)\)", node.attrib["transform"]).groups(),
            )
        )
        wide = WIDEST * size * len(node.text)
        anchor = re.search(r"text-anchor: (\w+)", style)
        left = x - {"end": wide, "middle": wide / 2}.get(anchor[1] if anchor else "start", 0)
        if "rotate(-90" not in node.attrib.get("transform", ""):
            found.append((left, left + wide, y, size, node.text))
    return found


def words(chart):
    return [text for *_, text in texts(chart)]


def clashes(chart):
    """Pairs of texts whose boxes overlap, and texts that leave the canvas."""
    found, high = texts(chart), float(ET.fromstring(chart.file).attrib["viewBox"].split()[3])
    wrong = [(a[4], "leaves") for a in found if a[0] < 0 or a[1] > 560 or not 0 < a[2] <= high]
    for i, a in enumerate(found):
        for b in found[i + 1 :]:
            if a[0] < b[1] and b[0] < a[1] and abs(a[2] - b[2]) < 0.8 * max(a[3], b[3]):
                wrong.append((a[4], b[4]))
    return wrong


def boxes(chart):
    """Left, right and color of every filled bar."""
    found = []
    for node in ET.fromstring(chart.file).iter(f"{SVG}path"):
        style = node.attrib.get("style", "")
        color = re.search(r"fill: (#\w+)", style)
        xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+) ", node.attrib["d"])]
        if color and len(xs) == 4:
            found.append((min(xs), max(xs), color[1]))
    return [box for box in found if box[2] != PALETTE["surface"]]


@pytest.mark.parametrize("layers", [1, 3, 12, 32])
def test_no_label_touches_another_whatever_the_number_of_sites(layers):
    base = whole().model_copy(update={"sites": report(layers=layers).sites})
    drawn = charts.draw(base)
    assert len(drawn) == 7
    for name, chart in drawn.items():
        assert (name, clashes(chart)) == (name, [])


def test_no_label_touches_another_when_names_and_numbers_are_long():
    rows = [
        Share(f"stages.{i}.blocks.{i}.a_long_name.mlp", i / 64, "14336/14336", "1234 → 0.0200")
        for i in range(64)
    ]
    assert clashes(charts.sites("ffn", "t", "dense → now, ms (estimate)", rows)) == []
    bars = [Bar("a stage with quite a long name", 0, 5, "1234 ms (estimate)", "now")] * 9
    assert clashes(charts.bars("b", "t", bars)) == []
    turns = [Turn(f"round {i}", 2, 1.9, None, "1234 → not measured") for i in range(6)]
    assert clashes(charts.rounds(turns)) == []
    points = [Point(1 + i / 3, 1000.0 * i, i == 3) for i in range(40)]
    assert clashes(charts.front("front", points, Axis("w", "x", 10.5), "loss", "chosen, 12.34x")) == []


def test_a_bar_is_as_long_as_the_share_that_is_kept():
    rows = [
        Share("a", 0.25, "3/12", "1 → 1"),
        Share("b", 0.0, "dropped", "1 → 0"),
        Share("c", 1.0, "12/12", "1 → 1"),
    ]
    found = boxes(charts.sites("heads", "t", "ms", rows))
    tracks = [right - left for left, right, color in found if color == PALETTE["track"]]
    filled = [right - left for left, right, color in found if color == PALETTE["heads"]]
    assert tracks == [tracks[0]] * 3
    assert filled == pytest.approx([tracks[0] / 4, tracks[0]], abs=1e-3)


def test_a_kind_without_a_color_of_its_own_has_one_all_the_same():
    found = boxes(charts.sites("linear", "t", "ms", [Share("a", 0.5, "1/2", "1 → 1")]))
    assert PALETTE["now"] in {color for *_, color in found}


def test_a_waterfall_starts_each_bar_where_the_last_ended():
    found = boxes(charts.draw(whole())["waterfall"])
    dense, heads, ffn, *rest, now = found
    assert heads[1] == pytest.approx(dense[1], abs=1e-3)
    assert ffn[1] == pytest.approx(heads[0], abs=1e-3)
    assert now[1] == pytest.approx(rest[-1][0] if rest else ffn[0], abs=1e-3)
    assert (now[1] - now[0]) / (dense[1] - dense[0]) == pytest.approx(2.0 / 4.12, rel=1e-3)
    assert [color for *_, color in (dense, heads, ffn, now)] == [
        PALETTE[role] for role in ("dense", "heads", "ffn", "now")
    ]


def test_time_that_was_added_is_colored_and_signed():
    from compress.report.schema import Step

    steps = (
        Step(name="dense", ms=2.0),
        Step(name="unexplained", ms=0.5),
        Step(name="compressed", ms=2.5),
    )
    chart = charts.draw(report(waterfall=steps))["waterfall"]
    assert "+0.500 ms" in words(chart)
    assert PALETTE["worse"] in {color for *_, color in boxes(chart)}
    saved = (Step(name="dense", ms=2.0), Step(name="other", ms=-0.5), Step(name="compressed", ms=1.5))
    assert "-0.500 ms" in words(charts.draw(report(waterfall=saved))["waterfall"])


def test_estimates_are_called_so_in_every_chart():
    away = report(measured=None, layers=2, waterfall=whole().waterfall)
    drawn = charts.draw(away)
    assert "dense → now, ms (estimate)" in words(drawn["sites-heads"])
    assert all("(estimate)" in text for text in words(drawn["waterfall"]) if " ms" in text)
    here = charts.draw(whole())
    assert "dense → now, ms" in words(here["sites-heads"])
    assert "predicted speedup (estimate)" in words(here["front"])
    assert "predicted (estimate)" in words(here["rounds"])
    assert not any("estimate" in text for text in words(here["waterfall"]))


def test_rounds_that_were_not_measured_say_so():
    turn = whole().rounds[0].model_copy(update={"measured_ms": None})
    assert "2.04 → not measured" in words(charts.draw(report(rounds=(turn,)))["rounds"])
    assert "2.04 → 2.20" in words(charts.draw(whole())["rounds"])


def test_a_front_shows_losses_only_when_every_plan_was_judged():
    assert "loss over" in charts.draw(whole())["front"].title
    front = whole().front
    mixed = (front[0].model_copy(update={"loss": None}), *front[1:])
    assert "error over" in charts.draw(report(front=mixed))["front"].title
    assert "chosen, 2.00x, accuracy 94.1" in words(charts.draw(whole())["front"])
    unchosen = tuple(point.model_copy(update={"chosen": False}) for point in front)
    assert not any("chosen" in text for text in words(charts.draw(report(front=unchosen))["front"]))


def test_a_front_without_a_speedup_asked_has_no_line_for_it():
    points = [Point(1.0, 0.0, False), Point(2.0, 0.0, True)]
    assert not any(
        "asked" in text for text in words(charts.front("front", points, Axis("w", "x"), "loss", "c"))
    )
    assert "asked 1.50x" in words(charts.front("front", points, Axis("w", "x", 1.5), "loss", "c"))


def test_energy_is_an_axis_where_every_plan_has_one():
    assert "energy" not in charts.draw(whole())
    spent = [6.0 / point.predicted_speedup for point in whole().front]
    points = tuple(
        point.model_copy(update={"energy_mj": energy_mj})
        for point, energy_mj in zip(whole().front, spent, strict=True)
    )
    drawn = charts.draw(report(front=points))["energy"]
    assert clashes(drawn) == []
    shown = words(drawn)
    assert "predicted energy of a run (estimate)" in shown
    chosen = next(point.energy_mj for point in points if point.chosen)
    assert f"chosen, {digits(chosen)} mJ, accuracy 94.1" in shown
    assert any(text.endswith(" mJ") and "chosen" not in text for text in shown)  # the ticks
    assert not any("asked" in text for text in shown)  # a speedup was
    some = (points[0].model_copy(update={"energy_mj": None}), *points[1:])
    assert "energy" not in charts.draw(report(front=some))
    asked = report(front=points)
    budget = asked.verdict.model_copy(update={"asked": Budget(energy_mj=2.5)})
    drawn = charts.draw(asked.model_copy(update={"verdict": budget}))
    assert "asked 2.50 mJ" in words(drawn["energy"])
    assert not any("asked" in text for text in words(drawn["front"]))


def test_far_apart_latencies_are_drawn_on_a_logarithmic_axis():
    near = charts.latency(Strip("dense", [2.0, 2.1]), Strip("now", [1.0, 1.1]))
    far = charts.latency(Strip("dense", [200.0, 210.0]), Strip("now", [1.0, 1.1]))
    assert "milliseconds per run; line: median" in words(near)
    assert "milliseconds per run (log scale); line: median" in words(far)
    assert {"1", "10", "100"} <= set(words(far))
    assert clashes(near) == clashes(far) == []


def test_runs_beyond_the_axis_are_counted():
    chart = charts.latency(Strip("dense", [2.0] * 399 + [40.0]), Strip("now", [1.0] * 600))
    assert any("1 of 1000 runs lie beyond the axis" in text for text in words(chart))


def test_a_chart_is_drawn_only_where_there_are_figures():
    assert list(charts.draw(report(layers=0))) == []
    assert list(charts.draw(report())) == ["sites-heads", "sites-ffn"]


def test_stages_say_their_seconds_and_whether_they_were_resumed():
    assert {"1.25 s", "33.0 s (resumed)"} <= set(words(charts.draw(whole())["stages"]))


def test_drawing_twice_gives_the_same_bytes_without_a_date():
    first, second = charts.draw(whole()), charts.draw(whole())
    assert first == second
    for chart in first.values():
        assert not re.search(r"20\d\d-|matplotlib|metadata|<style", chart.file)
        assert 'role="img"' in chart.page
        assert not re.search(r"#[0-9a-f]{6}\b", chart.page)


def test_short_names_drop_what_all_share():
    assert short(["a.0.x", "a.1.x"]) == ["a 0", "a 1"]
    assert short(["a.0.x.y", "a.1.z.y"]) == ["0.x", "1.z"]
    assert short(["one"]) == ["one"]
    assert short(["a", "a.b"]) == ["a", "a.b"]
    assert short(["0.x", "1.x"]) == ["0", "1"]


def test_a_long_label_keeps_both_ends():
    rows = [Bar("beginning.of.a.name.that.is.long.end7", 0, 1, "1", "now")]
    label = words(charts.bars("b", "t", rows))[0]
    assert len(label) == 22
    assert label.startswith("beginning.")
    assert label.endswith("s.long.end7")
    assert "…" in label


def test_the_front_ends_at_three_times_what_was_asked():
    points = [Point(1.0 + i, 10.0 * i, i == 1) for i in range(20)]
    near = charts._within_reach(points, Axis("w", "x", 2.0))
    assert [point.gain for point in near] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert charts._within_reach(points, Axis("w", "x")) == points
    assert charts._within_reach(points, Axis("w", " mJ", 2.0)) == points
    assert "w (estimate, log scale)" in words(charts.front("front", points, Axis("w", "x"), "loss", ""))


def test_the_shipped_iteration_is_marked_over_an_axis_of_milliseconds():
    first, second = whole().rounds
    drawn = charts.draw(report(rounds=(first, second.model_copy(update={"shipped": True}))))["rounds"]
    assert {"shipped", "milliseconds"} <= set(words(drawn))
    assert clashes(drawn) == []
    assert "shipped" not in words(charts.draw(report(rounds=(first, second)))["rounds"])


def test_repeated_stages_share_a_bar():
    stages = (
        Stage(name="search", seconds=3),
        Stage(name="build", seconds=1),
        Stage(name="search", seconds=4),
    )
    drawn = words(charts.draw(report(stages=stages))["stages"])
    assert "7.00 s in 2" in drawn
    assert drawn.count("search") == 1

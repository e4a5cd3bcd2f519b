import json
import xml.etree.ElementTree as ET

import pytest
from support import reports

from compress.ir import Budget
from compress.report import family
from compress.report.family import Family
from compress.report.schema import Measured, Stage


def one(speedup, measured, score=0.94, **more):
    timed = (
        None
        if measured is None
        else Measured(speedup=measured, interval95=(measured - 0.05, measured + 0.05))
    )
    stages = (Stage(name="search", seconds=30.5), Stage(name="recover (fast)", seconds=60))
    return reports.report(
        Budget(speedup=speedup), measured=timed, scores=(0.954, score), stages=stages, **more
    )


def made(*found):
    members = [family.member(f"{report.verdict.asked.value:g}x", report) for report in found]
    return family.of(found[-1], members)


def test_the_title_says_everything_that_its_members_run():
    found = made(one(1.5, 1.52), one(3.0, 2.9))
    assert ", fp32, " in family.title(found)
    runs = ("fp32", "fp32 + int8")
    members = [
        mem.model_copy(update={"precision": own}) for mem, own in zip(found.members, runs, strict=True)
    ]
    assert ", fp32 + int8, " in family.title(found.model_copy(update={"members": tuple(members)}))


def test_a_row_says_what_was_asked_measured_and_lost():
    found = made(one(1.5, 1.52, 0.95), one(3.0, 2.9, 0.9))
    assert family.rows(found) == [
        ["1.5x", "1.52x [1.47, 1.57]", "95.0", "0.4 points", "52%", "22.6 MB", "90 s", "met"],
        ["3x", "2.90x [2.85, 2.95]", "90.0", "5.4 points", "52%", "22.6 MB", "90 s", "missed"],
    ]
    assert len(family.header(found)) == 8
    lines = family.text(found).splitlines()
    assert len(lines) == 3
    assert lines[0].index("measured") == lines[1].index("1.52x")


def test_what_was_not_measured_is_called_an_estimate():
    found = made(one(2.0, None))
    assert family.rows(found)[0][1] == "2.10x (estimate)"
    assert family.rows(found)[0][-1] == "not measured"
    assert "speedup (estimate where it was not measured)" in family.front(found).file
    assert "measured speedup" in family.front(made(one(2.0, 2.0))).file


@pytest.mark.parametrize(
    ("measured", "code"),
    [((2.1, 3.1), 0), ((2.1, 2.9), 1), ((1.9, None), 1), ((2.1, None), 3), ((None, None), 3)],
)
def test_the_exit_code_is_that_of_the_worst_member(measured, code):
    found = made(*(one(asked, value) for asked, value in zip((2.0, 3.0), measured, strict=True)))
    assert family.exit_code(found) == code


def test_the_files_hold_every_member(tmp_path):
    found = made(one(1.5, 1.52), one(3.0, 3.05), one(4.0, 4.02))
    family.write(found, tmp_path)
    assert Family.model_validate(json.loads((tmp_path / "family.json").read_text())) == found
    table = (tmp_path / "README.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[-3:]] == ["| 1.5x", "| 3x", "| 4x"]
    page = (tmp_path / "family.html").read_text()
    for name in ("1.5x", "3x", "4x"):
        assert f'<a href="{name}/compression/report.html">{name}</a>' in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_names_are_escaped_on_the_page():
    found = made(one(1.5, 1.52, model="<b>&x"))
    assert "<b>" not in family.html(found)
    assert "&lt;b&gt;&amp;x" in family.html(found)


def test_the_front_starts_at_the_dense_model_and_needs_scores():
    drawn = family.front(made(one(1.5, 1.52, 0.95), one(4.0, 4.1, 0.9)))
    assert ET.fromstring(drawn.file).tag.endswith("svg")
    assert family.front(made(one(1.5, 1.52).model_copy(update={}))) is not None
    bare = made(one(1.5, 1.52)).model_copy(update={"dense_score": None})
    assert family.front(bare) is None
    assert "<svg" not in family.html(bare)


def test_the_page_shows_verdicts_intervals_and_labels():
    found = made(one(1.5, 1.52, 0.95), one(3.0, 2.9, 0.9), one(4.0, None, 0.8))
    page = family.html(found)
    for status, words in (("met", "met"), ("missed", "missed"), ("not_measured", "not measured")):
        assert f'<span class="verdict {status}">{words}</span>' in page
    assert 'data-label="measured">1.52x [1.47, 1.57]' in page
    drawn = family.front(found)
    texts = {node.text for node in ET.fromstring(drawn.file).iter("{http://www.w3.org/2000/svg}text")}
    assert {"1.5x", "3x", "4x"} <= texts
    assert "/home/" not in family.html(made(one(1.5, 1.52, model="/home/me/minilm")))

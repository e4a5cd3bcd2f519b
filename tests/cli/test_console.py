import io
import os
import re
import subprocess
import sys

import pytest

from compress.cli import console
from compress.report import formatting


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (10, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (7384, "2 h 03 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds, words):
    assert formatting.duration(seconds) == words


def test_text_puts_plain_facts_first_and_aligns_tables():
    document = {
        "rows": [{"name": "a", "n": 1}, {"name": "long", "n": 1234567, "extra": 0.51234}],
        "yes": True,
        "none": None,
        "big": 20481.4,
        "list": ["x", 2],
        "empty": {},
        "no_rows": [],
        "by_name": {"dense": {50: 2.0}, "small": {50: 1.0}},
        "pairs": {"fp32": 1, "int8": 16},
        "words": ["two words", "one"],
        "flags": [{"dropped": True, "kind": "ffn"}, {"dropped": False, "kind": "heads"}],
    }
    assert console.plain(document).splitlines() == [
        "yes: yes",
        "none: -",
        "big: 20,481",
        "list: x, 2",
        "empty: none",
        "no_rows: none",
        "",
        "rows",
        "  name          n   extra",
        "  a             1",
        "  long  1,234,567  0.5123",
        "",
        "by_name",
        "         50",
        "  dense   2",
        "  small   1",
        "",
        "pairs",
        "  fp32   1",
        "  int8  16",
        "",
        "words",
        "  two words",
        "  one",
        "",
        "flags",
        "  dropped  kind",
        "  yes      ffn",
        "  no       heads",
    ]


def test_what_libraries_write_goes_to_the_log_and_what_we_write_to_the_user(capfd):
    with console.own_streams() as streams:
        os.write(1, b"native out\n")
        os.write(2, b"native err\n")
        print("python out")
        print("python err", file=sys.stderr)
        streams.out.write("answer\n")
        streams.err.write("message\n")
        swallowed = streams.swallowed()
        assert sorted(swallowed.splitlines()) == ["native err", "native out", "python err", "python out"]
    assert capfd.readouterr() == ("answer\n", "message\n")


def test_the_streams_come_back_after_an_error(capfd):
    with pytest.raises(ZeroDivisionError), console.own_streams():
        raise ZeroDivisionError
    os.write(1, b"out")
    os.write(2, b"err")
    assert capfd.readouterr() == ("out", "err")


def test_what_was_printed_before_and_after_is_the_user_s():
    code = (
        "import faulthandler\nfrom compress.cli import console\nprint('before')\n"
        "with console.own_streams():\n    print('within')\n    assert faulthandler.is_enabled()\n"
        "print('after', faulthandler.is_enabled())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("before\nafter False\n", "")


def test_without_a_place_for_the_log_the_work_goes_on(capfd, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with console.own_streams() as streams:
        print("library")
        streams.out.write("answer\n")
        assert streams.swallowed() == ""
    assert capfd.readouterr() == ("answer\n", "")


def test_libraries_are_asked_to_be_brief_but_the_user_has_the_last_word(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    console.hush()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def test_torch_works_on_all_physical_cores_unless_the_user_says_otherwise(monkeypatch):
    import torch

    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr("compress.measure.timing.physical_cores", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    console.use_cores()
    assert taken == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    console.use_cores()
    assert taken == [7]


def test_a_wide_table_folds_its_names_then_its_last_column():
    row = {
        "speedup_estimate": 1.25, "latency_ms_estimate": 3.5, "mean_layer_error": 0.01, "ffn_kept": 0.9,
        "heads_kept": 1.0, "forms": "3 x block:64x32@0.5, 2 x dense, 10 x int8-dynamic, 12 x rank:96",
    }  # fmt: skip
    assert console.plain({"plans": [row, row | {"forms": "6 x dense"}]}) == (
        "plans\n"
        "             latency   mean\n"
        "   speedup        ms  layer   ffn  heads\n"
        "  estimate  estimate  error  kept   kept  forms\n"
        "      1.25       3.5   0.01   0.9      1  3 x block:64x32@0.5, 2 x dense, 10 x\n"
        "                                          int8-dynamic, 12 x rank:96\n"
        "      1.25       3.5   0.01   0.9      1  6 x dense"
    )


def test_a_table_that_fits_is_left_alone_and_a_number_is_never_folded():
    fits = {"rows": [{"a_b": 1, "words": "x " * 33 + "end"}]}
    assert "a_b  words" in console.plain(fits)
    numbers = {"rows": [{f"a_{name}": 123456 for name in "bcdefghijklmn"}]}
    head, tail, line = console.plain(numbers).splitlines()[1:]
    assert (head.split(), tail.split(), line.split()) == (["a"] * 13, list("bcdefghijklmn"), ["123,456"] * 13)


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self):
        return True


def test_a_verdict_has_color_on_a_terminal_only(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    line = (
        "asked 2.00x · " + "measured 2.06x [2.03, 2.09] on this CPU · " * 3 + "NOT MEASURED · out/report.html"
    )
    assert console.verdict_text(line, "not_measured", io.StringIO()) == line
    shown = console.verdict_text(line, "not_measured", Terminal())
    assert re.search("\x1b\\[1;33mNOT\\sMEASURED\x1b\\[0m", shown)
    bare = re.sub("\x1b\\[[0-9;]*m", "", shown)
    assert bare.split() == line.split()
    assert max(map(len, bare.splitlines())) <= console.WIDE
    assert "\x1b[1;32mMET\x1b[0m" in console.verdict_text("a · MET · b", "met", Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in console.verdict_text(line, "not_measured", Terminal())

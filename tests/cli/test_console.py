import contextlib
import io
import os
import re
import subprocess
import sys
import threading

import pytest

from compress.cli import console
from compress.report import formatting


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def shown(self):
        """What was written, without control sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


def worked(progress, clock, *, steps, seconds, name="work"):
    with progress.stage(name) as tick:
        for done in range(1, steps + 1):
            clock.now += seconds
            tick(done, steps)


def test_lines_say_nothing_about_work_below_two_seconds():
    stream, clock = io.StringIO(), Clock()
    worked(console.Lines(stream, clock), clock, steps=19, seconds=0.1)
    assert stream.getvalue() == ""


def test_lines_come_at_most_every_five_seconds_and_know_the_time_left():
    stream, clock = io.StringIO(), Clock()
    worked(console.Lines(stream, clock), clock, steps=15, seconds=1.0)
    assert stream.getvalue().splitlines() == [
        "work: 2 of 15, about 13 s left",
        "work: 7 of 15, about 8.0 s left",
        "work: 12 of 15, about 3.0 s left",
        "work: done in 15 s",
    ]


def test_a_stage_that_reports_nothing_or_an_empty_total_still_ends_in_a_line():
    stream, clock = io.StringIO(), Clock()
    with console.Lines(stream, clock).stage("export") as tick:
        clock.now += 2.0
        tick(0, 0)
        tick(0, 5)
        tick(5, 5)
    assert stream.getvalue() == "export: done in 2.0 s\n"


def test_a_stage_that_fails_is_not_called_done():
    stream, clock = io.StringIO(), Clock()
    with contextlib.suppress(ZeroDivisionError), console.Lines(stream, clock).stage("export"):
        clock.now += 9
        raise ZeroDivisionError
    assert stream.getvalue() == ""


def test_what_comes_before_the_first_report_is_not_counted_as_its_pace():
    stream, clock = io.StringIO(), Clock()
    with console.Lines(stream, clock).stage("work") as tick:
        clock.now += 20
        tick(1, 9)
        clock.now += 4
        tick(2, 9)
        clock.now += 4
        tick(3, 9)
        clock.now += 1
    assert stream.getvalue().splitlines() == [
        "work: 2 of 9, about 28 s left",
        "work: done in 29 s",
    ]


def test_bars_show_name_share_and_time_left_and_leave_a_line_for_slow_stages_only():
    stream, clock = Terminal(), Clock()
    bars = console.Bars(stream, clock)
    worked(bars, clock, steps=10, seconds=1.0, name="database [1]")
    shown = stream.shown()
    assert "database [1]" in shown
    assert " 50%" in shown
    assert "00:05" in shown
    assert shown.rstrip().endswith("database [1]: 10 s")
    stream.truncate(0)
    worked(bars, clock, steps=10, seconds=0.1, name="quick")
    assert "quick: " not in stream.shown()
    assert "database" not in stream.shown()
    assert "\n" not in stream.getvalue()  # nothing of it stays on the screen


def test_bars_redraw_no_more_than_ten_times_a_second_and_never_on_their_own():
    stream, clock = Terminal(), Clock()
    bars = console.Bars(stream, clock)
    threads = threading.active_count()
    with bars.stage("timing") as tick:
        assert threading.active_count() == threads
        tick(1, 1000)
        before = len(stream.getvalue())
        for done in range(2, 90):
            clock.now += 0.001
            tick(done, 1000)
        assert len(stream.getvalue()) == before
        clock.now += 0.02
        tick(90, 1000)
        assert len(stream.getvalue()) > before


def test_bars_may_be_nested_and_survive_a_failing_stage():
    stream, clock = Terminal(), Clock()
    bars = console.Bars(stream, clock)
    with bars.stage("outer") as outer:
        outer(1, 2)
        with contextlib.suppress(ZeroDivisionError), bars.stage("inner"):
            raise ZeroDivisionError
        stream.truncate(0)
        clock.now += 1
        outer(2, 2)
        assert "outer" in stream.shown()
        assert "inner" not in stream.shown()
        bars.say("a [line] above" + 90 * "-")
    clock.now += 1
    worked(bars, clock, steps=2, seconds=2.0, name="next")
    assert "a [line] above" + 90 * "-" + "\n" in stream.shown()
    assert stream.shown().rstrip().endswith("next: 4.0 s")


def test_the_stream_decides_how_progress_is_shown(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(console.progress(Terminal(), quiet=False), console.Bars)
    assert isinstance(console.progress(io.StringIO(), quiet=False), console.Lines)
    assert isinstance(console.progress(Terminal(), quiet=True), console.Quiet)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(console.progress(Terminal(), quiet=False), console.Lines)


def test_bars_are_as_wide_as_the_terminal_they_are_drawn_on():
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 51, 0, 0))
    clock = Clock()
    with os.fdopen(theirs, "w") as stream:
        assert stream.isatty()
        with console.Bars(stream, clock).stage("n" * 200) as tick:
            clock.now += 1
            tick(1, 2)
    # One read gives what has arrived so far; on Linux a terminal whose writer is gone ends in an error.
    pieces = []
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 4096):
            pieces.append(piece)
    os.close(ours)
    shown = b"".join(pieces).decode()
    assert max(len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)) for line in shown.splitlines()) == 51


def test_quiet_takes_everything_and_shows_nothing(capfd):
    quiet = console.Quiet()
    with quiet.stage("work") as tick:
        tick(1, 2)
        quiet.say("line")
    assert capfd.readouterr() == ("", "")


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

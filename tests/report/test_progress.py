import contextlib
import io
import os
import re
import threading

import pytest

from compress.errors import CompressError
from compress.report import progress


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
    worked(progress.Lines(stream, clock), clock, steps=19, seconds=0.1)
    assert stream.getvalue() == ""


def test_lines_come_at_most_every_five_seconds_and_know_the_time_left():
    stream, clock = io.StringIO(), Clock()
    worked(progress.Lines(stream, clock), clock, steps=15, seconds=1.0)
    assert stream.getvalue().splitlines() == [
        "work: 2 of 15, about 13 s left",
        "work: 7 of 15, about 8.0 s left",
        "work: 12 of 15, about 3.0 s left",
        "work: done in 15 s",
    ]


def test_a_stage_that_reports_nothing_or_an_empty_total_still_ends_in_a_line():
    stream, clock = io.StringIO(), Clock()
    with progress.Lines(stream, clock).stage("export") as tick:
        clock.now += 2.0
        tick(0, 0)
        tick(0, 5)
        tick(5, 5)
    assert stream.getvalue() == "export: done in 2.0 s\n"


def test_a_stage_that_fails_is_not_called_done():
    stream, clock = io.StringIO(), Clock()
    with contextlib.suppress(ZeroDivisionError), progress.Lines(stream, clock).stage("export"):
        clock.now += 9
        raise ZeroDivisionError
    assert stream.getvalue() == ""


def test_what_comes_before_the_first_report_is_not_counted_as_its_pace():
    stream, clock = io.StringIO(), Clock()
    with progress.Lines(stream, clock).stage("work") as tick:
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
    bars = progress.Bars(stream, clock)
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
    bars = progress.Bars(stream, clock)
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
    bars = progress.Bars(stream, clock)
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
    assert isinstance(progress.for_stream(Terminal(), quiet=False), progress.Bars)
    assert isinstance(progress.for_stream(io.StringIO(), quiet=False), progress.Lines)
    assert isinstance(progress.for_stream(Terminal(), quiet=True), progress.Quiet)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress.for_stream(Terminal(), quiet=False), progress.Lines)


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
        with progress.Bars(stream, clock).stage("n" * 200) as tick:
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
    quiet = progress.Quiet()
    with quiet.stage("work") as tick:
        tick(1, 2)
        quiet.say("line")
    assert capfd.readouterr() == ("", "")


def test_a_function_is_called_for_every_stage_report_and_message():
    calls = []
    shown = progress.chosen(lambda *call: calls.append(call))
    with shown.stage("search") as tick:
        tick(1, 4)
        shown.say("measured 2.1x")
    assert calls == [
        ("search", 0, None, None),
        ("search", 1, 4, None),
        ("", None, None, "measured 2.1x"),
        ("search", None, None, None),
    ]


def test_a_caller_chooses_how_progress_is_shown():
    own = progress.Quiet()
    assert isinstance(progress.chosen(None), progress.Quiet)
    assert progress.chosen(own) is own
    assert isinstance(progress.chosen("terminal"), (progress.Lines, progress.Bars))
    with pytest.raises(CompressError, match="progress='loud' is not known; give None"):
        progress.chosen("loud")

"""Progress of long work: nothing, plain lines, bars on a terminal or in a notebook, or a caller's function.

No thread draws here: a bar that redraws itself wakes up in the middle of a timed run and slows it, so
bars and lines move only when the work reports.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO, runtime_checkable

from rich import progress as bars
from rich.console import Console

from compress.errors import CompressError
from compress.report.formatting import duration

SLOW_S = 2.0  # work shorter than this needs no progress
EVERY_S = 5.0  # the least time between two plain lines of one stage
REDRAW_S = 0.1

Tick = Callable[[int, int], None]
Clock = Callable[[], float]
Function = Callable[[str, int | None, int | None, str | None], object]


@runtime_checkable
class Progress(Protocol):
    """What a compilation reports its progress to."""

    def stage(self, name: str) -> AbstractContextManager[Tick]:
        """Begin a stage; the callback takes the work done and the work in all."""

    def say(self, line: str) -> None:
        """Show one line that is worth reading even without a terminal."""


class Quiet:
    """No progress at all."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Tick]:
        """Nothing is shown."""
        yield lambda done, total: None

    def say(self, line: str) -> None:
        """Nothing is shown."""


class Lines:
    """Plain lines, for logs and pipes: at most one every few seconds in each stage."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock

    @contextmanager
    def stage(self, name: str) -> Iterator[Tick]:
        """Nothing below two seconds, then how far it is, at the end how long it took.

        The time left follows from the pace since the first report: what comes before that (a teacher's
        answers, a runtime that starts) is not repeated.
        """
        began = self._clock()
        due = began + SLOW_S
        first: tuple[float, int] | None = None

        def tick(done: int, total: int) -> None:
            nonlocal due, first
            now = self._clock()
            first = first or (now, done)
            if now < due or not first[1] < done < total:
                return
            due = now + EVERY_S
            left = (now - first[0]) * (total - done) / (done - first[1])
            self.say(f"{name}: {done} of {total}, about {duration(left)} left")

        yield tick
        took = self._clock() - began
        if took >= SLOW_S:
            self.say(f"{name}: done in {duration(took)}")

    def say(self, line: str) -> None:
        """Write one line at once."""
        self._stream.write(line + "\n")
        self._stream.flush()


class Bars:
    """Bars on a terminal, one for every stage that is under way; a finished slow stage leaves a line."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._console = Console(file=stream, width=_width(stream), highlight=False, markup=False)
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(bar_width=30),
            bars.TaskProgressColumn(),
            bars.TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            get_time=clock,
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[Tick]:
        """A bar with the time left; stages may be nested."""
        began = drawn = self._clock()
        bar = self._bars.add_task(name, total=None)
        self._bars.start()
        self._bars.refresh()

        def tick(done: int, total: int) -> None:
            nonlocal drawn
            self._bars.update(bar, completed=done, total=total)
            if self._clock() - drawn >= REDRAW_S:
                drawn = self._clock()
                self._bars.refresh()

        try:
            yield tick
        finally:
            self._bars.remove_task(bar)
            if not self._bars.tasks:
                self._bars.stop()
        took = self._clock() - began
        if took >= SLOW_S:
            self.say(f"{name}: {duration(took)}")

    def say(self, line: str) -> None:
        """One line above the bars."""
        self._console.print(line, soft_wrap=True)


def for_stream(stream: TextIO, *, quiet: bool) -> Quiet | Lines | Bars:
    """What suits the stream: bars on a terminal, lines elsewhere, nothing when quiet."""
    if quiet:
        return Quiet()
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return Bars(stream)
    return Lines(stream)


def _width(stream: TextIO) -> int | None:
    """Columns of the terminal behind `stream`; rich looks only at the standard streams."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


class Calls:
    """Progress as calls of a function `(stage, done, total, message)`.

    A stage begins with `(stage, 0, None, None)`, reports `(stage, done, total, None)` and ends with
    `(stage, None, None, None)`; a line comes as `("", None, None, message)`.
    """

    def __init__(self, function: Function) -> None:
        self._function = function

    @contextmanager
    def stage(self, name: str) -> Iterator[Tick]:
        """Call the function when the stage begins, at every report and at its end."""
        self._function(name, 0, None, None)

        def tick(done: int, total: int) -> None:
            self._function(name, done, total, None)

        yield tick
        self._function(name, None, None, None)

    def say(self, line: str) -> None:
        """Call the function with a message."""
        self._function("", None, None, line)


def chosen(progress: "Progress | Function | str | None") -> Progress:
    """What a caller of the Python API asked for: None is silent, "terminal" draws on standard error.

    In a notebook "terminal" writes plain lines below the cell.

    Raises:
        CompressError: it is neither of these, a function nor a `Progress`.
    """
    if progress is None:
        return Quiet()
    if progress == "terminal":
        return for_stream(sys.stderr, quiet=False)
    if isinstance(progress, Progress):
        return progress
    if callable(progress):
        return Calls(progress)
    raise CompressError(
        f'progress={progress!r} is not known; give None, "terminal", or a function of '
        "(stage, done, total, message)"
    )

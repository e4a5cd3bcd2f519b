"""What `compress.compile` returns: a finished compilation, or a family of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from compress.export import huggingface
from compress.report import family, schema
from compress.report.family import Family
from compress.report.schema import Report, Verdict


@dataclass(frozen=True)
class Result:
    """A finished compilation.

    Attributes:
        out: the output directory.
        report: all that was measured and decided.
        factory: gives the dense model that `model` is rebuilt from; None for a model of transformers.
    """

    out: Path
    report: Report
    factory: Callable[[], nn.Module] | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether the budget was met, with what was measured and predicted."""
        return self.report.verdict

    @property
    def exit_code(self) -> int:
        """What the command line ends with: 0 met, 1 missed, 3 not measured here."""
        return schema.exit_code(self.report)

    @cached_property
    def model(self) -> nn.Module:
        """The compressed model, loaded from `out` when it is first asked for."""
        return huggingface.read(self.out, self.factory)


@dataclass(frozen=True)
class FamilyResult:
    """Several compressed models that were made from one dense model in one run.

    Attributes:
        out: the directory that holds one output directory for each member.
        family: a row for every member.
        members: their results, from the mildest to the hardest.
    """

    out: Path
    family: Family
    members: tuple[Result, ...]

    @property
    def exit_code(self) -> int:
        """That of the member that did worst."""
        return family.exit_code(self.family)

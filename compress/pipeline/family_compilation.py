"""A family from one run: pruned, recovered, and pruned further from the recovered weights.

Budgets are taken from the mildest to the hardest. Every member is a whole output of its own, in a
directory named after what was asked; statistics are collected again on the weights it starts from,
while the teacher and the baseline stay the dense model. Where the hidden width may be cut, a member begins
at the width of the one before, and may become narrower, never wider. A killed run goes on with the member
that it was at.
"""

import shutil
from pathlib import Path

from compress import artifacts
from compress.ir import Budget
from compress.pipeline import compilation
from compress.pipeline.job import prepare
from compress.recipe import Recipe
from compress.report import family
from compress.report.family import Family
from compress.report.progress import Progress
from compress.tasks.task import Task

SHARED = tuple(
    f"{artifacts.WORK}/{name}" for name in ("dense.onnx", "dense.json", "sites.json", "costs.json")
)


def run(recipe: Recipe, progress: Progress, task: Task | None = None) -> Family:
    """Compile one model for each of the recipe's speedups, from the recipe's model or that of `task`.

    Raises:
        CompressError: as for a single model; members that were finished before stay.
    """
    place = Path(recipe.out)
    artifacts.claim(place)
    speedups = sorted(set(recipe.speedups))
    done, before, members = None, None, []
    for number, speedup in enumerate(speedups, 1):
        name = f"{speedup:g}x"
        progress.say(f"member {number} of {len(speedups)}: {name}")
        if before is not None:
            _share(before, place / name)
        asked = {"budget": Budget(speedup=speedup), "speedups": (), "out": str(place / name)}
        done = compilation.compiled(prepare(recipe.model_copy(update=asked), progress, task), done)
        before = place / name
        members.append(family.member(name, done.report))
        found = family.of(done.report, members)
        family.write(found, place)
    return found


def _share(before: Path, after: Path) -> None:
    """Give a member what was found out about the dense model; hashes say whether it still holds."""
    source, folder = before / artifacts.MARKER, artifacts.claim(after)
    for name in SHARED:
        if not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)

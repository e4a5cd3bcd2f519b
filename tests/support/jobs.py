"""What the tests of several modules share: taken out of test_recovery."""

from compress import artifacts
from compress.ir import Budget
from compress.pipeline.job import Job, Stages
from compress.recipe import Recipe, Recovery
from compress.report.progress import Lines
from support.classifier import padded


class Said(Lines):
    """Keeps what is said."""

    def __init__(self):
        self.lines = []
        super().__init__(None)

    def say(self, line):
        self.lines.append(line)


def job(folder, task=None, **changes):
    known, sites = padded()
    task = task or known
    wanted = Recovery(**({"mode": "fast", "epochs": 3, "batch": 8, "rate": 3e-3} | changes))
    recipe = Recipe(target="cpu", budget=Budget(speedup=2.0), out=str(folder), recovery=wanted)
    place = artifacts.claim(folder)
    return Job(recipe, task, None, place, Stages(Said()), "m", "k", None, sites, ())

"""What two processes do in test_several.py: `python crew.py FOLDER` in each, told apart by RANK.

The first one first works alone, into the same folder, to be compared with.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from compress import artifacts
from compress.calibration import activation_statistics
from compress.distributed import collectives
from compress.errors import CompressError
from compress.ir import Budget
from compress.pipeline import recovery, worker
from compress.pipeline.job import Job, Stages, load
from compress.recipe import Calibration, Recipe, Recovery
from compress.sites import prune
from compress.sites.discovery import find_sites
from compress.sites.prune import Removal
from support.classifier import Padded

SECOND = int(os.environ.get("RANK", "0")) == 1
SIZE = 5  # 48 samples: ten batches, the last of which has three
TUNING = {"mode": "fast", "epochs": 2, "batch": 7, "rate": 3e-3, "checkpoint_s": 0.0}


class Double(Padded):
    """The same in float64, where sums in another order differ in the last digits alone."""

    def __init__(self):
        super().__init__(samples=22)
        self.model.float = self.model.double  # what loading a task does to its model

    def batches(self, split, size, limit=None):
        """Without a validation split, so that the last weights are kept."""
        return iter(()) if split == "validation" else super().batches(split, size, limit)


class Poisoned(Padded):
    """One token that makes NaN, in the second batch alone."""

    def __init__(self):
        super().__init__()
        self.ids[self.ids == 5] = 6
        self.ids[SIZE, 0] = 5

        def hook(module, args, output):
            return torch.where((args[0] == 5)[..., None], float("nan"), output)

        self.model.bert.embeddings.word_embeddings.register_forward_hook(hook)


class Other(Padded):
    """Data that is another one in every process."""

    def __init__(self):
        super().__init__()
        self.ids[0, 0] = 3 + SECOND


class Buggy(Padded):
    """A model with a bug in the second process."""

    def __init__(self):
        super().__init__()
        if SECOND:
            self.model.register_forward_pre_hook(lambda module, args: [][1])


class Unreadable(Padded):
    """A task that the second process cannot load."""

    def __init__(self):
        super().__init__()
        if SECOND:
            raise CompressError("no such file here")


class Killed(Exception):  # noqa: N818
    """What ends a run from outside."""


class Silent:
    """Progress that nobody sees; it ends a run after some steps."""

    def __init__(self, steps=None):
        self.steps = steps

    @contextlib.contextmanager
    def stage(self, name):
        def tick(done, work):
            if done == self.steps:
                raise Killed

        yield tick

    def say(self, line):
        pass


def recipe(kind, out, **changes):
    return Recipe(
        model=f"crew:{kind.__name__}",
        target="cpu",
        budget=Budget(speedup=2.0),
        out=str(out),
        calibration=Calibration(batch=SIZE),
        recovery=Recovery(**(TUNING | changes)),
    )


def loaded(asked):
    """The task of a recipe in all processes, its batches and sites."""
    collectives.send_command("load", {"recipe": asked.model_dump(mode="json")})
    task, batches = load(asked)
    return task, batches, find_sites(Padded().model, task.example(1, 9)).sites


def statistics(folder, **changes):
    task, batches, sites = loaded(recipe(Padded, folder))
    activation_statistics.collect(task, sites, batches, folder, **changes)


def tuned(folder, steps=None):
    """A tuned student of which one site was cut, and another has a pattern of zeros."""
    asked = recipe(Double, folder)
    task, _, sites = loaded(asked)
    removals = {site.name: Removal(torch.arange(site.units // 2)) for site in sites[1:]}
    zeros = task.model.get_parameter(sites[0].writer).detach().clone()
    zeros[torch.rand(zeros.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    removals[sites[0].name] = Removal(torch.arange(sites[0].units), weight=zeros, form="block:1x1@0.5")
    model = prune.shrink(task.model, sites, removals)
    place = artifacts.claim(folder)
    job = Job(asked, task, None, place, Stages(Silent(steps)), "m", "k", None, tuple(sites), ())
    recovery.recover(job, model, removals)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "w.safetensors"
    )


def refused(kind, folder):
    try:
        task, batches, sites = loaded(recipe(kind, folder))
        activation_statistics.collect(task, sites, batches, folder)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def lead(folder):
    """All of it as the first process."""
    said = {}
    statistics(folder / "one", taylor=True, readers=True)
    tuned(folder / "tuned one")
    with contextlib.suppress(Killed):
        tuned(folder / "tuned late", steps=5)
    collectives.join()
    statistics(folder / "two", taylor=True, readers=True)
    statistics(folder / "passes", taylor=True, readers=True, memory_mb=0)
    tuned(folder / "tuned two")
    tuned(folder / "tuned late")
    for kind in (Poisoned, Other, Buggy, Unreadable):
        said[kind.__name__] = refused(kind, folder / kind.__name__)
    statistics(folder / "after", taylor=True, readers=True)
    collectives.send_command(collectives.END, {"code": 0})
    collectives.all_reduce = lambda tensors: None
    statistics(folder / "blind", taylor=True, readers=True)
    tuned(folder / "tuned blind")
    collectives.stop_followers(7)
    (folder / "said.json").write_text(json.dumps(said))


def main():
    folder = Path(sys.argv[1])
    if not SECOND:
        lead(folder)
        return 7
    collectives.join()
    worker.serve()
    collectives.all_reduce = lambda tensors: None
    return worker.serve()


if __name__ == "__main__":
    sys.modules["crew"] = sys.modules["__main__"]
    sys.exit(main())

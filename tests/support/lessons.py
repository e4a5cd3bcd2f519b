"""What the tests of several modules share: taken out of test_tune."""

import torch

from compress.recipe import Recovery
from compress.sites import prune
from compress.sites.prune import Removal
from compress.tasks.loading import Batch
from compress.training import distillation
from compress.training.distillation import Teacher
from compress.training.distillation_data import DistillationData
from support.classifier import padded

SIZE = 8


FAST = {"mode": "fast", "epochs": 2, "batch": SIZE, "rate": 3e-3, "checkpoint_s": 0.0}


def student(units=0.5):
    task, sites = padded()
    kept = {site.name: Removal(torch.arange(max(1, int(site.units * units)))) for site in sites}
    return prune.shrink(task.model, sites, kept)


def lesson(folder, labels=True, **changes):
    task, sites = padded()
    at = distillation.hidden_states(task.model, sites)
    folder.mkdir(exist_ok=True)

    def batches():
        for batch in task.batches("calibration", SIZE):
            yield batch if labels else Batch(batch.inputs, None, batch.real)

    teacher = Teacher(task, task.model, at, folder, 10)
    return DistillationData(task, teacher, batches, len(list(batches())), Recovery(**(FAST | changes)))


def judge(model):
    """Nearness to the dense model on the data of the lesson."""
    task, _ = padded()
    with torch.no_grad():
        away = [
            task.divergence(model(**batch.inputs).logits, task.model(**batch.inputs).logits, batch).item()
            for batch in task.batches("validation", 48)
        ]
    return -sum(away)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())

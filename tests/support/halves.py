"""What two processes do in test_sharding.py: `python halves.py FOLDER PORT`, first alone, then in two."""

import contextlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import nn

from compress.distributed import collectives
from compress.errors import CompressError
from compress.recipe import Recovery
from compress.tasks.loading import Batch
from compress.training import trainer

STEPS = 6


class Killed(Exception):  # noqa: N818
    """What ends a run from outside."""


class Net(nn.Module):
    """Three layers of seven channels, which two processes cannot share evenly, and a scalar."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))
        self.head = nn.Linear(7, 1)
        self.heat = nn.Parameter(torch.tensor(0.5))
        self.double()

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.heat * self.head(x)


class Lesson:
    """Batches of five random inputs, the last layers' answers to which are to be zero."""

    teacher = SimpleNamespace(at=())
    count = STEPS // 2

    def __init__(self, shard):
        self.wanted = Recovery(mode="fast", epochs=2, rate=1e-2, clip=0.1, checkpoint_s=0.0, shard=shard)

    def batches(self):
        generator = torch.Generator().manual_seed(1)
        for _ in range(self.count):
            yield Batch({"x": torch.randn(5, 7, generator=generator, dtype=torch.float64)})

    def loss(self, model, number, batch, factors=()):
        mine, part = collectives.split(batch)
        return part.samples * (model(**mine.inputs) - 1).square().mean()


def held(run):
    """Bytes of weights, best weights and moments that this process holds."""
    tensors = [
        *run.model.parameters(),
        *run.held.model.parameters(),
        *run.values.values(),
        *run.best.values(),
    ]
    tensors += [one[key] for one in run.optimizer.state.values() for key in trainer.MOMENTS]
    own = [one.to_local() if hasattr(one, "to_local") else one for one in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in (one.untyped_storage() for one in own)}.values())


def tuned(folder, name, said, *, shard=False, steps=None):
    """Tune a net whose first layer has a pattern of zeros; the first process keeps what came of it."""
    first, model = not collectives.rank(), Net()
    zeros = torch.rand(7, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    path = folder / f"{name} checkpoint.safetensors" if first else None
    words = said.setdefault(name, {})

    def progress(done, work):
        words["zeros"] = all(bool((value.detach()[mask] == 0).all()) for value, mask in run._zeros)
        words["bytes"], words["account"] = held(run), run.held_bytes
        words["tuned"] = sum(value.nbytes for value in run.values.values())
        words["shell"] = sum(value.numel() for value in model.parameters())
        if done == steps and first:
            raise Killed

    def judge(one):
        words["judged"] = float(one(torch.ones(1, 7, dtype=torch.float64)).detach())
        return 0.0

    with collectives.synchronized():
        run = trainer.TrainingRun(
            model, Lesson(shard), zeros={"layers.0.weight": zeros}, checkpoint=path, made_from="x"
        )
        words["from"] = run.state.step
        trainer.train(run, judge, progress)
    if first:
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    words["same"] = float(sum(value.double().sum() for value in model.state_dict().values()))


def broken(folder):
    """What the other process is told when one fails in the middle of a step."""
    lesson = Lesson(shard=True)
    try:
        with collectives.synchronized():
            run = trainer.TrainingRun(Net(), lesson)
            if collectives.rank():
                run.held.model.layers[1].register_forward_hook(refuse)
            trainer.train(run, lambda one: 0.0)
    except CompressError as error:
        return str(error)
    return None


def refuse(module, arguments, output):
    raise CompressError("no such layer here")


def lonely(own, whole):
    """What a process has of a sum to which no other one adds."""
    own.copy_(whole.chunk(2)[collectives.rank()])


def main():
    folder, said = Path(sys.argv[1]), {}
    tuned(folder, "one", said)
    with contextlib.suppress(Killed):
        tuned(folder, "late", said, steps=4)
    child = os.fork()
    rank = 0 if child else 1
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
    os.environ |= place
    collectives.join()
    tuned(folder, "whole", said)
    tuned(folder, "shards", said, shard=True)
    tuned(folder, "late", said, shard=True)
    with contextlib.suppress(Killed, RuntimeError):
        tuned(folder, "again", said, shard=True, steps=4)
    tuned(folder, "again", said, shard=True)
    said["broken"] = broken(folder)
    collectives.reduce_scatter = lonely
    tuned(folder, "lonely", said, shard=True)
    (folder / f"said{rank}.json").write_text(json.dumps(said))
    return os.waitpid(child, 0)[1] if child else 0


if __name__ == "__main__":
    sys.exit(main())

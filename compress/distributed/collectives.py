"""One process among several: its share of the data, and sums over all of them.

The first process leads. It calls the others to a piece of work (`call`, `called`), which all of them then
do inside of `working`: the same code over shares of the data, with sums exchanged. Every exchange begins by
asking whether all are well, so an error in any process ends that piece of work in all of them, with its
message. Between two pieces of work the others wait without computing. Alone, every function here gives back
what it was given.
"""

import json
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compress import artifacts
from compress.distributed.process_env import process_info
from compress.errors import CompressError
from compress.tasks.task import Batch

TIMEOUT = timedelta(days=20)  # the first process may measure and search for days before it calls
BUCKET_ELEMENTS = 2**24  # numbers that are added up in one exchange
END = "end"

Arguments = dict[str, Any]
T = TypeVar("T")


class RemoteError(Exception):
    """Something that every process knows of already."""


class RemoteRequestError(RemoteError, CompressError):
    """A request that another process, or all of them together, cannot carry out."""


class RemoteFailureError(RemoteError, RuntimeError):
    """A bug in another process, with its trace."""


@dataclass(frozen=True)
class Command:
    """A piece of work: its name, what it is about, and tensors by name."""

    act: str
    words: Arguments
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class BatchShare:
    """What share of a batch a process has: of its samples, of its tokens, and of what looks at all pairs.

    Losses are means; a mean over this process's part, times its share, adds up over all processes to the
    mean over the batch. `before` and `after` count the samples that other processes have.
    """

    samples: float = 1.0
    tokens: float = 1.0
    pairs: float = 1.0
    before: int = 0
    after: int = 0

    def gather_rows(self, rows: Tensor) -> Tensor:
        """[batch, features] of all processes, from [part, features]; gradients reach this one's rows."""
        if not self.before and not self.after:
            return rows
        there = rows.new_zeros(self.before + len(rows) + self.after, rows.shape[1])
        there[self.before : self.before + len(rows)] = rows.detach()
        all_reduce([there])
        return torch.cat([there[: self.before], rows, there[self.before + len(rows) :]])


WHOLE = BatchShare()


def join() -> None:
    """Meet the other processes that were launched with this one, if there are any.

    Raises:
        CompressError: they do not meet.
    """
    if process_info().size == 1:
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise CompressError(
            f"the {process_info().size} processes that were launched do not find each other ({error}); "
            "check the addresses and ports that torchrun was given"
        ) from error


def stop_followers(code: int) -> None:
    """The first process's last word: the others may end, with this exit code."""
    try:
        send_command(END, {"code": code})
    except RemoteError:
        return  # they ended before it was said
    if _joined():
        dist.destroy_process_group()


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """The number of this process; 0 leads."""
    return dist.get_rank() if _joined() else 0


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def send_command(act: str, words: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    """As the first process: have the others begin a piece of work; as another one: nothing."""
    if size() > 1 and not rank():
        _send(Command(act, dict(words), dict(tensors or {})))


def receive_command() -> Command:
    """As another process: wait for the next piece of work."""
    return _receive()


@contextmanager
def synchronized() -> Iterator[None]:
    """What all processes do together; an error in one of them is raised in every one.

    Raises:
        RefusedElsewhereError: a CompressError of another process, or one has ended.
        BrokenElsewhereError: any other error there.
    """
    try:
        yield
        _check_errors()
    except RemoteError:
        raise
    except BaseException as error:
        _check_errors(error)
        raise


def share(items: Sequence[T]) -> Sequence[T]:
    """Every n-th item, from this process's number on."""
    return items[rank() :: size()]


def split(batch: Batch) -> tuple[Batch, BatchShare]:
    """This process's samples of a batch; a batch of fewer samples than processes is done by each of them.

    Inputs are split where their first dimension is the batch's, and given whole where it is not.
    """
    if size() == 1:
        return batch, WHOLE
    known = (batch.real, batch.labels, *batch.inputs.values())
    count = len(next(tensor for tensor in known if tensor is not None))
    if count < size():
        return batch, BatchShare(1 / size(), 1 / size(), 1 / size())
    start, stop = (count * number // size() for number in (rank(), rank() + 1))
    rows = slice(start, stop)
    inputs = {
        name: value[rows] if value.shape[:1] == (count,) else value for name, value in batch.inputs.items()
    }
    labels = None if batch.labels is None else batch.labels[rows]
    real = None if batch.real is None else batch.real[rows]
    samples = (stop - start) / count
    tokens = samples if real is None or batch.real is None else float(real.sum() / batch.real.sum())
    return Batch(inputs, labels, real), BatchShare(samples, tokens, 1.0, start, count - stop)


def batch_bytes(batches: Iterable[Batch]) -> Iterator[bytes]:
    """Everything in the batches, for `alike`."""
    for batch in batches:
        for value in (*batch.inputs.values(), batch.labels, batch.real):
            yield b"" if value is None else value.cpu().contiguous().numpy().tobytes()


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Put the sum over all processes into each tensor; they have the same shapes everywhere."""
    if size() == 1:
        return
    _check_errors()
    for numbers, group in _buckets(tensors):
        _all_reduce(numbers, dist.ReduceOp.SUM)
        parts = numbers.split_with_sizes([tensor.numel() for tensor in group])
        for tensor, part in zip(group, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def all_reduce_gradients(values: Sequence[Tensor]) -> None:
    """Sum the gradients of parameters; one that has none in any process stays without."""
    if size() == 1 or not values:
        return
    used = torch.tensor([value.grad is not None for value in values], dtype=torch.float32)
    all_reduce([used])
    for value, some in zip(values, used.tolist(), strict=True):
        if some and value.grad is None:
            value.grad = torch.zeros_like(value)
    all_reduce([value.grad for value in values if value.grad is not None])


def all_gather(whole: Tensor, own: Tensor) -> None:
    """Put the processes' vectors, which are equally long, into `whole` one after the other."""
    _check_errors()
    with _connection_errors():
        (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(whole, own)


def reduce_scatter(own: Tensor, whole: Tensor) -> None:
    """Put into `own` this process's stretch of the sum of all `whole`, which is as long as all of them."""
    _check_errors()
    with _connection_errors():
        (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(own, whole)


def broadcast(words: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Command:
    """What the first process says here, in all of them; what the others give is not looked at."""
    own = Command("", dict(words), dict(tensors or {}))
    if size() == 1:
        return own
    _check_errors()
    if rank():
        return _receive()
    _send(own)
    return own


def broadcast_model(model: nn.Module) -> None:
    """Give the tensors of the first process's model to the others, whose models were made alike.

    Only a bias may be there in one and not in another: writers gain one when they are pruned.
    """
    if size() == 1:
        return
    own = {name: [str(value.dtype), list(value.shape)] for name, value in model.named_parameters()}
    first: dict[str, tuple[str, list[int]]] = broadcast({"own": own}).words["own"]
    for name in own.keys() ^ first.keys():
        place, _, last = name.rpartition(".")
        if last == "bias":
            gained = nn.Parameter(torch.zeros(first[name][1])) if name in first else None
            model.get_submodule(place).register_parameter("bias", gained)
    now = [(name, value.dtype, value.shape) for name, value in model.named_parameters()]
    check_identical("model", map(str, sorted(now, key=lambda one: one[0])))
    for value in (*map(model.get_parameter, first), *model.buffers()):
        whole = value.detach().cpu().contiguous()
        _broadcast_tensor(whole)
        value.detach().copy_(whole)


def check_identical(what: str, parts: Iterable[str | bytes]) -> None:
    """Make sure that all processes have the same `parts`, which are hashed.

    Raises:
        RefusedElsewhereError: one has something else than the first, in every process.
    """
    if size() == 1:
        return
    _check_errors()
    found = _all_texts(artifacts.digest(*parts))
    for number, text in enumerate(found):
        if text != found[0]:
            raise RemoteRequestError(
                f"process {number} of {size()} has another {what} than the first; give all of them the same "
                "files, and fix the seed of whatever a factory draws"
            )


def _check_errors(own: BaseException | None = None) -> None:
    """Ask whether all are well; one that is not tells why instead."""
    if size() == 1:
        return
    failed = torch.tensor([own is not None], dtype=torch.int64)
    _all_reduce(failed, dist.ReduceOp.MAX)
    if not failed:
        return
    said = {"refused": isinstance(own, CompressError), "text": _trace(own)}
    found = _all_texts("" if own is None else json.dumps(said))
    if own is not None:
        return
    number = next(number for number, text in enumerate(found) if text)
    other = json.loads(found[number])
    kind = RemoteRequestError if other["refused"] else RemoteFailureError
    raise kind(f"process {number} of {size()}: {other['text']}")


def _trace(error: BaseException | None) -> str:
    """The message of a refusal, all that is known of anything else."""
    if error is None or isinstance(error, CompressError):
        return str(error)
    last = f"{type(error).__name__}: {error}".splitlines()[0]
    return last + "\n" + "".join(traceback.format_exception(error))


def _all_texts(own: str) -> list[str]:
    """One text of every process."""
    data = own.encode()
    longest = torch.tensor([len(data)])
    _all_reduce(longest, dist.ReduceOp.MAX)
    rows = torch.zeros(size(), int(longest), dtype=torch.uint8)
    rows[rank(), : len(data)] = _bytes(data)
    if rows.numel():
        _all_reduce(rows, dist.ReduceOp.SUM)
    return [bytes(row.tolist()).rstrip(b"\x00").decode() for row in rows]


def _send(message: Command) -> None:
    """Give every other process a message: its length, its words, its tensors one by one."""
    listed = [[name, str(value.dtype), list(value.shape)] for name, value in message.tensors.items()]
    data = json.dumps({"act": message.act, "words": message.words, "tensors": listed}).encode()
    _broadcast_tensor(torch.tensor([len(data)]))
    _broadcast_tensor(_bytes(data))
    for value in message.tensors.values():
        _broadcast_tensor(value.detach().cpu().contiguous())


def _receive() -> Command:
    length = torch.zeros(1, dtype=torch.int64)
    _broadcast_tensor(length)
    data = torch.empty(int(length), dtype=torch.uint8)
    _broadcast_tensor(data)
    said = json.loads(bytes(data.tolist()))
    tensors = {}
    for name, kind, shape in said["tensors"]:
        tensors[name] = torch.empty(shape, dtype=getattr(torch, kind.removeprefix("torch.")))
        _broadcast_tensor(tensors[name])
    return Command(said["act"], said["words"], tensors)


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _broadcast_tensor(tensor: Tensor) -> None:
    """Overwrite a contiguous tensor by the first process's, whatever its type."""
    if tensor.numel():
        with _connection_errors():
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)


def _all_reduce(tensor: Tensor, how: dist.ReduceOp.RedOpType) -> None:
    with _connection_errors():
        dist.all_reduce(tensor, how)


@contextmanager
def _connection_errors() -> Iterator[None]:
    """The libraries' word for a process that has ended, in ours."""
    try:
        yield
    except RuntimeError as error:
        raise RemoteRequestError(
            f"one of the {size()} processes has ended, or cannot be reached any more ({error}); finished "
            "stages are kept, and the same command goes on from there"
        ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Tensors of one type in a row as one vector each time, so that small ones travel together."""
    group: list[Tensor] = []
    for tensor in tensors:
        held = sum(one.numel() for one in group)
        if group and (group[0].dtype != tensor.dtype or held + tensor.numel() > BUCKET_ELEMENTS):
            yield torch.cat([one.reshape(-1) for one in group]), group
            group = []
        group.append(tensor)
    if group:
        yield torch.cat([one.reshape(-1) for one in group]), group

"""Collective operations of several processes: commands, shares of batches, reductions and broadcasts.

The first process leads. It sends a command (`send_command`, `receive_command`), which all processes execute
inside `synchronized`: the same code on shares of the data, with reduced sums. Before every exchange the
processes agree that none has failed, so an error in one of them ends the command in all, with its message.
Between commands the other processes wait without computing. In a single process every function returns its
input.
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

TIMEOUT = timedelta(days=20)  # the first process may measure and search for days between commands
BUCKET_ELEMENTS = 2**24  # per reduction
END = "end"

Arguments = dict[str, Any]
T = TypeVar("T")


class RemoteError(Exception):
    """An error of another process, which is known in every process."""


class RemoteRequestError(RemoteError, CompressError):
    """A CompressError of another process, or of all of them together."""


class RemoteFailureError(RemoteError, RuntimeError):
    """An unexpected error in another process, with its traceback."""


@dataclass(frozen=True)
class Command:
    """A command with JSON arguments and named tensors."""

    act: str
    words: Arguments
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class BatchShare:
    """The share of a batch that this process has: of samples, of tokens, and of losses over all pairs.

    Losses are means; the mean over this part times its share sums over all processes to the mean over the
    batch. `before` and `after` count the samples of lower and of higher ranks.
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
    """Initialize the process group, if several processes were launched.

    Raises:
        CompressError: the group cannot be initialized.
    """
    if process_info().size == 1:
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise CompressError(
            f"the {process_info().size} launched processes cannot connect ({error}); "
            "check the master address and port given to torchrun"
        ) from error


def stop_followers(code: int) -> None:
    """As the first process: end the others with this exit code."""
    try:
        send_command(END, {"code": code})
    except RemoteError:
        return  # they have ended already
    if _joined():
        dist.destroy_process_group()


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """The number of this process; 0 leads."""
    return dist.get_rank() if _joined() else 0


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def send_command(act: str, words: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    """Send a command from the first process to all others; does nothing in those."""
    if size() > 1 and not rank():
        _send(Command(act, dict(words), dict(tensors or {})))


def receive_command() -> Command:
    """Wait for the next command of the first process."""
    return _receive()


@contextmanager
def synchronized() -> Iterator[None]:
    """Run the same block in all processes; an error in one of them is raised in every one.

    Raises:
        RefusedElsewhereError: a CompressError of another process, or one has ended.
        BrokenElsewhereError: any other error in another process.
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
    """Every n-th item from the rank of this process on, with n processes."""
    return items[rank() :: size()]


def split(batch: Batch) -> tuple[Batch, BatchShare]:
    """The samples of a batch that belong to this process.

    A batch with fewer samples than processes goes to each of them. Inputs are split along a first
    dimension equal to the batch size; others are returned whole.
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
    """The bytes of all tensors in the batches, for `check_identical`."""
    for batch in batches:
        for value in (*batch.inputs.values(), batch.labels, batch.real):
            yield b"" if value is None else value.cpu().contiguous().numpy().tobytes()


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Sum every tensor over all processes, in place; shapes must be equal everywhere."""
    if size() == 1:
        return
    _check_errors()
    for numbers, group in _buckets(tensors):
        _all_reduce(numbers, dist.ReduceOp.SUM)
        parts = numbers.split_with_sizes([tensor.numel() for tensor in group])
        for tensor, part in zip(group, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def all_reduce_gradients(values: Sequence[Tensor]) -> None:
    """Sum gradients over all processes; a parameter without a gradient in any process stays without."""
    if size() == 1 or not values:
        return
    used = torch.tensor([value.grad is not None for value in values], dtype=torch.float32)
    all_reduce([used])
    for value, some in zip(values, used.tolist(), strict=True):
        if some and value.grad is None:
            value.grad = torch.zeros_like(value)
    all_reduce([value.grad for value in values if value.grad is not None])


def all_gather(whole: Tensor, own: Tensor) -> None:
    """Concatenate the equally long vectors of all processes into `whole`."""
    _check_errors()
    with _connection_errors():
        (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(whole, own)


def reduce_scatter(own: Tensor, whole: Tensor) -> None:
    """Sum `whole` over all processes and store the part of this process in `own`."""
    _check_errors()
    with _connection_errors():
        (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(own, whole)


def broadcast(words: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Command:
    """Return the first process's arguments and tensors in every process; those of others are ignored."""
    own = Command("", dict(words), dict(tensors or {}))
    if size() == 1:
        return own
    _check_errors()
    if rank():
        return _receive()
    _send(own)
    return own


def broadcast_model(model: nn.Module) -> None:
    """Copy the first process's tensors into the models of the others, which must have the same structure.

    Only biases may differ: a writer gains one when it is pruned.
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
    """Check by a hash that all processes have the same `parts`.

    Raises:
        RefusedElsewhereError: a process differs from the first; raised in every process.
    """
    if size() == 1:
        return
    _check_errors()
    found = _all_texts(artifacts.digest(*parts))
    for number, text in enumerate(found):
        if text != found[0]:
            raise RemoteRequestError(
                f"process {number} of {size()} has another {what} than the first; give all processes the "
                "same files, and fix the seed of whatever a factory draws"
            )


def _check_errors(own: BaseException | None = None) -> None:
    """Exchange errors: raise the error of another process here, or send this process's own."""
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
    """The message of a CompressError, the traceback of any other error."""
    if error is None or isinstance(error, CompressError):
        return str(error)
    last = f"{type(error).__name__}: {error}".splitlines()[0]
    return last + "\n" + "".join(traceback.format_exception(error))


def _all_texts(own: str) -> list[str]:
    """The texts of all processes, by rank."""
    data = own.encode()
    longest = torch.tensor([len(data)])
    _all_reduce(longest, dist.ReduceOp.MAX)
    rows = torch.zeros(size(), int(longest), dtype=torch.uint8)
    rows[rank(), : len(data)] = _bytes(data)
    if rows.numel():
        _all_reduce(rows, dist.ReduceOp.SUM)
    return [bytes(row.tolist()).rstrip(b"\x00").decode() for row in rows]


def _send(message: Command) -> None:
    """Broadcast a command: its length, its JSON, and its tensors one by one."""
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
    """Overwrite a contiguous tensor of any dtype with the first process's."""
    if tensor.numel():
        with _connection_errors():
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)


def _all_reduce(tensor: Tensor, how: dist.ReduceOp.RedOpType) -> None:
    with _connection_errors():
        dist.all_reduce(tensor, how)


@contextmanager
def _connection_errors() -> Iterator[None]:
    """Turn connection errors of torch.distributed into RemoteRequestError."""
    try:
        yield
    except RuntimeError as error:
        raise RemoteRequestError(
            f"one of the {size()} processes has ended or cannot be reached ({error}); finished "
            "stages are kept, run the same command again to continue"
        ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Concatenate consecutive tensors of one dtype, so that small ones are reduced together."""
    group: list[Tensor] = []
    for tensor in tensors:
        held = sum(one.numel() for one in group)
        if group and (group[0].dtype != tensor.dtype or held + tensor.numel() > BUCKET_ELEMENTS):
            yield torch.cat([one.reshape(-1) for one in group]), group
            group = []
        group.append(tensor)
    if group:
        yield torch.cat([one.reshape(-1) for one in group]), group

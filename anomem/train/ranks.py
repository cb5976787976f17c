"""The processes of a training: who they are, what they agree on, and how one that fails ends the job.

`torchrun --nproc-per-node N -m anomem train …` starts them; torch.distributed connects them, with gloo on CPUs and NCCL
on GPUs. Only the first writes the run directory and the terminal.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from anomem.errors import UserError
from anomem.functional.distributed import of_everyone, sum_over
from anomem.train.cores import give_way_to_computation, own_cores, threads

T = TypeVar("T")
WAIT = timedelta(seconds=50)
"""How long a process waits for the others before it ends the job."""
ADDRESS = ("RANK", "MASTER_ADDR", "MASTER_PORT")
ENDED = "another process of the job has ended or does not answer"


@dataclass(frozen=True)
class Ranks:
    """This process among those of a training.

    Attributes:
        index: its rank.
        count: number of processes.

    Example:
        >>> ranks = Ranks.current()
        >>> ranks.mean(loss)  # of all processes, in each of them; `loss` itself where there is one
    """

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of torch.distributed's default group; one process where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.index == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes; never waits for the device."""
        return values if self.count == 1 else sum_over(values.detach()) / self.count

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over the processes in the place of each tensor, in one message."""
        if self.count > 1 and tensors:
            mean = self.mean(torch.cat([x.flatten() for x in tensors]))
            for tensor, part in zip(tensors, mean.split([x.numel() for x in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over the processes; by the host's backend, so that no device waits."""
        if self.count == 1:
            return list(numbers)
        return [int(number) for number in of_everyone(torch.tensor(numbers)).amax(0)]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            self.largest(0)

    def on_first(self, function: Callable[[], T]) -> T:
        """What the first process finds, in all of them; what the user must mend is raised in all, said in one.

        Args:
            function: called in the first process only; its result is small and plain.

        Raises:
            UserError: in the first process. The others leave without a word.
        """
        if self.count == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = function()
            except UserError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            if self.first:
                raise answer[1]
            raise SystemExit(2)
        found: T = answer[0]
        return found

    def all(self, mine: T) -> list[T]:
        """What each process has, in all of them, in order of rank."""
        everyone: list[Any] = [mine] * self.count
        if self.count > 1:
            dist.all_gather_object(everyone, mine)
        return everyone

    def require_same(self, settings: Mapping[str, Any]) -> None:
        """Check that all processes train with the same settings.

        Raises:
            UserError: in the first process, names a setting. The others leave without a word.
        """
        everyone = self.all(dict(settings))
        for rank, other in enumerate(everyone):
            for name in everyone[0].keys() | other.keys():
                if everyone[0].get(name) != other.get(name):
                    if not self.first:
                        raise SystemExit(2)
                    raise UserError(
                        f"`{name}`: expected the same in every process, received {everyone[0].get(name)!r} in rank 0 "
                        f"and {other.get(name)!r} in rank {rank}"
                    )


ONE = Ranks()


@contextmanager
def joined(device: str, wait: timedelta = WAIT) -> Iterator[Ranks]:
    """Around a training: the processes that torchrun has started are connected; one alone needs nothing.

    Args:
        device: `run.device`; "cpu" or a GPU decides what connects them.
        wait: how long a process waits for the others; one that has ended is noticed at once on CPUs.

    Raises:
        UserError: the environment does not say where the others are, they do not come, or one of them has ended. What
            several processes raise in the same words is raised in the first of them; the others leave without a word.
    """
    count = os.environ.get("WORLD_SIZE") or "1"
    ours = count != "1" and not (dist.is_available() and dist.is_initialized())
    if ours:
        _connect(count, device, wait)
    ranks = Ranks.current()
    number = next(_calls)
    on_cpu = ranks.count > 1 and (device == "cpu" or not torch.cuda.is_available())
    try:
        with own_cores() if on_cpu else nullcontext():
            yield ranks
    except UserError as error:
        if ranks.count == 1 or _is_said_here(f"{number} {error}"):
            raise
        raise SystemExit(2) from error
    except RuntimeError as error:
        if not is_of_another(error, ranks):
            raise
        if not ranks.first:
            raise SystemExit(2) from error
        raise UserError(f"{ENDED}; start the job again") from error
    finally:
        if ours:
            dist.destroy_process_group()


def _connect(count: str, device: str, wait: timedelta) -> None:
    missing = [name for name in ADDRESS if not os.environ.get(name)]
    if missing:
        names = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
        raise UserError(
            f"WORLD_SIZE is {count}, but {names} {'is' if len(missing) == 1 else 'are'} not set: start the processes "
            "with torchrun, or unset WORLD_SIZE to use this one alone"
        )
    # torch reports these by a trace of its C++ frames, after the wait.
    processes = _integer("WORLD_SIZE", 1)
    _integer("RANK", 0, processes - 1)
    _integer("MASTER_PORT", 0, 65535)
    if not dist.is_available():
        raise UserError("this torch was built without torch.distributed: start one process, without torchrun")
    on_gpus = device != "cpu" and torch.cuda.is_available()
    before = threads()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=wait)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot connect the {count} processes of the job: {reason}") from error
    give_way_to_computation(threads() - before)


def _integer(name: str, least: int, most: int | None = None) -> int:
    """An environment variable that torchrun sets."""
    text = os.environ[name]
    wanted = f"an integer ≥ {least}" if most is None else f"an integer from {least} to {most}"
    number = int(text) if text.isdecimal() else -1
    if number < least or (most is not None and number > most):
        raise UserError(f"the environment variable {name}: expected {wanted}, received {text!r}; torchrun sets it")
    return number


def local_device(device: str) -> str:
    """A GPU for each process of a machine: "cuda" becomes "cuda:<LOCAL_RANK>" under torchrun."""
    local = os.environ.get("LOCAL_RANK")
    wanted = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return f"cuda:{local}" if wanted and local is not None and Ranks.current().count > 1 else device


_calls = itertools.count()
"""How many trainings and scorings this process has taken part in: a mistake may be made again."""


def is_of_another(error: RuntimeError, ranks: Ranks) -> bool:
    """Whether a collective failed because another process is gone."""
    text = str(error).lower()
    signs = ("connection closed by peer", "connection reset", "timed out", "timeout", "broken pipe", "nccl", "gloo")
    return ranks.count > 1 and (isinstance(error, dist.DistError) or any(sign in text for sign in signs))


def _is_said_here(sentence: str) -> bool:
    """Whether no other process has said a sentence yet: all make the mistake of a command line or a training."""
    key = f"anomem/said/{hashlib.sha256(sentence.encode()).hexdigest()}"
    try:
        return bool(dist.distributed_c10d._get_default_store().add(key, 1) == 1)
    except RuntimeError:  # the process that kept the count is gone
        return True

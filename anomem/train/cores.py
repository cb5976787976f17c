"""The cores of a machine, among the processes of a training and among their threads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


def threads() -> set[int]:
    """Of this process, where Linux names them."""
    tasks = Path("/proc/self/task")
    return {int(task.name) for task in tasks.iterdir()} if tasks.is_dir() else set()


def give_way_to_computation(waiting: Iterable[int]) -> None:
    """Have threads wait for a core on which this process computes: Linux schedules them as batch work.

    A message that wakes one of gloo's threads takes no core from the thread that computes.
    """
    for thread in waiting:
        with suppress(OSError):  # it has ended, or the system forbids it
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


@contextmanager
def own_cores() -> Iterator[None]:
    """Bind this process to its share of the cores, where torchrun's processes use all cores of the machine.

    Else a message may wake a process on the core on which another one computes. Processes that leave cores free are
    not bound: another job may need the cores that they would be bound to.
    """
    cores = _share()
    before = os.sched_getaffinity(0) if cores else set()
    if cores:
        _bind(cores)
    try:
        yield
    finally:
        if cores:
            _bind(before)


def _share() -> set[int]:
    local, index = os.environ.get("LOCAL_WORLD_SIZE", ""), os.environ.get("LOCAL_RANK", "")
    if not (local.isdecimal() and index.isdecimal() and hasattr(os, "sched_setaffinity")):
        return set()
    cores, each = sorted(os.sched_getaffinity(0)), torch.get_num_threads()
    return set(cores[int(index) * each :][:each]) if int(local) * each == len(cores) else set()


def _bind(cores: set[int]) -> None:
    for thread in threads():
        with suppress(OSError):
            os.sched_setaffinity(thread, cores)

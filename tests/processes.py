"""Jobs of several processes that talk by gloo. A fork server imports torch once for all of them."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "anomem.nn", "anomem.train"])


def in_processes(count: int, function: Callable[..., None], *arguments: Any, seconds: float = 120) -> None:
    """Call a function of a module under `tests` in every process of a group; all must return in time.

    Args:
        count: number of processes.
        function: takes the arguments.
        arguments: can be pickled.
        seconds: after which the processes are ended.
    """
    with tempfile.TemporaryDirectory(prefix="anomem-job-") as folder:
        processes = [
            CONTEXT.Process(target=_one, args=(rank, count, folder, function, arguments), daemon=True)
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
        slow = [process for process in processes if process.exitcode is None]
        for process in slow:
            process.kill()
            process.join()
        said = "\n".join(path.read_text() for path in sorted(Path(folder).glob("rank*")))
        assert not slow, f"{len(slow)} of {count} processes did not end within {seconds} s\n{said}"
        assert [process.exitcode for process in processes] == [0] * count, said


def _one(rank: int, count: int, folder: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    code = 0
    try:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
        function(*arguments)
        dist.barrier()
    except BaseException:
        Path(folder, f"rank{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        code = 1
    os._exit(code)  # not by way of Python's end, where a thread of gloo that still runs aborts the process now and then

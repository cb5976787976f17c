"""`python -m benchmarks.export RUN…`: CPU time of exported runs beside the eager ones, and how far they differ.

One thread. Eager and the three formats take turns, call by call, so that other load on the machine meets all of them.
The time of a call is the process's CPU time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomem.export import FORMATS, Exported, export_run
from anomem.export.run import check_images
from anomem.train import load_detector, load_scorer
from anomem.train.rundir import RunDirectory
from benchmarks.harness.console import say
from benchmarks.harness.rows import RESULTS, about

BATCHES = (1, 32)
EAGER = "eager"


def measured(path: Path, seconds: float) -> list[dict[str, Any]]:
    """One row for the eager run and one for each format and batch size.

    Args:
        path: the run directory.
        seconds: of CPU time for each batch size, all formats together.
    """
    fitted = RunDirectory(path).is_fitted()
    source: Any = load_detector(path, device="cpu") if fitted else load_scorer(path, device="cpu")
    run, config = RunDirectory.open_fitted(path) if fitted else RunDirectory.open(path)
    images, name = check_images(source, run, config)
    calls: dict[str, Callable[[Tensor], Any]] = {EAGER: source}
    found: dict[str, Exported] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, format in FORMATS.items():
            found[kind] = export_run(path, kind, Path(folder, f"model{format.suffix}"))
            calls[kind] = format.runner(found[kind].file)
        for batch in BATCHES:
            times = in_turns(calls, images[:batch].contiguous(), seconds)
            for kind, of_kind in times.items():
                row = {
                    "run": name.removeprefix("test images of ").removeprefix("training images of "),
                    "image_size": list(source.model.encoder.image_size),
                    "format": kind,
                    "batch": batch,
                    **quantiles(of_kind),
                    "images_per_second": batch * len(of_kind) / sum(of_kind),
                    "about": about("cpu"),
                }
                if kind != EAGER:
                    row["parity"] = found[kind].parity._asdict()
                rows.append(row)
    return rows


def in_turns(calls: dict[str, Callable[[Tensor], Any]], images: Tensor, seconds: float) -> dict[str, list[float]]:
    """Seconds of CPU time of each call, by name; the calls take turns until all of them took `seconds` together."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call(images)
    spent = 0.0
    while spent < seconds or len(times[EAGER]) < 20:
        for name, call in calls.items():
            begin = time.process_time()
            call(images)
            times[name].append(time.process_time() - begin)
            spent += times[name][-1]
    return times


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile in milliseconds."""
    found = torch.tensor(times, dtype=torch.float64) * 1e3
    return {"p50": float(found.quantile(0.5)), "p99": float(found.quantile(0.99))}


def main() -> None:
    """Measure runs and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--seconds", type=float, default=20.0, help="of CPU time for each batch size of each run")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu-export.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for path in options.runs:
        new = measured(path, options.seconds)
        for row in new:
            say(f"{row['run']} {row['format']} batch {row['batch']}: {row['p50']:.2f} ms, p99 {row['p99']:.2f} ms")
        rows += new
        options.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Score a million files on many machines: each takes its shard of a list, can be stopped, and writes its own tables.

On machine I of N:   python examples/many_machines.py score RUN LIST OUTPUT I N
Afterwards, once:    python examples/many_machines.py join OUTPUT

LIST holds a path a line. The parts of a shard are tables of a thousand files; a part that is there is not scored again.
"""

from __future__ import annotations

import csv
import heapq
import sys
from collections.abc import Iterator
from pathlib import Path

from anomem.cli import main as anomem

PART = 1000


def shard(listed: Path, index: int, machines: int, part: int = PART) -> Iterator[tuple[int, list[str]]]:
    """Number and files of every part of the machine's shard: parts index, index + machines, …"""
    files: list[str] = []
    number = 0
    with listed.open(encoding="utf-8") as lines:
        for line in lines:
            files.append(line.rstrip("\n"))
            if len(files) == part:
                if number % machines == index:
                    yield number, files
                files, number = [], number + 1
    if files and number % machines == index:
        yield number, files


def score(run: Path, listed: Path, output: Path, index: int, machines: int, part: int = PART) -> int:
    """Score the shard of one machine. Returns the number of parts written."""
    output.mkdir(parents=True, exist_ok=True)
    written = 0
    for number, files in shard(listed, index, machines, part):
        table = output / f"{number:08d}.csv"
        if table.exists():  # written whole or not at all
            continue
        code = anomem(["score", *files, "--run", str(run), "--output", str(table)])
        if code not in (0, 1):  # 1: some files could not be read, the others were scored
            raise SystemExit(code)
        written += 1
    return written


def join(output: Path, most: int = 100) -> list[tuple[float, str]]:
    """The files with the lowest p-values, of all parts; one row at a time, so that any number of rows fits."""
    rows = (row for table in sorted(output.glob("*.csv")) for row in csv.DictReader(table.open(encoding="utf-8")))
    worst = heapq.nsmallest(most, ((float(row["p_value"]), row["path"]) for row in rows))
    for p, path in worst:
        print(f"{p:.4f}\t{path}")
    return worst


if __name__ == "__main__":
    if sys.argv[1] == "score":
        score(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]))
    else:
        join(Path(sys.argv[2]))

"""Rows: one JSON object a line, appended as soon as it is measured, so that a run can be stopped and resumed.

Three kinds share one file format: `Row` (a case of an operator), `Step` (a training loop), `Score` (detection of
anomalies). A row names the state of the code, the libraries and the kind of machine, never a host.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from benchmarks.harness.case import Case

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

MEASURED = "measured"
UNAVAILABLE = "unavailable"
OUT_OF_MEMORY = "out of memory"
OVER_TIME = "over time"
WRONG = "wrong"
FAILED = "failed"
COUNTED = "counted"
"""Launches and memory without a time, of `benchmarks.counts`."""
WORK = "work"
"""Revision of the working tree."""


class NoTime(Exception):
    """A case has no time; carries the status and the reason of its row.

    Args:
        status: one of the constants above.
        reason: in words.
        seconds: of the one call that was made, if it exceeded the bound.
    """

    def __init__(self, status: str, reason: str, seconds: float | None = None) -> None:
        self.status = status
        self.reason = reason
        self.seconds = seconds
        super().__init__(f"{status}: {reason}")


class Unavailable(NoTime):
    """An implementation cannot compute a case: a missing package, a device without a kernel."""

    def __init__(self, reason: str) -> None:
        super().__init__(UNAVAILABLE, reason)


class Wrong(NoTime):
    """The numbers are not those of the reference."""

    def __init__(self, reason: str) -> None:
        super().__init__(WRONG, reason)


@dataclass
class Row:
    """One implementation of one case."""

    suite: str
    operator: str
    shape: dict[str, int]
    dtype: str
    training: bool
    group: str
    implementation: str
    revision: str
    """`WORK` for the working tree, else the base revision measured beside it."""
    status: str
    reason: str | None = None
    """Why there is no time."""
    milliseconds: dict[str, float] | None = None
    """p20, p50, p80 of one call."""
    repeats: int = 0
    peak_bytes: int | None = None
    """Largest amount allocated during a call beyond its inputs."""
    launches: int | None = None
    """Kernels and matrix products of one call, of `benchmarks.counts`."""
    compile_seconds: float | None = None
    """First call minus a warm one, from an empty cache, of implementations that compile."""
    checked: dict[str, int] | None = None
    """Sizes at which the result was compared with float64."""
    flops: float = 0.0
    bytes: float = 0.0
    exponentials: float = 0.0
    floor_milliseconds: float | None = None
    fraction_of_floor: float | None = None
    """Floor divided by the median; above 1 if caches are faster than the copy that the floor assumes."""
    ceilings: dict[str, float] = field(default_factory=dict)
    """Measured in the same run: matrix product in flop/s, copy in byte/s."""
    others: float | None = None
    """Cores used by other processes while the case was timed; from 0.1 on they disturb the times."""
    tile: dict[str, int] | None = None
    """Of a single kernel: rows, columns, warps, stages, shared memory in KiB, registers."""
    about: dict[str, Any] = field(default_factory=dict)
    """Code, libraries, device; see `about`."""

    @property
    def case(self) -> Case:
        """The case that was measured."""
        return Case(self.operator, tuple(self.shape.items()), self.dtype, self.training, self.group)

    @property
    def key(self) -> str:
        """Equal for rows of the same thing at the same state of the code, on the same kind of machine."""
        state = [self.about.get(name) for name in ("commit", "dirty", "torch", "device", "device_name", "threads")]
        what = [self.operator, self.shape, self.dtype, self.training, self.group, self.implementation, self.revision]
        return json.dumps([self.suite, *what, *state])


def row_for(suite: str, case: Case, implementation: str, revision: str, status: str) -> Row:
    """A row with the fields of its case."""
    return Row(suite, case.operator, case.dims, case.dtype, case.training, case.group, implementation, revision, status)


@dataclass
class Step:
    """One training loop of `benchmarks.profile_training`."""

    pipeline: str
    title: str
    config: dict[str, Any]
    about: dict[str, Any]
    seconds_per_step: float
    """Without the profiler."""
    milliseconds: dict[str, float]
    """Phase -> time in a step, with the profiler."""
    peak_bytes: int
    images_per_second: float
    others: float | None = None
    """As in `Row`."""
    cpu_seconds_per_step: float | None = None
    """Processor time of all threads; None where other processes worked too."""
    product_seconds: float | None = None
    """Of the products in the encoder's two passes at the rate of a large product in the pipeline's precision."""

    @property
    def key(self) -> str:
        """The last row of a pipeline in its settings counts."""
        return json.dumps([self.pipeline, self.title])


@dataclass
class Score:
    """One score of one job of `benchmarks.accuracy`."""

    dataset: str
    normal: str
    anomalies: str
    seed: int
    setting: str
    score: str
    auroc: float | None
    """Of test images."""
    pixel_auroc: float | None
    """Of test pixels, if there are masks and the score has maps."""
    seconds: float
    """Of the whole job: training, fitting, scoring."""
    config: str
    """Digest of the configuration: a changed preset is another job."""
    commit: str
    dirty: bool
    torch: str
    processor: str
    threads: int

    @property
    def key(self) -> tuple[Any, ...]:
        """The last row for the same score of the same job counts."""
        return self.dataset, self.normal, self.anomalies, self.seed, self.setting, self.score


class Kept(Protocol):
    """Any of the three."""

    @property
    def key(self) -> Any:
        """Of rows with equal keys the last counts."""


R = TypeVar("R", bound=Kept)


def append(path: Path, *rows: Kept) -> None:
    """Add rows to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(_line(row) for row in rows))


def write(path: Path, rows: list[R]) -> None:
    """Replace a file by these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text("".join(_line(row) for row in rows), encoding="utf-8")
    beside.replace(path)


def read(path: Path, kind: type[R] = Row) -> list[R]:
    """The rows of a file, [] if there is none; of rows with equal keys the last."""
    if not path.exists():
        return []
    rows = [kind(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list({row.key: row for row in rows}.values())


def _line(row: Any) -> str:
    return json.dumps(asdict(row)) + "\n"


def git(*arguments: str) -> str:
    """Output of a git command in the project, "" if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def processor() -> str:
    """The instruction set and the processor's family, e.g. "x86_64 AVX512, family 25 model 17".

    The set is the one that torch names, or AMX, which its products of bfloat16 then use.
    """
    capability = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return capability
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "amx_bf16" in values.get("flags", "").split():
        capability = f"{platform.machine()} AMX"
    if "cpu family" in values and "model" in values:
        return f"{capability}, family {values['cpu family']} model {values['model']}"
    return capability


@functools.cache
def about(device: str) -> dict[str, Any]:
    """The fields that every row of a run shares.

    Args:
        device: "cpu" or "cuda".
    """
    import anomem

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "commit": git("rev-parse", "--short=12", "HEAD") or os.environ.get("ANOMEM_COMMIT"),
        # Rows and pictures are results: writing them does not change the code that was measured.
        "dirty": bool(
            git(
                "status",
                "--porcelain",
                "--untracked-files=no",
                "--",
                ".",
                ":!benchmarks/results",
                ":!README.md",
                ":!docs",
            )
        ),
        "anomem": anomem.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
    }


class Others:
    """Context that measures how many cores other processes use: `cores` afterwards, None without /proc."""

    cores: float | None = None

    def __enter__(self) -> Others:
        self._before = self._seconds()
        return self

    def __exit__(self, *_: object) -> None:
        after = self._seconds()
        if self._before is not None and after is not None:
            wall, busy, own = (end - start for end, start in zip(after, self._before, strict=True))
            self.cores = max(0.0, round((busy - own) / wall, 2)) if wall else 0.0

    def _seconds(self) -> tuple[float, float, float] | None:
        """Wall time, busy time of all cores, processor time of this process."""
        try:
            fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()
        except OSError:
            return None
        user, nice, system, _, _, interrupts, soft, *_ = (int(field) for field in fields[1:])
        busy = (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()

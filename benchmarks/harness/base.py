"""Another revision of the library, measured beside the working tree.

The revision is checked out into a temporary folder. A process of its own takes `anomem` from there and the benchmarks
from the working tree. The runner asks it for one call at a time, so both revisions alternate.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.case import Case, Implementation
from benchmarks.harness.prepare import Bench, Bounds, Ready
from benchmarks.harness.rows import ROOT, NoTime, git
from benchmarks.rivals import implementations

NATIVE_SOURCES = ("csrc", "setup.py")
# The first program of the other process, whose arguments are the revision's folder, this project's and the device:
# `anomem` must be imported from the one before `benchmarks` is from the other.
START = """
import sys
_, folder, root, device = sys.argv
sys.path[0] = folder
import anomem
assert anomem.__file__.startswith(folder), f"anomem came from {anomem.__file__}, not from {folder}"
sys.path[0] = root
from benchmarks.harness.base import serve
serve(device)
"""


class Base:
    """A context in which the other revision can be measured.

    Args:
        reference: a git commit, branch or tag.
        device: "cpu" or "cuda".

    Raises:
        ValueError: git knows no such revision.
    """

    def __init__(self, reference: str, device: str) -> None:
        self.commit = git("rev-parse", "--short=12", f"{reference}^{{commit}}")
        if not self.commit:
            raise ValueError(f"git knows no revision {reference!r}")
        self.revision = f"{reference} ({self.commit})"
        self.device = device

    def __enter__(self) -> Base:
        self._folder = Path(tempfile.mkdtemp(prefix="anomem-base-"))
        subprocess.run(
            ["git", "worktree", "add", "--detach", "--quiet", self._folder, self.commit], cwd=ROOT, check=True
        )
        self._native_library()
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, self._folder, ROOT, self.device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": ""},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        subprocess.run(["git", "worktree", "remove", "--force", self._folder], cwd=ROOT, check=True)

    def _native_library(self) -> None:
        """Copy the library if its sources are the same, else build it. A failure shows as an unavailable row."""
        same = subprocess.run(["git", "diff", "--quiet", self.commit, "--", *NATIVE_SOURCES], cwd=ROOT).returncode == 0
        if same:
            for library in (ROOT / "anomem").glob("_C*.so"):
                shutil.copy(library, self._folder / "anomem")
        else:
            environment = os.environ | {"ANOMEM_BUILD": "cpu" if self.device == "cpu" else "auto"}
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(build, cwd=self._folder, env=environment, check=False)

    def ready(self, case: Case, implementation: Implementation, bounds: Bounds) -> Ready:
        """Check and warm up an implementation there.

        Raises:
            NoTime: as `benchmarks.harness.prepare.Bench.ready`.
        """
        name = implementation.name
        answer = self._ask(do="ready", case=asdict(case), implementation=name, bounds=asdict(bounds))
        if "status" in answer:
            raise NoTime(**answer)
        return Ready(
            implementation=implementation,
            revision=self.revision,
            once=lambda: float(self._ask(do="once", implementation=name)["seconds"]),
            **answer,
        )

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that measures {self.revision} ended; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve(device: str) -> None:
    """Answer questions, JSON lines on standard input, until it ends; other output goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    bench: Bench | None = None
    ready: dict[str, Ready] = {}
    for line in sys.stdin:
        question: dict[str, Any] = json.loads(line)
        name = question["implementation"]
        if question["do"] == "ready":
            fields = question["case"]
            case = Case(**{**fields, "shape": tuple((axis, size) for axis, size in fields["shape"])})
            if bench is None or bench.case != case:
                bench, ready = Bench(case, device, Bounds(**question["bounds"])), {}
            wanted = next(one for one in implementations(case.operator) if one.name == name)
            try:
                ready[name] = bench.ready(wanted)
                answer: dict[str, Any] = {"peak_bytes": ready[name].peak_bytes, "checked": ready[name].checked}
            except NoTime as none:
                answer = {"status": none.status, "reason": none.reason}
        else:
            answer = {"seconds": ready[name].once()}
        print(json.dumps(answer), file=answers, flush=True)

"""Another revision of the library, measured beside the working tree.

The revision is checked out into a temporary folder and measured by a process of its own, which takes `anomem` from
there and the benchmarks from here. The runner asks it for one call at a time, so both revisions alternate.
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

from benchmarks.case import Case
from benchmarks.machine import ROOT, git
from benchmarks.prepare import Bounds, NoTime

NATIVE_SOURCES = ("csrc", "setup.py")


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
            [sys.executable, ROOT / "benchmarks" / "worker.py", self._folder, self.device],
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
        """The same sources give the same library; other sources are built. A failure shows as an unavailable row."""
        same = subprocess.run(["git", "diff", "--quiet", self.commit, "--", *NATIVE_SOURCES], cwd=ROOT).returncode == 0
        if same:
            for library in (ROOT / "anomem").glob("_C*.so"):
                shutil.copy(library, self._folder / "anomem")
        else:
            environment = os.environ | {"ANOMEM_BUILD": "cpu" if self.device == "cpu" else "auto"}
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(build, cwd=self._folder, env=environment, check=False)

    def ready(self, case: Case, implementation: str, bounds: Bounds) -> dict[str, Any]:
        """Check and warm up there; `peak_bytes` and `checked`.

        Raises:
            NoTime: as `benchmarks.prepare.Bench.ready`.
        """
        answer = self._ask(do="ready", case=asdict(case), implementation=implementation, bounds=asdict(bounds))
        if "status" in answer:
            raise NoTime(answer["status"], answer["reason"])
        return answer

    def once(self, implementation: str) -> float:
        """Seconds of one call there."""
        seconds: float = self._ask(do="once", implementation=implementation)["seconds"]
        return seconds

    def _ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that measures {self.revision} ended; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

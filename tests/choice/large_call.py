"""A call large enough to be measured, and the file that keeps what is chosen for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from anomem import backends, machine
from anomem.rules import Problem

LARGE = Problem("nt_xent", "cpu", torch.float32, 32, rows=512, columns=512, groups=2)
SMALL = LARGE._replace(rows=16, columns=16)
NAME = "nt_xent float32 2 x 512 x 512 x 32 training"


def content(path: Path) -> dict[str, Any]:
    text: dict[str, Any] = json.loads(path.read_text())
    return text


def kept(place: Path, implementation: str = "native", **section: str) -> None:
    """A file with one choice, of this machine unless the section says otherwise."""
    hardware, software = machine.identity("cpu")
    choices = {NAME: {"implementation": implementation, "milliseconds": {"reference": 3.0, "native": 1.5}}}
    one = {"hardware": hardware, "software": software, "choices": choices, "checks": {}, **section}
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"format": machine.FORMAT, "sections": [one]}))


def new_process() -> None:
    backends.forget()

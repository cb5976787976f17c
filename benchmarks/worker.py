"""The process behind `benchmarks.base`: `anomem` of another revision, benchmarks of this one.

Run as `python benchmarks/worker.py FOLDER DEVICE`. Questions come as JSON lines on standard input, answers go to
standard output; anything else that prints there goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def import_from(folder: str) -> None:
    """Take `anomem` from a folder and everything else, `benchmarks` too, from the usual places."""
    sys.path[0] = folder
    import anomem

    assert anomem.__file__ is not None
    assert Path(anomem.__file__).is_relative_to(folder), f"anomem came from {anomem.__file__}, not from {folder}"
    sys.path[0] = str(ROOT)


def serve(device: str) -> None:
    """Answer until standard input ends."""
    from benchmarks.case import Case
    from benchmarks.prepare import Bench, Bounds, NoTime, Ready
    from benchmarks.rivals import implementations

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
            answer = {"seconds": ready[name].subject.once()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    import_from(sys.argv[1])
    serve(sys.argv[2])

"""By how much the kernels of `anomem.rules.AUTO` win in the committed rows: `anomem/gains.json`, for `anomem.env`."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

from anomem import rules
from anomem.rules import Problem, Rule
from benchmarks.harness import rows
from benchmarks.harness.rows import Row

FILE = Path(rules.__file__).with_name("gains.json")
PLAIN = ("eager", "SDPA", "linear_cross_entropy")
"""How the names of plain PyTorch's implementations begin. A single call can be no `torch.compile`, no loop in Python
and no formula of another library, which in bfloat16 rounds scores; the tables of docs/PERFORMANCE.md have them."""
Times = dict[str, float]


class Measured(NamedTuple):
    """A case on a CPU."""

    processor: str
    """As `anomem.machine.hardware` names it, without the part of AVX512."""
    threads: int
    problem: Problem
    times: Times
    """p50 milliseconds by implementation."""


def measured_cases(results: Path) -> list[Measured]:
    """The cases that were measured on CPUs.

    Args:
        results: folder of rows.
    """
    cases: dict[tuple[str, int, Problem, str], Times] = defaultdict(dict)
    for path in sorted(results.glob("cpu-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            if fields.get("operator") in rules.OPERATORS and fields["milliseconds"] is not None:
                row = Row(**fields)
                kind = json.dumps([path.name, row.training, row.group, row.shape])
                assert row.milliseconds is not None
                times = cases[_processor(row), row.about["threads"], problem_of(row), kind]
                if row.revision == rows.WORK:
                    times[row.implementation] = row.milliseconds["p50"]
    return [Measured(processor, threads, problem, times) for (processor, threads, problem, _), times in cases.items()]


def problem_of(row: Row) -> Problem:
    """The call that a row has measured."""
    size = defaultdict(int, row.shape)
    lengths, columns, groups = {
        "nt_xent": (2 * size["B"], 2 * size["B"], size["G"]),
        "info_nce": (size["R"], size["C"], 1),
        "gather": (size["B"], size["H"] ** 2, size["n"]),
        "variance": (size["B"], 0, size["G"]),
        "deviation_map": (size["B"] * size["H"] ** 2, size["M"], 1),
        "batch_norm": (size["B"] * size["H"] ** 2, 0, 1),
        "downsample": (size["B"] * size["H"] ** 2, 0, 1),
        "conv3x3": (size["H"] ** 2, size["K"], size["B"]),
    }.get(row.operator, (size["N"], size["M"], 1))
    features = size["C"] if row.operator in ("gather", "batch_norm", "downsample", "conv3x3") else size["d"]
    return Problem(row.operator, "cpu", getattr(torch, row.dtype), features, lengths, columns, groups)


def covered(rule: Rule, cases: list[Measured]) -> list[Measured]:
    """The cases for which a rule holds, with the times of its implementation and of plain PyTorch."""
    processor = rule.processor.removesuffix("-BF16")  # the rows name no part of AVX512
    return [
        case._replace(
            times={name: case.times[name] for name in case.times if name.startswith((rule.implementation, *PLAIN))}
        )
        for case in cases
        if case.processor == processor and rule.holds(case.problem) and "eager" in case.times
    ]


def table(results: Path) -> dict[str, list[float]]:
    """Least and most gain over plain PyTorch at its fastest, the number of cases and of threads, by the key of a rule.

    Args:
        results: folder of rows.
    """
    cases = measured_cases(results)
    gains = {}
    for rule in (rule for rule in rules.AUTO if rule.device == "cpu"):
        found = covered(rule, cases)
        won = [
            min(time for name, time in times.items() if name != rule.implementation) / times[rule.implementation]
            for *_, times in found
        ]
        if won:
            gains[rule.key] = [round(min(won), 2), round(max(won), 2), len(won), max(case.threads for case in found)]
    return gains


def render(results: Path) -> str:
    """The text of the file."""
    lines = [f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(gain)}" for key, gain in table(results).items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write(results: Path) -> Path:
    """Write the file; returns its place."""
    FILE.write_text(render(results), encoding="utf-8")
    return FILE


def _processor(row: Row) -> str:
    found = re.search(r"(\w+), (family \d+) ", row.about["device_name"])
    assert found is not None, row.about
    maker = "GenuineIntel" if found[2] == "family 6" else "AuthenticAMD"
    return f"{maker} {found[2]} {found[1]}"

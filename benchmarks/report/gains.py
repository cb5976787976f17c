"""By how much the kernels of `anomem.rules.AUTO` win in the committed rows: `anomem/gains.json`, for `anomem.env`."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import torch

from anomem import rules
from anomem.rules import Problem, Rule
from benchmarks.harness import rows
from benchmarks.harness.rows import Row

FILE = Path(rules.__file__).with_name("gains.json")
COMPILED = "torch.compile"
"""Compiled as a whole, it is no rival of an eager call; the tables of docs/PERFORMANCE.md have it."""
Times = dict[str, float]


def measured_cases(results: Path) -> list[tuple[str, Problem, Times]]:
    """Processor, call and p50 milliseconds by implementation of each measured case on CPUs.

    Args:
        results: folder of rows.
    """
    cases: dict[tuple[str, Problem, str], Times] = defaultdict(dict)
    for path in sorted(results.glob("cpu-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            if fields.get("operator") in rules.OPERATORS and fields["milliseconds"] is not None:
                row = Row(**fields)
                kind = json.dumps([path.name, row.training, row.group, row.shape])
                assert row.milliseconds is not None
                times = cases[_processor(row), problem_of(row), kind]
                if row.revision == rows.WORK:
                    times[row.implementation] = row.milliseconds["p50"]
    return [(processor, problem, times) for (processor, problem, _), times in cases.items()]


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


def covered(rule: Rule, cases: list[tuple[str, Problem, Times]]) -> list[tuple[Problem, Times]]:
    """Call and times, without those of torch.compile, of the cases for which a rule holds."""
    processor = rule.processor.removesuffix("-BF16")  # the rows name no part of AVX512
    return [
        (problem, {name: time for name, time in times.items() if name != COMPILED})
        for of, problem, times in cases
        if of == processor and rule.operator == problem.operator and rule.where.holds(problem) and "eager" in times
    ]


def table(results: Path) -> dict[str, list[float]]:
    """Least and most gain over the fastest rival, and the number of cases, by the key of a rule.

    Args:
        results: folder of rows.
    """
    cases = measured_cases(results)
    gains = {}
    for rule in (rule for rule in rules.AUTO if rule.device == "cpu"):
        found = [
            min(time for name, time in times.items() if name != rule.implementation) / times[rule.implementation]
            for _, times in covered(rule, cases)
        ]
        if found:
            gains[rule.key] = [round(min(found), 2), round(max(found), 2), len(found)]
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

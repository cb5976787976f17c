"""PTX text → instructions, labels and parameters of its kernel."""

from __future__ import annotations

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """One statement."""

    words: tuple[str, ...]
    """The opcode at its dots: ("ld", "global", "v4", "b32")."""
    operands: tuple[str, ...]
    guard: str | None
    """The predicate register before it."""
    negated: bool
    """Whether it runs where the guard is false."""
    text: str

    @property
    def opcode(self) -> str:
        """As written."""
        return ".".join(self.words)


class Program(NamedTuple):
    """The kernel of a PTX file."""

    parameters: list[tuple[str, str]]
    """(type, name) in order."""
    instructions: list[Instruction]
    labels: dict[str, int]
    """Name → index of the instruction that follows. A label of a block `{ }` is written name@number of the block."""


def parse(ptx: str) -> Program:
    """The kernel of a PTX file that Triton wrote."""
    body = ptx[ptx.index(".visible .entry") :]
    head = body[: body.index(")\n")] + "\n"
    parameters = re.findall(r"\.param \.(\w+)(?: \.ptr[^\n,]*)? (\w+)[,\n]", head)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    scopes, made = [0], 0
    for line in body[body.index("{") + 1 :].split("\n"):
        line = line.split("//")[0].strip()
        if line.startswith(".section"):
            break
        if line == "{":
            made += 1
            scopes.append(made)
        elif line == "}":
            if len(scopes) == 1:
                break
            scopes.pop()
        elif label := re.match(r"(\$?\w+):", line):
            name = label[1] if label[1].startswith("$") else f"{label[1]}@{scopes[-1]}"
            labels[name] = len(instructions)
        elif line and not line.startswith((".loc", ".reg", ".pragma")):
            statements = (part.strip() for part in line.split(";"))
            instructions += [_decode(part, scopes[-1]) for part in statements if part and not part.startswith(".reg")]
    return Program(parameters, instructions, labels)


def _decode(text: str, scope: int) -> Instruction:
    guard, negated, statement = None, False, text
    if guarded := re.match(r"@(!?)(%?\w+)\s+(.*)", text):
        negated, guard, statement = bool(guarded[1]), guarded[2], guarded[3]
    opcode, _, rest = re.sub(r"\s+", " ", statement).partition(" ")
    operands = _split(rest)
    if opcode.startswith("bra") and not operands[0].startswith("$"):
        operands = [f"{operands[0]}@{scope}"]
    return Instruction(tuple(opcode.split(".")), tuple(operands), guard, negated, text)


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]

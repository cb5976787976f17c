"""The README's before and after: both halves give the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from anomem import functional as AF

README = Path(__file__).resolve().parent.parent / "README.md"


def test_before_and_after_agree() -> None:
    text = README.read_text(encoding="utf-8")
    snippet = text.split("<!-- run by tests/test_readme.py -->\n```python\n")[1].split("```")[0]
    before, after = snippet.split("\n\n")
    B, d = 6, 16
    given: dict[str, Any] = {"torch": torch, "F": F, "AF": AF, "B": B, "d": d}
    given |= {
        "query": torch.randn(5, d),
        "prototypes": torch.randn(7, d),
        "z0": torch.randn(B, d),
        "z1": torch.randn(B, d),
    }
    old, new = dict(given), dict(given)
    exec(before, old)
    exec(after, new)
    torch.testing.assert_close(new["out"], old["out"])
    torch.testing.assert_close(new["loss"], old["loss"])

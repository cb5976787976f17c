"""`python -m tests.ptx [--subset ARCHITECTURE | --mutations] [PATTERN]`: execute compiled kernels on the CPU.

Without options every shipped kernel with products whose key matches the pattern, one line each: the largest error over
the error allowed, or the fault. Exit status 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator

import triton

from anomem.kernels.shipped_kernels import Spec, shipped, version
from tests.ptx.calls import Call, errors
from tests.ptx.compiled import Compiled, compile_spec
from tests.ptx.memory import Fault

# One launch of each kernel and scheme: short keys of ahead_of_time.json, without tile and architecture.
SUBSET = (
    "contrast_forward joined fixed half d64", "contrast_forward rectangle half d99",
    "contrast_backward joined half d64", "contrast_backward rows tf32 d64", "contrast_backward columns half d99",
    "contrast_chunked_weights joined half d504", "contrast_chunked_weights rectangle tf32 d504",
    "retrieve_chunked_weights tied half d504", "retrieve_chunked_weights separate half d304",
    "retrieve_flash_forward tied half d56", "retrieve_flash_forward separate tf32 d64",
    "retrieve_flash_query_gradient tied half d33", "retrieve_flash_prototype_sums tied half d64",
)  # fmt: skip
# (key, pattern of the instruction, what replaces it): each is planted at its first place that matters.
MUTATIONS = (
    ("contrast_forward joined fixed half d64 64x64 sm_90", r"bar\.sync\s+0;", ""),
    ("contrast_forward joined fixed half d64 64x64 sm_90", r"fence\.proxy\.async[^;]*;", ""),
    ("contrast_forward joined fixed half d64 64x64 sm_90", r"wgmma\.wait_group[^;]*;", ""),
    ("contrast_forward joined half d64 64x64 sm_80", r"bar\.sync\s+0;", ""),
    ("contrast_forward joined half d64 64x64 sm_80", r"cp\.async\.wait_group[^;]*;", ""),
    ("contrast_forward joined half d64 64x64 sm_80", r"@!?%p\d+ st\.global", "st.global"),
    ("contrast_forward joined half d64 64x64 sm_80", r"@!?%p\d+ ld\.global", "ld.global"),
)


def measure(compiled: Compiled, ptx: str | None = None) -> str:
    """ "right", "wrong: …" or "fault: …"."""
    # Triton 3.6 sets no fence between a copy and a product. 3.8 sets some of sm_100 before the wait for the copy, not
    # after it. Neither is known to give wrong numbers on a GPU, and no source of a kernel can change it.
    release = tuple(map(int, version().split(".")))
    copies_need_fence = release >= (3, 8) and compiled.spec.architecture != 100
    try:
        found = errors(
            Call(compiled if ptx is None else compiled._replace(ptx=ptx), copies_need_fence=copies_need_fence)
        )
    except Fault as fault:
        return f"fault: {fault}"
    text = ", ".join(f"{name} {error:.2g}" for name, error in found.items())
    return f"{'right' if max(found.values()) < 1 else 'wrong'}: {text}"


def selected(pattern: str, subset: int | None) -> Iterator[tuple[str, Spec]]:
    """Shipped kernels with products, by their keys."""
    for key, spec in shipped().items():
        multiplies = spec.matrix and (
            spec.kernel.__name__.startswith(("contrast_forward", "contrast_backward", "retrieve_flash"))
            or spec.kernel.__name__.endswith(("_resident_kernel", "_chunked_weights_kernel"))
        )
        in_subset = subset is None or (
            spec.architecture == subset and any(re.match(re.escape(name) + r" \d", key) for name in SUBSET)
        )
        if multiplies and in_subset and re.search(pattern, key):
            yield key, spec


def plant(key: str, pattern: str, replacement: str) -> bool:
    """Whether some place of a pattern, changed alone, is caught."""
    compiled = compile_spec(shipped()[key])
    begin = compiled.ptx.index(".visible .entry")
    places = [found for found in re.finditer(pattern, compiled.ptx) if found.start() > begin]
    outcomes = (
        measure(compiled, compiled.ptx[: place.start()] + replacement + compiled.ptx[place.end() :]) for place in places
    )
    caught = next((outcome for outcome in outcomes if not outcome.startswith("right")), None)
    print(f"{key}: `{pattern}`: {caught or 'missed'}", flush=True)
    return caught is not None


def main() -> int:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx")
    parser.add_argument("--subset", type=int, metavar="ARCHITECTURE", help="one launch of each kernel and scheme")
    parser.add_argument("--mutations", action="store_true", help="plant mistakes, which must be caught")
    parser.add_argument("pattern", nargs="?", default="", help="of the keys in ahead_of_time.json")
    chosen = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted in this process, not compiled; unset it")
    if chosen.mutations:
        missed = sum(not plant(*mutation) for mutation in MUTATIONS)
        print(f"{len(MUTATIONS)} mistakes planted, {missed} missed")
        return missed > 0
    bad = count = 0
    for key, spec in selected(chosen.pattern, chosen.subset):
        began = time.monotonic()
        outcome = measure(compile_spec(spec))
        count, bad = count + 1, bad + (not outcome.startswith("right"))
        print(f"{key}: {outcome} ({time.monotonic() - began:.1f} s)", flush=True)
    print(f"{count} kernels executed, {bad} wrong")
    return bad > 0 or count == 0


if __name__ == "__main__":
    sys.exit(main())

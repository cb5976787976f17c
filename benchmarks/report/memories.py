"""Tables of filling, reading and scoring in docs/PERFORMANCE.md, from memories.jsonl and scoring.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import scoring as scoring_rows
from benchmarks.harness import rows
from benchmarks.memories import ROWS, MemoryRow

MISSING = "Not measured yet."
RIVALS = ("PyTorch", "cdist", "faiss", "scikit-learn")
WORDS = {
    "nearest": "`nearest`",
    "read": "`read_memory`, 8 nearest",
    "read all": "`read_memory`, all",
    "kmeans": "k-means, 20 iterations",
    "coreset": "greedy k-center",
}


def memories(results: Path) -> str:
    """Case × implementation -> milliseconds, and how many times as long the fastest rival takes."""
    latest = {row.key: row for row in rows.read(results / ROWS, MemoryRow)}
    if not latest:
        return MISSING
    lines = [
        f"| | N, M, d | native, ms | {' | '.join(RIVALS)} | fastest rival |",
        "|---|---|--:|" + "--:|" * (len(RIVALS) + 1),
    ]
    cases = {(r.what, r.rows, r.prototypes, r.features, r.k) for r in latest.values()}
    for case in sorted(cases, key=lambda case: (list(WORDS).index(case[0]), *case[1:])):
        found = {name: latest.get((*case, name)) for name in ("native", *RIVALS)}
        times = {name: row.milliseconds["p50"] for name, row in found.items() if row is not None}
        rivals = [time for name, time in times.items() if name != "native"]
        cells = [f"{times[name]:.3g}" if name in times else "–" for name in ("native", *RIVALS)]
        sizes = ", ".join(f"{n:,}" for n in case[1:4])
        ahead = f"{min(rivals) / times['native']:.2f}×" if rivals and "native" in times else "–"
        lines.append(f"| {WORDS[case[0]]} | {sizes} | {' | '.join(cells)} | {ahead} |")
    about = next(reversed(latest.values()))
    libraries = {(r.implementation, r.library) for r in latest.values() if r.implementation in RIVALS[2:]}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(libraries))
    scaled = "Rivals of greedy k-center were timed for 100 centres and scaled: their time is linear in the centres."
    lines += ["", f"{about.processor}, CPU time of {about.threads} thread, torch {about.torch}, {versions}. {scaled}"]
    return "\n".join(lines)


def scoring(results: Path) -> str:
    """M -> images per second of the encoder and of the whole detector, and their ratio beside the aim."""
    latest = {row.key: row for row in rows.read(results / scoring_rows.ROWS, scoring_rows.ScoringRow)}
    if not latest:
        return MISSING
    lines = [
        "| M | pixels, batch | encoder, images/s | detector, images/s | part of the encoder's | aim |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for row in latest.values():
        encoder = latest.get((row.prototypes, "encoder", row.size, row.batch))
        if row.what != "detector" or encoder is None:
            continue
        alone, whole = (one.batch / one.milliseconds["p50"] * 1e3 for one in (encoder, row))
        aim = scoring_rows.AIMS.get(row.prototypes)
        shown = "–" if aim is None else f"{aim:.0%}"
        sizes = f"{row.prototypes:,} | {row.size}, {row.batch}"
        lines.append(f"| {sizes} | {alone:.0f} | {whole:.0f} | {whole / alone:.1%} | {shown} |")
    about = next(reversed(latest.values()))
    return "\n".join([*lines, "", f"{about.processor}, CPU time of {about.threads} thread, torch {about.torch}."])


SECTIONS: dict[str, Callable[[Path], str]] = {"memories": memories, "scoring": scoring}

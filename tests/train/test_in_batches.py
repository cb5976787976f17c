"""A scorer in the `map_batches` of Ray Data: the README's class, with Ray where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anomem.train import TrainConfig, load_scorer, train

README = Path(__file__).resolve().parents[2] / "README.md"
KEYWORDS = {"fn_constructor_args", "concurrency", "batch_size"}


class Batches:
    """Stands in for `ray.data.Dataset.map_batches`: one worker makes the callable and calls it with each batch."""

    def __init__(self, rows: dict[str, np.ndarray]) -> None:
        self.rows = rows

    def map_batches(self, kind: Any, **options: Any) -> list[dict[str, Any]]:
        assert options.keys() == KEYWORDS
        call = kind(*options["fn_constructor_args"])
        cuts = range(0, len(self.rows["image"]), 3)
        return [call({name: values[cut : cut + 3] for name, values in self.rows.items()}) for cut in cuts]


@pytest.fixture
def run(tiny: TrainConfig) -> Path:
    return train(tiny, quiet=True)


def images(count: int) -> dict[str, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 1), dtype=np.uint8)
    return {"image": pixels, "path": np.array([f"{i}.png" for i in range(count)])}


def snippet(run: Path, dataset: Any) -> dict[str, Any]:
    mark = "<!-- run by tests/train/test_in_batches.py -->\n```python\n"
    (block,) = README.read_text(encoding="utf-8").split(mark)[1:]
    source = block[: block.index("```")].replace('"runs/mine"', repr(str(run)))
    given = {"dataset": dataset, "torch": torch, "Path": Path, "load_scorer": load_scorer}
    exec(compile(source, "README", "exec"), given)
    return given


def test_the_class_scores_batches(run: Path) -> None:
    rows = images(5)
    scores = snippet(run, Batches(rows))["scores"]
    expected = load_scorer(run)(torch.from_numpy(rows["image"]).permute(0, 3, 1, 2)).scores["detector"]
    found = np.concatenate([batch["score"] for batch in scores])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)
    assert [path for batch in scores for path in batch["path"]] == list(rows["path"])


def test_the_class_in_ray(run: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    ray.init(num_cpus=4, include_dashboard=False)
    try:
        found = snippet(run, ray.data.from_items([{"image": row, "path": "x"} for row in images(5)["image"]]))["scores"]
        assert found.count() == 5
    finally:
        ray.shutdown()

"""anomalib: the detector in its Engine says what `fit` says, and its PatchCore finds the same neighbours."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from anomem.data import DataConfig
from anomem.data.convert import resize
from anomem.errors import ArgumentError, UserError
from anomem.scoring import FillConfig
from anomem.train import FitConfig, RunConfig, fit, load_detector, save_detector
from tests.train.test_fitting import parts, write

needs_anomalib = pytest.mark.skipif(importlib.util.find_spec("anomalib") is None, reason="needs anomalib")
SETTINGS: dict[str, Any] = {
    "alpha": 0.1, "encoder": "efficientnet_lite0", "weights": "none", "scales": ("block3",), "image_size": 64,
    "prototypes": 16, "visualizer": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 good images to train on, 6 good and 6 bad ones to validate and test with."""
    root = tmp_path_factory.mktemp("photos")
    write(root / "good", parts(24))
    write(root / "more", parts(6, 3))
    write(root / "bad", parts(6, 2, defect=True))
    return root


def module_of(photos: Path) -> Any:
    from anomalib.data import Folder

    return Folder(
        "mine", root=photos, normal_dir="good", normal_test_dir="more", abnormal_dir="bad", num_workers=0,
        train_batch_size=10, eval_batch_size=5, seed=0,
    )  # fmt: skip


def engine_in(folder: Path) -> Any:
    from anomalib.engine import Engine

    return Engine(accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False)


@needs_anomalib
def test_the_detector_in_the_engine_is_that_of_fit(photos: Path, tmp_path: Path) -> None:
    from anomem.anomalib import AnoMem

    model, engine, module = AnoMem(**SETTINGS), engine_in(tmp_path), module_of(photos)
    engine.fit(model, datamodule=module)
    expected = fit(
        parts(24),
        alpha=0.1,
        config=FitConfig(
            data=DataConfig(dataset="images", normal="normal", image_size=64),
            encoder="efficientnet_lite0",
            weights="none",
            scales=("block3",),
            fill=FillConfig(prototypes=(16,)),
            run=RunConfig(device="cpu"),
        ),
    )
    images = torch.cat([parts(6, 3), parts(6, 2, defect=True)])
    said = expected(images)
    assert said.verdicts is not None
    raw = model.model.eval()(images.float() / 255)
    torch.testing.assert_close(raw.pred_score, said.scores[expected.lead])
    torch.testing.assert_close(raw.anomaly_map[:, 0], said.maps["local"])
    assert torch.equal(raw.pred_label, said.verdicts)
    assert said.verdicts.tolist() == [False] * 6 + [True] * 6

    results = engine.test(model, datamodule=module)
    assert results == [{"image_AUROC": 1.0, "image_F1Score": 1.0}]
    # A checkpoint holds the detector: a model made anew says the same, labels, scores and masks.
    file = engine.best_model_path
    again = AnoMem.load_from_checkpoint(file, visualizer=False)
    assert again.detector.calibration.count == expected.calibration.count
    for fresh, path in ((again, None), (AnoMem(**SETTINGS), file)):
        batches = engine_in(tmp_path).predict(fresh, datamodule=module, ckpt_path=path)
        for batch in batches:
            paths = [Path(str(p)) for p in batch.image_path]
            own = torch.cat([images[int(p.stem) + 6 * (p.parent.name == "bad")][None] for p in paths])
            found = expected(own)
            assert torch.equal(batch.pred_label, found.verdicts)
            # Normalised scores pass 0.5 where the verdict changes.
            assert torch.equal(batch.pred_score > 0.5, found.verdicts)
            assert torch.equal(
                batch.pred_mask, found.maps["local"] > expected.calibration.pixel_threshold("local", 0.1)
            )
    save_detector(model.detector, tmp_path / "run")
    loaded = load_detector(tmp_path / "run")(images)
    torch.testing.assert_close(loaded.scores[expected.lead], said.scores[expected.lead])


@needs_anomalib
def test_images_of_another_size_and_too_few_normals(photos: Path, tmp_path: Path) -> None:
    """Labels are anomalib's where nothing is promised; images are resized as this package does."""
    from anomem.anomalib import AnoMem, grey_levels

    model = AnoMem(**{**SETTINGS, "alpha": 0.01, "image_size": (40, 48)})
    engine, module = engine_in(tmp_path), module_of(photos)
    engine.fit(model, datamodule=module)
    assert model.model.thresholds() is None
    images = parts(4, 5)
    given = model.pre_processor.transform(images.float() / 255)
    raw = model.model.eval()(given)
    assert raw.pred_label is None
    assert raw.pred_mask is None
    levels = resize(images, (40, 48))
    # Rounding decides at half a level.
    difference = (grey_levels(given).int() - levels.int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 0.01
    torch.testing.assert_close(raw.pred_score, model.detector(grey_levels(given)).scores[model.detector.lead])
    assert engine.test(model, datamodule=module)[0]["image_AUROC"] == 1.0


@needs_anomalib
def test_mistakes_are_one_sentence(photos: Path, tmp_path: Path) -> None:
    from anomalib.deploy import ExportType
    from torchvision.transforms.v2 import Normalize

    from anomem.anomalib import AnoMem, PreProcessor

    with pytest.raises(UserError, match="is not fitted"):
        _ = AnoMem(**SETTINGS).detector
    with pytest.raises(UserError, match="is not fitted"):
        engine_in(tmp_path).test(AnoMem(**SETTINGS), datamodule=module_of(photos))
    normalising = AnoMem(**SETTINGS, pre_processor=PreProcessor(Normalize([0.5] * 3, [0.2] * 3)))
    with pytest.raises(ArgumentError, match="leave Normalize out"):
        engine_in(tmp_path).fit(normalising, datamodule=module_of(photos))
    with pytest.raises(UserError, match="anomem export RUN"):
        engine_in(tmp_path).export(AnoMem(**SETTINGS), ExportType.ONNX)


@needs_anomalib
def test_patchcore_has_the_scores_of_anomalib(photos: Path, tmp_path: Path) -> None:
    """The same coreset; a float64 search judges both."""
    from anomalib.models import Patchcore as Theirs

    from anomem.anomalib import Patchcore, PatchcoreModel

    options = {
        "backbone": "resnet18", "pre_trained": False, "layers": ("layer1",), "coreset_sampling_ratio": 0.02,
        "pre_processor": Theirs.configure_pre_processor((64, 64)), "visualizer": False,
    }  # fmt: skip
    torch.manual_seed(0)
    ours, theirs = Patchcore(**options), Theirs(**options)
    assert type(theirs.model) is not PatchcoreModel
    engine = engine_in(tmp_path)
    engine.fit(ours, datamodule=module_of(photos))
    theirs.load_state_dict(ours.state_dict())
    images = ours.pre_processor.transform(torch.cat([parts(5, 3), parts(5, 2, defect=True)]).float() / 255)
    with torch.no_grad():
        found, expected = ours.model.eval()(images), theirs.model.eval()(images)
    torch.testing.assert_close(found.pred_score, expected.pred_score, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-5)
    rows = theirs.model.memory_bank[:50] + 1e-3 * torch.randn(50, theirs.model.memory_bank.shape[1])
    for k in (1, 9, 33):
        exact = torch.cdist(rows.double(), theirs.model.memory_bank.double()).topk(k, largest=False)
        distance, index = ours.model.nearest_neighbors(rows, k)
        assert torch.equal(index.view(50, k), exact.indices)
        error = (distance.view(50, k) - exact.values).abs().max()
        their_error = (theirs.model.nearest_neighbors(rows, k)[0].view(50, k) - exact.values).abs().max()
        assert error <= 2 * their_error + 1e-6
    assert engine.test(ours, datamodule=module_of(photos))[0]["image_AUROC"] > 0.9
    assert type(Patchcore.load_from_checkpoint(engine.best_model_path).model) is PatchcoreModel


def test_without_anomalib_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anomalib", None)
    monkeypatch.delitem(sys.modules, "anomem.anomalib", raising=False)
    with pytest.raises(UserError, match=r"needs the package anomalib, .* pip install anomem\[anomalib\]"):
        importlib.import_module("anomem.anomalib")

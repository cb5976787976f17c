"""Fitted detectors: from good images to verdicts, saved and loaded, with labels, few images, or without weights."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from anomem.data import DataConfig, ResidentImages
from anomem.data.frame import framed, unframed
from anomem.errors import ArgumentError, UserError
from anomem.models import TiledEncoder
from anomem.models.pretrained import LITE0, pretrained_available
from anomem.scoring import FillConfig
from anomem.train import FitConfig, RunConfig, fit, fit_run, fitting, load_detector, load_scorer, resume, save_detector
from anomem.train.fitting import _as_set, load_fitted_run, resolved

needs_labels = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
# Random weights: what is tested does not depend on them, and the package of weights may not be there.
CONFIG = FitConfig(
    data=DataConfig(dataset="folder", normal="", image_size=64),
    encoder="efficientnet_lite0",
    weights="none",
    scales=("block3", "block5"),
    fill=FillConfig(prototypes=(32,)),
    run=RunConfig(device="cpu"),
)


def parts(count: int, seed: int = 0, defect: bool = False) -> Tensor:
    """Noisy images [count, 3, 64, 64] uint8 of one part, with a bright spot if they are defective."""
    source = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, 1, 64)
    clean = torch.where(x < 0.5, 0.7 - x, 0.4 + 0.3 * torch.sin(40 * x)).expand(3, 64, 64)
    images = clean + 0.03 * torch.randn(count, 3, 64, 64, generator=source)
    if defect:
        images[:, :, 8:24, 40:56] = 0.95
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def write(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(np.ascontiguousarray(image.movedim(0, -1).numpy())).save(folder / f"{i:02d}.png")
    return folder


def test_good_images_to_verdicts() -> None:
    detector = fit(parts(60), alpha=0.05, config=CONFIG)
    good, bad = detector(parts(30, 1)), detector(parts(10, 2, defect=True))
    assert bad.verdicts is not None
    assert bool(bad.verdicts.all())
    assert good.verdicts is not None
    assert int(good.verdicts.sum()) <= 6
    assert bad.maps["local"].shape == (10, 64, 64)
    inside, outside = bad.maps["local"][:, 8:24, 40:56].mean(), bad.maps["local"][:, 40:].mean()
    assert float(inside) > float(outside)
    assert bool((bad.p_values <= 0.05).all())
    assert detector.lead == "both"
    assert fit(parts(60), alpha=0.05, aligned=False, config=CONFIG).lead == "either"


def ring(seed: int) -> Image.Image:
    """A ring on noise, 96 pixels a side, at a slightly different place in each image."""
    source = np.random.default_rng(seed)
    image = Image.fromarray((128 + 20 * source.standard_normal((96, 96))).clip(0, 255).astype("uint8")).convert("RGB")
    ImageDraw.Draw(image).ellipse((20 + source.integers(0, 3), 20, 76, 76), outline=(200, 200, 200), width=3)
    return image


@pytest.mark.skipif(not pretrained_available(), reason="needs the package of pretrained weights")
@pytest.mark.parametrize("count", [4, 8])
def test_new_normals_are_judged_as_the_few_that_calibrate(count: int) -> None:
    """Where the memory held every feature, and each fit had its own spreads, all new normals were called anomalous."""
    detector = fit([ring(i) for i in range(count)], alpha=0.2)
    assert detector.calibration.held == "cross"
    new = torch.stack([torch.from_numpy(np.array(ring(1000 + i))).movedim(2, 0) for i in range(24)])
    verdicts = detector(new).verdicts
    assert verdicts is not None
    assert int(verdicts.sum()) <= 12


def test_another_alpha_and_another_score() -> None:
    detector = fit(parts(24), alpha=0.1, config=CONFIG)
    images = parts(4, 2, defect=True)
    for name in detector.names:
        found = detector(images, by=name)
        assert torch.equal(found.p_values, detector.calibration.p_values(name, found.scores[name]))
    with pytest.raises(ArgumentError, match=r"alpha.*at least 0\.04"):
        detector(images, alpha=0.01)
    with pytest.raises(ArgumentError, match="by"):
        detector(images, by="energy")


def test_an_image_is_normal_or_has_a_defect() -> None:
    """One that is in both folders would be learned from as both."""
    normals, defects = parts(12), parts(4, 2, defect=True)
    with pytest.raises(ArgumentError, match=r"labels.*1 of 5 that equal fitted ones.*take it out"):
        fit(normals, alpha=0.1, defects=torch.cat([defects, normals[3:4]]), config=CONFIG)


def test_few_normals_give_no_silent_verdict() -> None:
    detector = fit(parts(8), alpha=0.01, config=CONFIG)
    found = detector(parts(2, 3))
    assert found.verdicts is None
    assert "cannot promise a false-alarm rate of 1.00%" in detector.calibration.promise(detector.alpha)
    assert detector.calibration.held == "cross"


@pytest.mark.parametrize("count", [1, 2])
def test_few_shot(count: int) -> None:
    """Scores and maps from so few normals; what the calibration allows is what it says."""
    detector = fit(parts(count), alpha=0.35, config=CONFIG)
    calibration = detector.calibration
    assert calibration.count == (0 if count == 1 else count)
    bad, good = detector(parts(6, 2, defect=True)), detector(parts(6, 3))
    for name in ("plain", "both"):
        assert float(bad.scores[name].min()) > float(good.scores[name].max()), name
    assert float(bad.maps["local"][:, 8:24, 40:56].mean()) > float(bad.maps["local"][:, 40:].mean())
    if count == 1:
        assert bad.verdicts is None
        assert bool((bad.p_values == 1).all())
        assert calibration.promise(0.5).startswith("the only normal image")
    else:
        assert bad.verdicts is not None
        assert bool(bad.verdicts.all())
        assert float(bad.p_values.max()) == pytest.approx(1 / (count + 1))


def test_equal_images_count_once() -> None:
    images = parts(3)
    assert fit(torch.cat([images, images[:2]]), alpha=0.3, config=CONFIG).calibration.count == 3


def test_normals_of_their_own_calibrate(tmp_path: Path) -> None:
    images, others = parts(12), parts(30, 5)
    detector = fit(images, alpha=0.05, calibration=others, config=CONFIG)
    assert (detector.calibration.count, detector.calibration.held) == (30, "split")
    expected = detector(others).scores["plain"].double().sort().values
    torch.testing.assert_close(detector.calibration.scores["plain"], expected)
    with pytest.raises(ArgumentError, match=r"calibration.*not fitted.*2 of 4 that equal fitted ones"):
        fit(images, calibration=torch.cat([images[3:5], others[:2]]), config=CONFIG)
    root = write(tmp_path / "good", images)
    folder = write(tmp_path / "more", others)
    assert fit(root, alpha=0.05, calibration=folder, config=CONFIG).calibration.count == 30
    with pytest.raises(ArgumentError, match="calibration"):
        fit_run(replace(CONFIG, data=replace(CONFIG.data, root=str(root)), calibration=str(root),
                        run=RunConfig(directory=str(tmp_path / "run"), device="cpu")), quiet=True)  # fmt: skip
    assert not (tmp_path / "run" / "config.json").exists(), "nothing half done is left"


def large(count: int, seed: int, defect: bool = False) -> Tensor:
    """Images [count, 3, 128, 192] uint8 of a large part, with a spot of 20 pixels if they are defective."""
    source = torch.Generator().manual_seed(seed)
    clean = 0.5 + 0.2 * torch.sin(torch.arange(192) / 3) * torch.cos(torch.arange(128)[:, None] / 4)
    images = clean + 0.03 * torch.randn(count, 128, 192, generator=source)
    if defect:
        images[:, 70:90, 150:170] = 0.95
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1)


def test_large_images_in_tiles(tmp_path: Path) -> None:
    config = replace(CONFIG, data=replace(CONFIG.data, image_size=(128, 192)), tile=64)
    detector = fit(large(12, 0), alpha=0.4, config=config)
    bad, good = detector(large(2, 1, defect=True)), detector(large(4, 2))
    assert bad.maps["local"].shape == (2, 128, 192)
    assert float(bad.scores["local"].min()) > float(good.scores["local"].max())
    peak = int(bad.maps["local"][0].argmax())
    assert 60 <= peak // 192 < 100
    assert 140 <= peak % 192 < 180
    # a tile's worth of positions is pooled, not the image's
    assert detector.scorer.top_part == pytest.approx(0.1 * 64 * 64 / (128 * 192))
    save_detector(detector, tmp_path / "run")
    again = load_detector(tmp_path / "run")
    assert again.scorer.top_part == detector.scorer.top_part
    assert torch.equal(again(large(2, 1, defect=True)).scores["plain"], bad.scores["plain"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": 256, "data": DataConfig("folder", image_size=(96, 200))}, r"tile.*at most 96.*256"),
        ({"tile": 64}, r"data\.image_size.*height and width"),
        ({"tile": 48, "data": DataConfig("folder", image_size=96)}, r"tile.*strides.*48"),
        ({"tile": 32, "data": DataConfig("folder", image_size=96), "encoder": "small"}, r"tile.*small encoder"),
    ],
)
def test_wrong_tiles_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        fit(parts(3), config=FitConfig(**{"encoder": "efficientnet_lite0", "weights": "none", **change}))  # type: ignore[arg-type]


def test_images_of_another_aspect_ratio_keep_it(tmp_path: Path) -> None:
    config = replace(CONFIG, data=replace(CONFIG.data, letterbox=True))
    detector = fit(parts(12), alpha=0.4, config=config)
    wide = torch.cat([parts(2, 7), parts(2, 8)], dim=3)
    found = detector(wide)
    assert found.maps["local"].shape == (2, 64, 128)
    assert torch.equal(found.scores["plain"], detector(framed(wide, (64, 64), True)).scores["plain"])
    assert not torch.equal(found.scores["plain"], detector(framed(wide, (64, 64), False)).scores["plain"])
    save_detector(detector, tmp_path / "run")
    assert torch.equal(load_detector(tmp_path / "run")(wide).scores["plain"], found.scores["plain"])


def test_tiles_of_letterboxed_rectangles(tmp_path: Path) -> None:
    """Wide images in a less wide frame, which is cut into tiles: their maps lie on the images."""
    frame = (64, 96)
    data = replace(CONFIG.data, image_size=frame, letterbox=True)
    detector = fit(torch.cat([parts(12), parts(12, 3)], dim=3), alpha=0.2, config=replace(CONFIG, data=data, tile=32))
    assert isinstance(detector.model.encoder, TiledEncoder)
    wide = torch.cat([parts(3, 7), parts(3, 8, defect=True)], dim=3)  # 64 × 128, in the frame 48 × 96
    found, inner = detector(wide), detector(framed(wide, frame, True))
    assert torch.equal(found.scores["plain"], inner.scores["plain"])
    for name, maps in found.maps.items():
        assert torch.equal(maps, unframed(inner.maps[name], (64, 128), True))
        assert float(maps[:, 8:24, 104:120].mean()) > 1.5 * float(maps[:, :, :64].mean())
    save_detector(detector, tmp_path / "run")
    assert torch.equal(load_detector(tmp_path / "run")(wide).maps["local"], found.maps["local"])


def test_held_out_images_are_not_fitted() -> None:
    """Changing a calibration image changes its score and nothing of the fit."""
    images = parts(100)
    before = fit(images, alpha=0.04, config=CONFIG)
    assert before.calibration.held == "split"
    held = fitting.fit_detector.__globals__["hold_out"](100, 0.04, 0)[1][0].calibrate
    images[held[0]] = 255 - images[held[0]]
    after = fit(images, alpha=0.04, config=CONFIG)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    assert float(after.calibration.scores["plain"][-1]) > float(before.calibration.scores["plain"][-1])


def test_images_of_any_kind_and_size() -> None:
    images = parts(12)
    arrays = [np.ascontiguousarray(image.movedim(0, -1).numpy()) for image in images]
    pictures = [Image.fromarray(array).resize((80, 72)) for array in arrays]
    detector = fit(pictures, alpha=0.2, config=CONFIG)
    large = torch.nn.functional.interpolate(parts(3, 1).float(), (90, 70)).to(torch.uint8)
    found = detector(large)
    assert found.maps["plain"].shape == (3, 90, 70)
    close = detector(large.float() / 255).scores["plain"]
    torch.testing.assert_close(close, found.scores["plain"], rtol=0.1, atol=0.01)
    with pytest.raises(ArgumentError, match=r"\[B, 3, H, W\]"):
        detector(torch.zeros(1, 1, 64, 64, dtype=torch.uint8))


def test_saved_and_loaded(tmp_path: Path) -> None:
    detector, images = fit(parts(20), alpha=0.1, config=CONFIG), parts(3, 4, defect=True)
    save_detector(detector, tmp_path / "run")
    again = load_detector(tmp_path / "run")
    for one, other in zip(detector(images), again(images), strict=True):
        if isinstance(one, dict):
            assert all(torch.equal(values, other[name]) for name, values in one.items())
        else:
            assert torch.equal(one, other)
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {
        "detector.json",
        "detector-00000000.safetensors",
    }
    with pytest.raises(UserError, match="already holds a run"):
        save_detector(detector, tmp_path / "run")
    with pytest.raises(UserError, match="given its task from Python"):
        load_fitted_run(tmp_path / "run")
    for function in (load_scorer, resume):
        with pytest.raises(UserError, match="holds a fitted detector"):
            function(tmp_path / "run")


@needs_labels
def test_labelled_defects_decide(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    write(root, parts(20))
    write(root / "anomalous", parts(4, 9, defect=True))
    folder = fit(root, alpha=0.1, config=CONFIG)
    memory = fit(parts(20), alpha=0.1, defects=parts(4, 9, defect=True), config=CONFIG)
    for detector in (folder, memory):
        assert detector.lead == "labelled"
        assert bool(detector(parts(5, 2, defect=True)).verdicts.all())  # type: ignore[union-attr]
    save_detector(memory, tmp_path / "run")
    images = parts(2, 4)
    assert torch.equal(load_detector(tmp_path / "run")(images).p_values, memory(images).p_values)


@pytest.mark.parametrize("layout", [".", "good", "train/good", "train/normal"])
def test_folders_of_good_images(tmp_path: Path, layout: str) -> None:
    write(tmp_path / "data" / layout, parts(6))
    config = replace(CONFIG, data=replace(CONFIG.data, root=str(tmp_path / "data")))
    config = replace(config, run=RunConfig(directory=str(tmp_path / "run"), device="cpu"), alpha=0.2)
    run = fit_run(config, quiet=True)
    assert load_detector(run).calibration.count == 6
    with pytest.raises(UserError, match="no test images"):
        load_fitted_run(run)


def test_without_weights_the_small_encoder_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fitting, "pretrained_available", lambda: False)
    monkeypatch.setattr(fitting, "SMALL_STEPS", 2)
    root = write(tmp_path / "photos", parts(8)).parent / "photos"
    config = FitConfig(data=DataConfig("folder", root=str(root), normal="", image_size=32), alpha=0.2)
    run = fit_run(replace(config, run=RunConfig(directory=str(tmp_path / "run"), device="cpu")))
    said = capsys.readouterr().out
    assert "pip install 'anomem[pretrained]'" in said
    assert "small, trained here" in said
    assert load_detector(run)(parts(2)).scores["plain"].shape == (2,)


def test_what_is_chosen() -> None:
    assert resolved(FitConfig(encoder="small")).data.image_size == 64
    assert resolved(FitConfig(encoder="resnet18")).data.image_size == 128
    for wrong in ({"alpha": 0.0}, {"alpha": 1.0}, {"encoder": ""}):
        with pytest.raises(ArgumentError):
            FitConfig(**wrong)  # type: ignore[arg-type]
    for wrong in ({"prototypes": (0,)}, {"prototypes": (1.5,)}, {"method": "best"}, {"top_fraction": 0.0}):
        with pytest.raises(ArgumentError, match="fill"):
            FillConfig(**wrong)  # type: ignore[arg-type]


def test_a_failed_fit_leaves_nothing_to_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "photos", parts(6))
    config = replace(CONFIG, data=replace(CONFIG.data, root=str(root)), alpha=0.2)
    config = replace(config, run=RunConfig(directory=str(tmp_path / "run"), device="cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "fit_detector", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit_run(config, quiet=True)
    with pytest.raises(ArgumentError, match="scales"):
        fit_run(replace(config, scales=("nope",)), quiet=True)
    assert fit_run(config, quiet=True) == tmp_path / "run"


def test_unaligned_where_gaussians_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from anomem.scoring import fitted

    monkeypatch.setattr(fitted, "GAUSSIAN_BYTES", 1000)
    assert fit(parts(6), alpha=0.2, config=CONFIG).scorer.alignment == "pooled"


def test_images_too_many_to_hold_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from anomem.scoring import fitted

    held = fit(parts(10), alpha=0.2, config=CONFIG)
    monkeypatch.setattr(fitted, "HELD_BYTES", 0)
    encoded = fit(parts(10), alpha=0.2, config=CONFIG)
    torch.testing.assert_close(held.calibration.scores, encoded.calibration.scores, rtol=1e-2, atol=1e-2)


def test_the_readme_runs() -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    snippet = text.split("<!-- run by tests/train/test_fitting.py -->\n```python\n")[1].split("```")[0]
    given = {"images": parts(60), "new_images": parts(3, 1)}
    # With random weights: the package of weights may not be there.
    code = snippet.replace("alpha=0.05", "alpha=0.05, config=config")
    values = {**given, "config": CONFIG}
    exec(code, values)
    assert values["verdicts"].shape == (3,)


def test_a_setting_edited_after_the_fit_is_named(tmp_path: Path) -> None:
    save_detector(fit(parts(30), config=CONFIG), tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "alpha": 0.1}))  # the rate of the verdict may change
    assert load_detector(tmp_path / "run").alpha == 0.1
    file.write_text(json.dumps({**values, "fill": {**values["fill"], "beta_factor": 1.0}}))
    with pytest.raises(UserError, match=r"was trained with `fill\.beta_factor` = 4\.0, config\.json says 1\.0"):
        load_detector(tmp_path / "run")


def test_a_terminated_fit_leaves_nothing_to_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "good", parts(8))
    config = replace(CONFIG, data=replace(CONFIG.data, root=str(tmp_path / "good")))
    config = replace(config, run=replace(config.run, directory=str(tmp_path / "run")))
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # one that is not handled would end the tests
    monkeypatch.setattr(fitting, "_save", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        fit_run(config, quiet=True)
    signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "run" / "config.json").exists()


def test_lists_are_read_as_the_data_are_configured() -> None:
    """White at 4095, in grey; defects and calibration images as the others."""
    bright = [np.full((24, 24), value, np.uint16) for value in (1000, 2000, 3000)]
    config = replace(CONFIG, data=replace(CONFIG.data, levels=(0, 4095)))
    assert {float(x) for x in _as_set(bright, config.data, "images").images.unique()} == {62.0, 125.0, 187.0}
    coloured = list(parts(2))
    grey = _as_set(coloured, replace(config.data, grey=True, image_size=None), "images")
    expected = Image.fromarray(coloured[0].permute(1, 2, 0).numpy()).convert("L").resize((128, 128))
    assert grey.channels == 1
    assert (grey.images[0, 0].float() - torch.from_numpy(np.asarray(expected).copy()).float()).abs().mean() < 2


def test_images_beside_the_normal_ones_have_their_channels_or_are_named() -> None:
    grey = [x[:1] for x in parts(40)]
    detector = fit(grey, 0.1, config=CONFIG, calibration=list(parts(12, seed=3)))
    assert detector.model.mean.numel() == 1
    for name in ("defects", "calibration"):
        with pytest.raises(ArgumentError, match=rf"`{name}`: expected images .* as `images`"):
            fit(list(parts(40)), 0.1, config=CONFIG, **{name: ResidentImages(parts(4, seed=3)[:, :1])})
        with pytest.raises(ArgumentError, match=rf"`{name}\[0\]`"):
            fit(list(parts(40)), 0.1, config=CONFIG, **{name: [np.full((8, 8), np.nan)]})


def test_a_detector_takes_pixels_alone() -> None:
    images = parts(40)
    detector = fit(images, 0.1, config=CONFIG)
    with pytest.raises(ArgumentError, match="floating pixels from 0 to 1"):
        detector(images[:2].float())
    with pytest.raises(ArgumentError, match="alpha"):
        detector(images[:2], alpha=0.0)


@pytest.mark.parametrize("setting", [{"tensorboard": True}, {"precision": "float32"}, {"checkpoint_every": 5}])
def test_a_setting_that_a_fit_does_not_use_is_named(setting: dict[str, object]) -> None:
    config = FitConfig(encoder=LITE0, run=RunConfig(**setting))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=rf"`run.{next(iter(setting))}`: .*a fit does not use it"):
        resolved(config)


def test_threads_are_those_of_the_run_while_it_is_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    fitted = fitting._fitted
    monkeypatch.setattr(fitting, "_fitted", lambda *given: seen.append(torch.get_num_threads()) or fitted(*given))
    detector = fit(parts(40), 0.1, config=replace(CONFIG, run=replace(CONFIG.run, threads=before + 1)))
    save_detector(detector, tmp_path / "run")
    load_detector(tmp_path / "run")
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_a_fit_holds_its_folder_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another fit into it, at any time of the first, is refused and leaves its files alone."""
    folder = write(tmp_path / "good", parts(20))
    run = replace(CONFIG.run, directory=str(tmp_path / "run"))
    config = replace(CONFIG, data=replace(CONFIG.data, dataset="folder", normal="", root=str(folder)), run=run)
    fitted, refused = fitting._fitted, []

    def meanwhile(*arguments: object) -> object:
        with pytest.raises(UserError, match="by another process"):
            fit_run(config, quiet=True)
        refused.append((tmp_path / "run" / "config.json").exists())
        return fitted(*arguments)

    monkeypatch.setattr(fitting, "_fitted", meanwhile)
    fit_run(config, quiet=True)
    assert refused == [True]
    load_detector(tmp_path / "run")


def test_a_list_is_fitted_by_all_settings_of_the_configuration(tmp_path: Path) -> None:
    images = parts(30)
    config = replace(CONFIG, alpha=0.2, data=replace(CONFIG.data, aligned=False))
    detector = fit(list(images), config=config)
    assert (detector.alpha, detector.scorer.alignment) == (0.2, "pooled")
    assert fit(list(images), 0.1, config=config).alpha == 0.1
    double = detector(images[:2].double() / 255)
    torch.testing.assert_close(double.scores["plain"], detector(images[:2].float() / 255).scores["plain"])
    for name in ("labels", "calibration"):
        with pytest.raises(UserError, match="nowhere"):
            fit(list(images), config=replace(config, **{name: str(tmp_path / "nowhere")}))

"""AnoMemDetector: scikit-learn's conventions, its own checks, pipelines, grid search, and PyOD's attributes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("sklearn", reason="needs scikit-learn")

from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import validate_data

from anomem.errors import ArgumentError, UserError
from anomem.sklearn import AnoMemDetector
from tests.train.test_fitting import parts, write

SETTINGS: dict[str, Any] = {
    "encoder": "efficientnet_lite0", "weights": "none", "scales": ("block3",), "image_size": 64, "prototypes": 16,
    "device": "cpu",
}  # fmt: skip


def arrays(count: int, seed: int = 0, defect: bool = False) -> NDArray[np.uint8]:
    """[count, 64, 64, 3] uint8."""
    return np.ascontiguousarray(parts(count, seed, defect).movedim(1, -1).numpy())


@pytest.fixture(scope="module")
def detector() -> AnoMemDetector:
    return AnoMemDetector(0.1, **SETTINGS).fit(arrays(24))


def test_conventions(detector: AnoMemDetector) -> None:
    good, bad = arrays(10, 1), arrays(6, 2, defect=True)
    assert detector.score_samples(good).min() > detector.score_samples(bad).max(), "higher is more normal"
    for images in (good, bad):
        decision = detector.decision_function(images)
        np.testing.assert_array_equal(detector.predict(images), np.where(decision < 0, -1, 1))
        np.testing.assert_allclose(decision, detector.score_samples(images) - detector.offset_)
        said = detector.detector_(torch.from_numpy(images).movedim(-1, 1))
        assert said.verdicts is not None
        np.testing.assert_array_equal(detector.predict(images) == -1, said.verdicts.numpy())
        np.testing.assert_allclose(detector.p_values(images), said.p_values.numpy())
    assert (detector.predict(bad) == -1).all()
    np.testing.assert_array_equal(AnoMemDetector(0.1, **SETTINGS).fit_predict(arrays(24)), detector.predict(arrays(24)))


def test_pyod_attributes(detector: AnoMemDetector) -> None:
    np.testing.assert_allclose(detector.decision_scores_, -detector.score_samples(arrays(24)), rtol=1e-5)
    np.testing.assert_array_equal(detector.labels_, (detector.decision_scores_ > detector.threshold_).astype(int))
    assert detector.labels_.shape == (24,)


def test_pyod_itself_sees_one_of_its_own(detector: AnoMemDetector) -> None:
    """The same attributes, dtypes and directions as a detector of PyOD, and its functions for scores take ours."""
    pytest.importorskip("pyod", reason="needs PyOD")
    from pyod.models.knn import KNN
    from pyod.utils.data import evaluate_print
    from pyod.utils.utility import precision_n_scores

    images = np.concatenate([arrays(10, 1), arrays(6, 2, defect=True)])
    truth = np.repeat([0, 1], [10, 6])
    theirs = KNN(contamination=0.1).fit(arrays(24).reshape(24, -1).astype(np.float64))
    for name in ("decision_scores_", "labels_"):
        ours, their = getattr(detector, name), getattr(theirs, name)
        assert (ours.shape, ours.dtype) == (their.shape, their.dtype), name
    assert isinstance(theirs.threshold_, float)
    assert isinstance(detector.threshold_, float)
    for one in (theirs, detector):
        np.testing.assert_array_equal(one.labels_, (one.decision_scores_ > one.threshold_).astype(int))
    anomalous = -detector.score_samples(images)
    assert anomalous[truth == 1].min() > anomalous[truth == 0].max()
    assert precision_n_scores(truth, anomalous) == 1.0
    evaluate_print("anomem", truth, anomalous)


def test_images_of_every_kind(detector: AnoMemDetector, tmp_path: Path) -> None:
    images = arrays(3, 4)
    expected = detector.score_samples(images)
    folder = write(tmp_path / "images", parts(3, 4))
    paths = sorted(folder.iterdir())
    for given in (list(images), [str(path) for path in paths], paths, np.array([str(path) for path in paths]),
                  images.astype(np.float32) / 255):  # fmt: skip
        np.testing.assert_allclose(detector.score_samples(given), expected, rtol=1e-5)
    mixed = [images[0], np.zeros((20, 30), np.uint8)]
    assert detector.score_samples(mixed).shape == (2,)
    grey = AnoMemDetector(0.1, **SETTINGS).fit(
        images[..., 0].repeat(4, axis=0) + np.arange(12, dtype=np.uint8)[:, None, None]
    )
    assert grey.detector_.model.mean.shape[0] == 1


def test_mistakes(detector: AnoMemDetector) -> None:
    for given in (np.zeros((5, 3)), np.zeros((2, 8, 8, 5), np.uint8), [], "photos", np.zeros((0, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match="X: expected"):
            AnoMemDetector(0.1, **SETTINGS).fit(given)
    with pytest.raises(ValueError, match="received 1 sample, 5 times"):
        AnoMemDetector(0.1, **SETTINGS).fit(arrays(1).repeat(5, axis=0))
    with pytest.raises(UserError, match="No such file"):
        detector.predict(["missing.png"])
    with pytest.raises(ArgumentError, match="alpha"):
        AnoMemDetector(2.0, **SETTINGS).fit(arrays(4))
    with pytest.warns(UserWarning, match="cannot promise a false-alarm rate of 1.00%"):
        few = AnoMemDetector(0.01, **SETTINGS).fit(arrays(8))
    assert few.alpha_ == pytest.approx(1 / 9)
    assert (few.predict(arrays(3, 2, defect=True)) == -1).all()


def test_clone_pipeline_and_grid_search() -> None:
    images, labels = np.concatenate([arrays(16), arrays(8, 2, defect=True)]), np.repeat([1, -1], [16, 8])
    copy = clone(AnoMemDetector(0.2, **SETTINGS))
    assert copy.get_params() == AnoMemDetector(0.2, **SETTINGS).get_params()
    pipeline = make_pipeline(FunctionTransformer(lambda x: 255 - x), copy)
    assert pipeline.fit(images[:16]).predict(images[16:]).tolist() == [-1] * 8
    # Fitted to normals only: the folds say which.
    folds = [(np.arange(10), np.r_[10:16, 16:24])]
    search = GridSearchCV(copy, {"prototypes": [4, 16]}, scoring="roc_auc", cv=folds, refit=False)
    search.fit(images, labels)
    assert search.cv_results_["mean_test_score"].min() > 0.9


class Tabular(AnoMemDetector):
    """Draws every row of a table as an image, so that scikit-learn's tabular checks reach fit and predict."""

    def _images(self, X: Any, fitted: Any) -> Any:
        table = validate_data(self, X, reset=fitted is None)
        level = 0.5 + 0.5 * np.sin(table)  # equal for equal rows only: images that are all alike are refused
        rows = np.repeat(level[:, :, None], 32, axis=2)  # [N, F, 32]
        images = np.repeat(rows, -(-32 // rows.shape[1]), axis=1)[:, :32].astype(np.float32)
        return super()._images(images, fitted)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


REFUSED = {
    "check_methods_subset_invariance": "asks for 1e-7: the rounding of a float32 convolution depends on the batch",
}


def test_scikit_learns_own_checks() -> None:
    settings = {**SETTINGS, "scales": ("block0",), "image_size": 16, "prototypes": 2, "fill": "random"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = check_estimator(AnoMemDetector(0.1, **settings), on_skip=None)
        found = check_estimator(Tabular(0.1, **settings), expected_failed_checks=REFUSED, on_fail=None, on_skip=None)
    assert {result["status"] for result in own} == {"passed"}
    failed = {r["check_name"]: str(r["exception"]) for r in found if r["status"] == "failed"}
    assert failed == {}
    assert sum(r["status"] == "passed" for r in found) > 35


def test_another_fit_forgets_the_one_before() -> None:
    detector = AnoMemDetector(0.1, **SETTINGS).fit(arrays(24)[..., :1])
    detector.set_params(image_size=32).fit(arrays(24))
    model = detector.detector_.model
    assert (model.mean.numel(), model.encoder.image_size) == (3, (32, 32))

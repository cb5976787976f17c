"""AnoMemDetector: the fitted detector as a scikit-learn outlier detector, with PyOD's attributes."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomem.data import DataConfig, ImageFiles, Images, ResidentImages, StreamedImages
from anomem.data.convert import as_uint8, resize
from anomem.errors import UserError, optional
from anomem.scoring import FillConfig, FittedDetector
from anomem.train import FitConfig, RunConfig, fit

with optional("AnoMemDetector"):
    from sklearn.base import BaseEstimator, OutlierMixin
    from sklearn.utils.validation import check_is_fitted

SIZE = 128
"""Side of the images in pixels where none is given."""


class AnoMemDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """A detector fitted to good images: frozen encoder, filled memories, calibrated decision.

    scikit-learn's conventions for outliers hold: `score_samples` and `decision_function` are *higher for normal*
    images, `predict` gives 1 for normal and −1 for anomalous ones, and `decision_function` is below 0 exactly where
    `predict` is −1. PyOD's attributes have PyOD's: `decision_scores_` is higher for anomalous images, `labels_` is 1.

    Images are an array [N, H, W] (grey) or [N, H, W, C] with 1 or 3 channels, uint8 or float in [0, 1]; a list of
    arrays or PIL images of any sizes; or a list of file paths.

    Args:
        alpha: at most about this part of normal images is called anomalous. Where too few images calibrate for it,
            `fit` warns and takes the least rate that they allow, `alpha_`.
        encoder: see `FitConfig.encoder`.
        weights: see `FitConfig.weights`.
        scales: see `FitConfig.scales`.
        image_size: side in pixels to which images are resized; 128 when None.
        aligned: whether a position means the same in every image.
        fill: "kmeans", "coreset", "random" or "learned".
        prototypes: M of each memory, or a ratio in (0, 1) of the features.
        random_state: seed of the prototypes and of the calibration images; an integer.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Attributes:
        detector_: the `FittedDetector`.
        offset_: `decision_function` is `score_samples` minus it.
        alpha_: the false-alarm rate of `predict`.
        n_samples_fit_: N.
        decision_scores_: [N], of the training images; higher is more anomalous.
        threshold_: training images with a higher score have the label 1.
        labels_: [N], 0 or 1.

    Example:
        >>> detector = AnoMemDetector(alpha=0.05).fit(good_images)  # [N, H, W, 3] uint8
        >>> detector.predict(new_images)  # [B], 1 or -1
        >>> detector.decision_function(new_images)  # [B], below 0: anomalous
    """

    def __init__(
        self,
        alpha: float = 0.01,
        *,
        encoder: str = "auto",
        weights: str = "default",
        scales: Sequence[str] = (),
        image_size: int | None = None,
        aligned: bool = True,
        fill: str = "kmeans",
        prototypes: float = 1024,
        random_state: int = 0,
        device: str = "auto",
    ) -> None:
        self.alpha = alpha
        self.encoder = encoder
        self.weights = weights
        self.scales = scales
        self.image_size = image_size
        self.aligned = aligned
        self.fill = fill
        self.prototypes = prototypes
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any = None) -> AnoMemDetector:
        """Fit to good images.

        Args:
            X: images or paths, see the class; at least three.
            y: ignored.

        Raises:
            ValueError: no images, images that are all alike, or a setting out of range.
            UserError: a file that cannot be read, or missing weights.
        """
        images = self._images(X, None)
        config = FitConfig(
            data=DataConfig(dataset="images", normal="normal", image_size=self.image_size, seed=self.random_state),
            encoder=self.encoder,
            weights=self.weights,
            scales=tuple(self.scales),
            fill=FillConfig(method=self.fill, prototypes=(self.prototypes,)),  # type: ignore[arg-type]
            run=RunConfig(seed=self.random_state, device=self.device),
        )
        config = replace(config, alpha=self.alpha)
        self.detector_: FittedDetector = fit(images, self.alpha, aligned=self.aligned, config=config)
        known = self.detector_.calibration.scores[self.detector_.lead].sort(descending=True).values
        if len(known) == 0:
            times = f", {len(images)} times" if len(images) > 1 else ""
            raise ValueError(f"X: expected images that differ, to calibrate with; received 1 sample{times}")
        allowed = math.floor(self.alpha * (1 + 1e-12) * (len(known) + 1))
        if allowed < 1:
            warnings.warn(
                f"{self.detector_.calibration.promise(self.alpha)}; `predict` takes that",
                UserWarning,
                stacklevel=2,
            )
        self.alpha_ = self.alpha if allowed >= 1 else 1 / (len(known) + 1)
        self.threshold_ = float(known[max(allowed, 1) - 1])
        self.offset_ = -self.threshold_
        self.n_samples_fit_ = len(images)
        self.decision_scores_ = -self._score(images)
        self.labels_ = (self.decision_scores_ > self.threshold_).astype(int)
        return self

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Minus the anomaly score, [B]; higher is more normal."""
        check_is_fitted(self, "detector_")
        return self._score(self._images(X, self.detector_))

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """`score_samples` relative to the threshold, [B]; below 0 is anomalous."""
        scores: NDArray[np.float64] = self.score_samples(X) - self.offset_
        return scores

    def predict(self, X: Any) -> NDArray[np.int64]:
        """1 for normal and −1 for anomalous images, [B]."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def p_values(self, X: Any) -> NDArray[np.float64]:
        """Share of the calibration normals that score at least as high, [B]; see `Calibration`."""
        scores = torch.from_numpy(-self.score_samples(X))
        found: NDArray[np.float64] = self.detector_.calibration.p_values(self.detector_.lead, scores).numpy()
        return found

    def _score(self, images: Images) -> NDArray[np.float64]:
        scores = self.detector_.over(images).scores[self.detector_.lead]
        found: NDArray[np.float64] = -scores.double().numpy()
        return found

    def _images(self, X: Any, fitted: FittedDetector | None) -> Images:
        """Images as a set, of a detector's size and channels; as they are to be fitted where there is none."""
        size: int | tuple[int, int] = self.image_size or SIZE
        channels = None
        if fitted is not None:
            size, channels = fitted.model.encoder.image_size, fitted.model.mean.shape[0]
        if isinstance(X, (str, os.PathLike)):
            raise ValueError("X: expected a list of images or of paths, received one path; list the files of a folder")
        if isinstance(X, np.ndarray) and X.dtype.kind in "uifb":
            return ResidentImages(_as_channels(_stacked(X, size), channels))
        items = list(X) if isinstance(X, (Iterable, Tensor)) else []
        if not items:
            raise ValueError("X: expected images or paths of images, received none: found array with 0 sample(s)")
        if all(isinstance(item, (str, os.PathLike)) for item in items):
            return StreamedImages(ImageFiles([Path(str(item)) for item in items], size, channels == 1), workers=0)
        pixels = [resize(as_uint8(item, f"X[{i}]")[None], size)[0] for i, item in enumerate(items)]
        most = channels or max(len(p) for p in pixels)  # grey images among coloured ones
        return ResidentImages(torch.cat([_as_channels(p[None], most) for p in pixels]))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        return tags


def _stacked(X: NDArray[Any], size: int | tuple[int, int]) -> Tensor:
    """An array of images as [N, C, h, w] uint8."""
    if X.ndim not in (3, 4) or (X.ndim == 4 and X.shape[3] not in (1, 3)):
        shape = " × ".join(map(str, X.shape))
        raise ValueError(
            f"X: expected images [N, H, W] or [N, H, W, C] with 1 or 3 channels, or paths of images, received an array "
            f"of {shape}. Reshape your data"
        )
    if not X.shape[0]:
        raise ValueError("X: expected at least one image, received none: found array with 0 sample(s)")
    return torch.cat([resize(as_uint8(image, f"X[{i}]")[None], size) for i, image in enumerate(X)])


def _as_channels(images: Tensor, channels: int | None) -> Tensor:
    """Grey images [N, 1, H, W] with as many channels as the model's; others as they are."""
    if channels is None or images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1)
    raise UserError(f"X: expected grey images, as it was fitted to, received {images.shape[1]} channels")

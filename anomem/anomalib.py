"""AnoMem and Patchcore for anomalib: the fitted detector in its Engine, and its PatchCore with `functional.nearest`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from anomem.data import DataConfig
from anomem.errors import UserError, optional
from anomem.functional import nearest
from anomem.ops.nearest import MOST
from anomem.scoring import FillConfig, FittedDetector
from anomem.scoring.decision import normals_needed
from anomem.scoring.fitted import stored
from anomem.train import FitConfig, RunConfig, fit
from anomem.train.fitting import described, shaped_detector
from anomem.validation import require

with optional("anomem.anomalib", "anomalib"):
    from anomalib import LearningType
    from anomalib.data import InferenceBatch
    from anomalib.models import Patchcore as TheirPatchcore
    from anomalib.models.components import AnomalibModule, MemoryBankMixin
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel as TheirPatchcoreModel
    from anomalib.post_processing import PostProcessor
    from anomalib.pre_processing import PreProcessor
    from torchvision.transforms.v2 import Compose, Resize

SIZE = 128
"""Side of the images in pixels where none is given."""
UNFITTED = "AnoMem is not fitted: call `Engine().fit(model, datamodule=...)` first"


class PatchcoreModel(TheirPatchcoreModel):  # type: ignore[misc]
    """anomalib's, but for the search of nearest neighbours."""

    def nearest_neighbors(self, embedding: Tensor, n_neighbors: int) -> tuple[Tensor, Tensor]:
        """Distances and indices of rows of the memory bank: [n] each for one neighbour, else [n, k].

        Args:
            embedding: [n, d].
            n_neighbors: k.
        """
        if n_neighbors > MOST or torch.compiler.is_exporting():
            found: tuple[Tensor, Tensor] = super().nearest_neighbors(embedding, n_neighbors)
            return found
        distance, index = nearest(embedding, self.memory_bank, k=None if n_neighbors == 1 else n_neighbors)
        return distance.sqrt().to(embedding.dtype), index


class Patchcore(TheirPatchcore):  # type: ignore[misc]
    """anomalib's PatchCore; `functional.nearest` searches the memory bank and stores no matrix of distances.

    Features, coreset, weights of the score and maps are anomalib's.

    Args:
        **options: of `anomalib.models.Patchcore`.

    Example:
        >>> from anomem.anomalib import Patchcore
        >>> Engine().fit(Patchcore(), datamodule=Folder("mine", root="photos", normal_dir="good"))
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model.__class__ = PatchcoreModel


class DetectorModel(nn.Module):
    """What a fitted detector says of images, as anomalib spells it.

    Shape:
        images [B, 3, H, W] float in [0, 1] -> scores [B], verdicts [B] bool, maps [B, 1, H, W] and anomalous pixels
        [B, 1, H, W] bool.
    """

    def __init__(self) -> None:
        super().__init__()
        self.detector: FittedDetector | None = None
        """None until it is fitted."""

    def forward(self, images: Tensor) -> Any:
        """See the class."""
        if self.detector is None:
            raise UserError(UNFITTED)
        found = self.detector(grey_levels(images))
        heat = found.maps["local"][:, None]
        thresholds = self.thresholds()
        return InferenceBatch(
            pred_score=found.scores[self.detector.lead],
            pred_label=None if found.verdicts is None else found.verdicts.to(images.device),
            anomaly_map=heat,
            pred_mask=None if thresholds is None else heat > thresholds[1],
        )

    def thresholds(self) -> tuple[float, float] | None:
        """Calibrated: above the first a score is anomalous, above the second a pixel of a map.

        None where too few normals calibrate for alpha, or nothing is fitted.
        """
        detector = self.detector
        if detector is None or detector.calibration.count < normals_needed(detector.alpha):
            return None
        calibration, alpha = detector.calibration, detector.alpha
        return calibration.threshold(detector.lead, alpha), calibration.pixel_threshold("local", alpha)


class CalibratedPostProcessor(PostProcessor):  # type: ignore[misc]
    """anomalib's, with the calibrated thresholds in place of those of the best F1 on labelled validation images."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Set thresholds and ranges for the normalisation of scores."""
        super().on_validation_epoch_end(trainer, pl_module)
        thresholds = pl_module.model.thresholds()
        if thresholds is not None:
            self._image_threshold.fill_(thresholds[0])
            self._pixel_threshold.fill_(thresholds[1])


class AnoMem(MemoryBankMixin, AnomalibModule):  # type: ignore[misc]
    """The fitted detector as an anomalib model: frozen encoder, filled memories, calibrated decision.

    Training collects the normal images; at its end the detector is fitted to them, as `anomem.train.fit` does. A label
    is its verdict at alpha, and a mask holds the pixels above its calibrated pixel threshold; where too few normals
    calibrate for alpha both are anomalib's own. Images are the whole grey levels of what the pre-processor gives,
    without normalisation: the encoder normalises.

    Args:
        alpha: about this part of normal images is called anomalous.
        encoder: see `FitConfig.encoder`.
        weights: see `FitConfig.weights`.
        scales: see `FitConfig.scales`.
        image_size: (H, W) or a side in pixels, of the default pre-processor.
        aligned: whether a position means the same in every image.
        fill: "kmeans", "coreset" or "random".
        prototypes: M of each memory, or a ratio in (0, 1) of the features.
        random_state: seed of the prototypes and of the calibration images.
        pre_processor: see `AnomalibModule`; without normalisation.
        post_processor: see `AnomalibModule`.
        evaluator: see `AnomalibModule`.
        visualizer: see `AnomalibModule`.

    Raises:
        UserError: anomalib is not installed.

    Example:
        >>> from anomem.anomalib import AnoMem
        >>> Engine().fit(AnoMem(), datamodule=Folder("mine", root="photos", normal_dir="good"))
    """

    model: DetectorModel

    def __init__(
        self,
        alpha: float = 0.01,
        encoder: str = "auto",
        weights: str = "default",
        scales: Sequence[str] = (),
        image_size: int | tuple[int, int] = SIZE,
        aligned: bool = True,
        fill: str = "kmeans",
        prototypes: float = 1024,
        random_state: int = 0,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Any = True,
        visualizer: Any = True,
    ) -> None:
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(image_size)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.aligned = aligned
        data = DataConfig(dataset="images", normal="normal", seed=random_state)
        self.config = FitConfig(
            data=data,
            encoder=encoder,
            weights=weights,
            scales=tuple(scales),
            fill=FillConfig(method=fill, prototypes=(prototypes,)),  # type: ignore[arg-type]
            alpha=alpha,
            run=RunConfig(seed=random_state),
        )
        """Of the fit; the image size is that of the images."""
        self.model = DetectorModel()
        self.seen: list[tuple[str, Tensor]] = []
        """Path and whole grey levels [3, H, W] of the training images, until they are fitted."""

    @property
    def detector(self) -> FittedDetector:
        """What was fitted; `anomem.train.save_detector` writes it as a run.

        Raises:
            UserError: nothing is fitted yet.
        """
        if self.model.detector is None:
            raise UserError(UNFITTED)
        return self.model.detector

    def training_step(self, batch: Any, *_: Any, **__: Any) -> Tensor:
        """Collect a batch of normal images. The loss is a constant that Lightning may differentiate."""
        if self.model.detector is None:
            levels = grey_levels(batch.image).cpu()
            self.seen += zip(batch.image_path or [""] * len(levels), levels, strict=True)
        return torch.zeros((), requires_grad=True, device=self.device)

    def validation_step(self, batch: Any, *_: Any, **__: Any) -> Any:
        """Scores and maps of a batch, from which the post-processor takes the range of scores."""
        return batch.update(**self.model(batch.image)._asdict())

    def fit(self) -> None:
        """Fit the detector to the images that training has collected, in the order of their paths; anomalib calls it.

        Raises:
            UserError: no images, or weights are missing.
        """
        require(len(self.seen) > 0, "datamodule", "normal images to train on", "none")
        images = torch.stack([image for _, image in sorted(self.seen, key=lambda seen: seen[0])])
        self.seen.clear()
        # Validation, before which anomalib calls this, runs in inference mode; the small encoder is trained.
        with torch.inference_mode(False), torch.enable_grad():
            config = replace(
                self.config,
                data=replace(self.config.data, image_size=(images.shape[2], images.shape[3])),
                run=replace(self.config.run, device=str(self.device)),
            )
            self.model.detector = fit(images, config.alpha, aligned=self.aligned, config=config)

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is optimised by Lightning."""

    @staticmethod
    def configure_pre_processor(image_size: int | tuple[int, int] | None = None) -> Any:
        """Resizing only.

        Args:
            image_size: side of a square, or (H, W), in pixels.
        """
        size = image_size or SIZE
        return PreProcessor(Compose([Resize((size, size) if isinstance(size, int) else tuple(size), antialias=True)]))

    @staticmethod
    def configure_post_processor() -> Any:
        """`CalibratedPostProcessor`."""
        return CalibratedPostProcessor()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the training images, on one device."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}

    @property
    def learning_type(self) -> Any:
        """From normal images alone."""
        return LearningType.ONE_CLASS

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the detector is beside its tensors: plain values, and the calibration scores."""
        super().on_save_checkpoint(checkpoint)
        detector = self.model.detector
        if detector is not None:
            checkpoint["anomem"] = {
                "encoder": detector.config.encoder,
                **described(detector),
                "tensors": {key: x for key, x in stored(detector).items() if key.startswith("calibration.")},
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make a detector of the right shapes, whose tensors are loaded next."""
        super().on_load_checkpoint(checkpoint)
        about = checkpoint.get("anomem")
        if about is None:
            return
        prefix = "model.detector."
        state = checkpoint["state_dict"].items()
        tensors = {f"detector.{key.removeprefix(prefix)}": x for key, x in state if key.startswith(prefix)}
        data = replace(self.config.data, image_size=tuple(about["image_size"]))
        run = replace(self.config.run, device=str(self.device))
        config = replace(self.config, data=data, run=run, encoder=about["encoder"])
        self.model.detector = shaped_detector(config, {**tensors, **about["tensors"]}, about)

    def to_onnx(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: `anomem export` writes a file with resizing and decision, and checks it against the detector."""
        raise UserError(
            "`Engine.export`: write a run with `anomem.train.save_detector(model.detector, RUN)`, then "
            "`anomem export RUN --format onnx` or openvino"
        )

    to_openvino = to_onnx


def grey_levels(images: Tensor) -> Tensor:
    """Images [B, C, H, W] in [0, 1] as uint8.

    Raises:
        ArgumentError: other values: the pre-processor normalises.
    """
    require(images.is_floating_point(), "images", "floating pixels from 0 to 1", images.dtype)
    low, high = (float(value) for value in images.aminmax())
    right = low >= -1e-3 and high <= 1 + 1e-3  # NaN is neither
    hint = "leave Normalize out of the pre-processor: the encoder normalises"
    require(right, "images", "floating pixels from 0 to 1", lambda: f"{low:.3g} to {high:.3g}", hint)
    return (images * 255).round().clamp(0, 255).to(torch.uint8)

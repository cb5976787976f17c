"""TrainConfig: everything a run depends on as plain values; its presets; to JSON and back.

Each configuration checks itself when it is made and raises `ArgumentError`.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from anomem.augment import AugmentConfig
from anomem.data import DataConfig
from anomem.errors import UserError
from anomem.models import ModelConfig
from anomem.reference.contrast import Negatives
from anomem.scoring import FillConfig, ScoreConfig
from anomem.validation import require, require_choice, require_count, require_setting

T = TypeVar("T")
Preset = Literal["digits", "textures", "cifar10", "cifar100", "folder", "elpv", "paper"]
Positive = Literal["memory", "view"]
FirstPrototypes = Literal["normal", "features"]
Precision = Literal["auto", "float32", "bf16"]
Parallel = Literal["ddp", "fsdp"]
BatchNormOver = Literal["job", "process"]
MemoryFormat = Literal["auto", "contiguous", "channels_last"]
Compile = Literal["auto", True, False]
EXECUTION = frozenset(
    (
        "data.root", "data.workers", "data.resident_megabytes", "model.impl", "score.batch_size", "run.directory",
        "run.device", "run.threads", "run.memory_format", "run.compile", "run.cuda_graph", "run.parallel",
        "loss.ring", "run.log_every", "run.checkpoint_every", "run.checkpoint_minutes", "run.tensorboard",
        "alpha", "labels", "calibration", "weights", "fill.batch_size",
    )
)  # fmt: skip
"""Settings that may change after a part of a run: where and how it executes, and the rate of the verdict."""
PAPER_EPOCHS = 200
"""Of a class, in the preset "paper"."""
STEPS = 2**31
"""Upper bound of steps and seeds: a permutation's seed holds both in 63 bits."""


@dataclass(frozen=True)
class LossConfig:
    """Stage 1, Eqs. (2) to (4)."""

    temperature: float = 0.2
    """tau of the contrast."""
    variance_weight: float = 0.05
    """lambda_V."""
    negatives: Negatives = "image"
    """Other images at the same position, other positions of the same image, or both."""
    symmetric: bool = True
    """Contrast both ways and take the mean."""
    positive: Positive = "memory"
    """Positive of a normal image's vector: what the memory returns for the other view, or the other view itself.
    The latter is a control: the memories are then not trained."""
    ratio: float = 1.0
    """r_s: part of a map's positions sampled in a step."""
    max_positions: int = 8
    """Cap on the sampled positions of a scale."""
    positions_per_image: bool = False
    """Draw positions for each image instead of once for the batch."""
    ring: bool = False
    """With several processes, at a scale with fewer positions: let the columns travel instead of gathering them."""

    def __post_init__(self) -> None:
        require_setting(self.temperature, "loss.temperature")
        require(1e-4 <= self.temperature <= 1e4, "loss.temperature", "a number from 1e-4 to 1e4", self.temperature)
        require_setting(self.variance_weight, "loss.variance_weight")
        require(
            0 <= self.variance_weight <= 1e6, "loss.variance_weight", "a number ≥ 0, up to 1e6", self.variance_weight
        )
        require_choice(self.negatives, "loss.negatives", get_args(Negatives))
        require_choice(self.positive, "loss.positive", get_args(Positive))
        require_setting(self.ratio, "loss.ratio")
        require(0 < self.ratio <= 1, "loss.ratio", "a part of the positions in (0, 1]", self.ratio)
        require_count(self.max_positions, "loss.max_positions", 1)


@dataclass(frozen=True)
class OptimizerConfig:
    """SGD with Nesterov momentum; linear warm-up, then cosine annealing to zero."""

    section: ClassVar[str] = "optimizer"  # in the configuration, for messages

    steps: int = 150
    """Gradient steps. 0 in stage 1 leaves the encoder as it is and fills the memories with features of all normals."""
    batch_size: int = 1024
    """Images per step; a smaller training set is one batch."""
    learning_rate: float = 0.05
    """Peak."""
    momentum: float = 0.9
    """Nesterov."""
    weight_decay: float = 5e-4
    """On everything but the memories."""
    warmup: int = 10
    """Steps of linear warm-up."""
    clip: float | None = None
    """Largest gradient norm; None clips nothing."""
    ema: float | None = None
    """Decay of a running average of the weights, 0.99 for example, which replaces them after the last step."""
    accumulate: int = 1
    """Parts of a batch that are contrasted one after another; their gradients are averaged before the step."""
    micro_batch: int | None = None
    """Images that a process encodes at once; None encodes the batch at once. The whole batch is still contrasted.
    Every image is encoded twice; sampled vectors and their contrast grow with the batch, maps do not.
    Batch norm sees micro-batches, so with it the result is not that of the batch at once."""

    def __post_init__(self) -> None:
        fewest = 0 if self.section == "optimizer" else 1
        require_count(self.steps, f"{self.section}.steps", fewest, STEPS)
        enough = isinstance(self.batch_size, int) and self.batch_size >= 2
        hint = "the contrast needs another image"
        require(enough, f"{self.section}.batch_size", "an integer ≥ 2", self.batch_size, hint)
        require_count(self.batch_size, f"{self.section}.batch_size", 2, STEPS)
        require_setting(self.learning_rate, f"{self.section}.learning_rate")
        require(self.learning_rate > 0, f"{self.section}.learning_rate", "a number > 0", self.learning_rate)
        require(self.learning_rate <= 100, f"{self.section}.learning_rate", "a number up to 100", self.learning_rate)
        require_setting(self.momentum, f"{self.section}.momentum")
        require(0 < self.momentum < 1, f"{self.section}.momentum", "a number in (0, 1)", self.momentum)
        require_setting(self.weight_decay, f"{self.section}.weight_decay")
        decay = self.weight_decay
        require(0 <= decay <= 100, f"{self.section}.weight_decay", "a number ≥ 0, up to 100", decay)
        require_count(self.warmup, f"{self.section}.warmup", 0)
        if self.clip is not None:
            require_setting(self.clip, f"{self.section}.clip")
            require(self.clip > 0, f"{self.section}.clip", "a number > 0", self.clip)
        if self.ema is not None:
            require_setting(self.ema, f"{self.section}.ema")
            require(0 < self.ema < 1, f"{self.section}.ema", "a decay in (0, 1), or None", self.ema)
        require_count(self.accumulate, f"{self.section}.accumulate", 1)
        enough = 2 * self.accumulate <= self.batch_size
        most = f"at most {self.batch_size // 2}, for two images in each part of a batch of {self.batch_size}"
        require(enough, f"{self.section}.accumulate", most, self.accumulate)
        if self.micro_batch is not None:
            require_count(self.micro_batch, f"{self.section}.micro_batch", 1)
            within = self.micro_batch <= self.batch_size
            require(within, f"{self.section}.micro_batch", f"at most the batch of {self.batch_size}", self.micro_batch)


@dataclass(frozen=True)
class Stage2OptimizerConfig(OptimizerConfig):
    """The optimisation of stage 2: smaller steps, clipped."""

    section: ClassVar[str] = "stage2.optimizer"
    learning_rate: float = 0.005
    """Peak."""
    clip: float | None = 5.0
    """Largest gradient norm; None clips nothing."""


@dataclass(frozen=True)
class Stage2Config:
    """Margin stage on the deviation maps; runs where there are labelled or synthetic anomalies."""

    enabled: bool = True
    """Run it where there are anomalies."""
    margin: float = 2.0
    """M ≥ 1: normals end inside radius 1/M, anomalies outside M; 1 puts both on the unit sphere."""
    adaptive: bool = False
    """Adapt M while training, from `margin` on (`anomem.train.margin`); beyond the paper."""
    hidden: int = 32
    """Channels of the head's convolutions."""
    embedding: int = 32
    """Length of g(s)."""
    optimizer: Stage2OptimizerConfig = field(default_factory=Stage2OptimizerConfig)
    """Optimisation of stage 2."""

    def __post_init__(self) -> None:
        require_setting(self.margin, "stage2.margin")
        require(1 <= self.margin <= 1e4, "stage2.margin", "a number ≥ 1, up to 1e4", self.margin)
        require_count(self.hidden, "stage2.hidden", 1, 4096)
        require_count(self.embedding, "stage2.embedding", 1, 65536)


@dataclass(frozen=True)
class RunConfig:
    """Where and how a run executes."""

    directory: str | None = None
    """Run directory; runs/<dataset>-<normal>-<seed> when None."""
    seed: int = 0
    """Seed of weights, batches, positions and augmentations."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; "auto" takes a GPU where there is one."""
    threads: int | None = None
    """CPU threads; torch's own choice when None."""
    precision: Precision = "auto"
    """bf16 runs forward passes under bfloat16 autocast, weights stay float32.
    On a CPU the contrast stays float32 too.
    auto takes it where the processor or GPU multiplies bfloat16 natively."""
    memory_format: MemoryFormat = "auto"
    """Layout of images and maps; auto is channels_last."""
    parallel: Parallel = "ddp"
    """With several processes: ddp replicates the encoder, fsdp shards it."""
    batch_norm: BatchNormOver = "job"
    """With several processes: whose batch a batch norm normalises by.
    job, the batch of all, gives the weights that one process would train.
    process, the share of each, sends two messages fewer per layer; the weights then depend on how many there are."""
    compile: Compile = "auto"
    """Stage 1's encoder by torch.compile. auto is False: it gained too little where it was measured.
    Not with several processes, `optimizer.micro_batch` or `optimizer.accumulate`."""
    cuda_graph: bool = True
    """On a GPU: capture stage 1's step and launch it as one CUDA graph, where it can be captured."""
    log_every: int = 10
    """Steps between log rows."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints within a stage; 0 counts no minutes. One is written at the end of each stage."""
    checkpoint_every: int = 0
    """Steps between checkpoints within a stage, besides; 0 counts no steps."""
    tensorboard: bool = False
    """Also write TensorBoard logs."""

    def __post_init__(self) -> None:
        require_count(self.seed, "run.seed", 0, STEPS)
        require_choice(self.precision, "run.precision", get_args(Precision))
        require_choice(self.parallel, "run.parallel", get_args(Parallel))
        require_choice(self.batch_norm, "run.batch_norm", get_args(BatchNormOver))
        require_choice(self.memory_format, "run.memory_format", get_args(MemoryFormat))
        require_choice(self.compile, "run.compile", get_args(Compile))
        if self.threads is not None:
            require_count(self.threads, "run.threads", 1)
            require(self.threads <= 1024, "run.threads", "at most 1024", self.threads)
        require_count(self.log_every, "run.log_every", 1)
        require_setting(self.checkpoint_minutes, "run.checkpoint_minutes")
        require(self.checkpoint_minutes >= 0, "run.checkpoint_minutes", "a number ≥ 0", self.checkpoint_minutes)
        require_count(self.checkpoint_every, "run.checkpoint_every", 0)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; each part checks itself when it is made.

    Example:
        >>> config = preset("folder")
        >>> config = replace(config, data=replace(config.data, root="my/images", normal="good"))
        >>> train(config)
    """

    data: DataConfig = field(default_factory=DataConfig)
    """Images and their split."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentations of both stages."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Encoder and memories."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Stage 1."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimisation of stage 1."""
    stage2: Stage2Config = field(default_factory=Stage2Config)
    """Stage 2."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """Scoring."""
    run: RunConfig = field(default_factory=RunConfig)
    """Execution."""
    prototypes_from: FirstPrototypes = "features"
    """First prototypes: drawn from N(0, 1), or features of the first batch."""
    synthetic_outliers: float = 0.0
    """Synthetic anomalies per normal image of a batch, in both stages; the paper uses none."""

    def __post_init__(self) -> None:
        require_choice(self.prototypes_from, "prototypes_from", get_args(FirstPrototypes))
        require_setting(self.synthetic_outliers, "synthetic_outliers")
        require(
            0 <= self.synthetic_outliers <= 100, "synthetic_outliers", "a ratio from 0 to 100", self.synthetic_outliers
        )

    @property
    def has_stage2(self) -> bool:
        """Whether stage 2 runs: it is enabled and there are anomalies, labelled or synthetic."""
        return self.stage2.enabled and (self.data.outlier_ratio > 0 or self.synthetic_outliers > 0)


@dataclass(frozen=True)
class FitConfig:
    """A detector that is fitted without training: a frozen encoder, filled memories, a calibrated decision.

    Example:
        >>> config = FitConfig(data=DataConfig("folder", root="photos"), alpha=0.005)
        >>> fit_run(config)
    """

    data: DataConfig = field(default_factory=lambda: DataConfig(dataset="folder", normal=""))
    """Images and their split."""
    encoder: str = "auto"
    """efficientnet_lite0, a name of torchvision, timm:NAME, or small, which is trained.
    auto takes efficientnet_lite0 where its weights are installed, else small."""
    weights: str = "default"
    """The encoder's own weights, a .safetensors or .pth file of them, or "none" for random ones: a control."""
    scales: tuple[str, ...] = ()
    """Scales by the encoder's own names or by stride; empty for the encoder's own choice."""
    labels: str | None = None
    """Folder of images with defects to learn from; DIR/anomalous where there is one."""
    calibration: str | None = None
    """Folder of other good images that set the false-alarm rate; a part of DIR when not given."""
    tile: int | None = None
    """Side in pixels of the overlapping tiles in which images of data.image_size are encoded.
    None encodes the whole image at once."""
    fill: FillConfig = field(default_factory=FillConfig)
    """Filled memories and their scores."""
    alpha: float = 0.01
    """False-alarm rate of the verdict: about this part of normal images is called anomalous."""
    run: RunConfig = field(default_factory=RunConfig)
    """Execution."""

    def __post_init__(self) -> None:
        require_setting(self.alpha, "alpha")
        require(0 < self.alpha < 1, "alpha", "a rate between 0 and 1", self.alpha)
        require(self.encoder != "", "encoder", "a name", repr(self.encoder))
        if self.tile is not None:
            require_count(self.tile, "tile", 1)
            hint = "tiles are cut from images of that size"
            require(self.data.image_size is not None, "tile", "a data.image_size: height and width", "none", hint)


def preset(name: str) -> TrainConfig:
    """The preset of a data set.

    digits and textures: the small encoder and a hundred-odd steps, seconds to minutes on a CPU. cifar10, cifar100:
    ResNet-18 and batches of 1024; 200 epochs of a class. paper: the paper's setting, cifar10 with
    ResNet-50. folder, elpv: the small encoder on 64 pixels with light augmentation; `anomem fit` is faster and, with a
    pretrained encoder, better.

    Args:
        name: as in `DataConfig.dataset`, or "paper".

    Raises:
        ArgumentError: an unknown name.
    """
    require_choice(name, "preset", get_args(Preset))
    augment = AugmentConfig.for_dataset(name)
    if name == "digits":
        return TrainConfig(data=DataConfig(dataset="digits", normal="3"), augment=augment, prototypes_from="normal")
    if name == "textures":
        return TrainConfig(
            data=DataConfig(dataset="textures", normal="brick"),
            augment=augment,
            optimizer=OptimizerConfig(steps=40, batch_size=64),
        )
    if name in ("folder", "elpv"):
        return TrainConfig(
            data=DataConfig(dataset=name, normal="" if name == "folder" else "mono", image_size=64),
            augment=AugmentConfig.light(),
            optimizer=OptimizerConfig(batch_size=64),
            run=RunConfig(checkpoint_every=100),
        )
    if name == "paper":
        # 5,000 images of a class are four batches of 1,024.
        config, optimizer = preset("cifar10"), OptimizerConfig(steps=4 * PAPER_EPOCHS, learning_rate=0.1, warmup=40)
        return replace(config, model=replace(config.model, backbone="resnet50"), optimizer=optimizer)
    return TrainConfig(
        data=DataConfig(dataset=name, normal="0"),
        augment=augment,
        model=ModelConfig(backbone="resnet18", prototypes=(256,)),
        optimizer=OptimizerConfig(steps=1000, batch_size=1024, learning_rate=0.1, warmup=50),
        stage2=Stage2Config(optimizer=Stage2OptimizerConfig(steps=300)),
        run=RunConfig(checkpoint_every=100),
    )


# JSON. Written here because the messages need dotted names; a library for it would be one more dependency.


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass of plain values as nested dictionaries and lists."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(config))))


def from_dict(kind: type[T], values: Any, where: str = "") -> T:
    """A dataclass from nested dictionaries; keys left out keep their defaults.

    Args:
        kind: the dataclass.
        values: as parsed from JSON.
        where: dotted path so far, for messages.

    Raises:
        UserError: an unknown key, a value of the wrong type, or one the dataclass refuses; the message names it.
    """
    if not isinstance(values, dict):
        raise UserError(f"`{where or 'config'}`: expected an object of settings, received {json.dumps(values)}")
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(typing.cast("Any", kind))]
    for key in values:
        if key not in known:
            raise UserError(f"`{where}{key}`: no such setting; expected one of {', '.join(known)}")
    return kind(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def load_config(kind: type[T], path: Path) -> T:
    """A dataclass from a JSON file.

    Args:
        kind: the dataclass.
        path: the file.

    Raises:
        UserError: no such file, no JSON, an unknown key or a wrong value.
    """
    values = read_json(path)
    try:
        return from_dict(kind, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: the file cannot be read, or is not JSON (NaN and infinity are not).
    """
    with reading(path):
        content = path.read_bytes()
    try:
        return json.loads(content.decode(), parse_constant=_refuse)
    # RecursionError: thousands of brackets. UnicodeDecodeError is a ValueError.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; restore the file, or train a new run") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around anything that reads a file: one that cannot be read becomes one sentence.

    Raises:
        UserError: it cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def trained_settings(config: TrainConfig | FitConfig, stage: str) -> dict[str, Any]:
    """The settings on which the result of a stage depends, by dotted name; a checkpoint keeps and checks them.

    Args:
        config: of the run.
        stage: "stage1", "stage2", "scorer" or "detector".
    """
    later = {"stage1": ("stage2", "score"), "stage2": ("score",)}.get(stage, ())
    flat = flat_settings(config)
    return {name: value for name, value in flat.items() if name not in EXECUTION and name.split(".")[0] not in later}


def flat_settings(config: TrainConfig | FitConfig) -> dict[str, Any]:
    """All settings by dotted name."""
    flat: dict[str, Any] = {}
    for section, values in to_dict(config).items():
        flat.update({section: values} if not isinstance(values, dict) else _dotted(section, values))
    return flat


def _dotted(section: str, values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{section}.{name}"
        flat.update(_dotted(where, value) if isinstance(value, dict) else {where: value})
    return flat


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number")


def _convert(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as the annotated type."""
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast("type[Any]", hint), value, f"{where}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for option in arguments:
            if option is not type(None):
                try:
                    return _convert(option, value, where)
                except UserError:
                    continue
        raise _wrong(hint, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"`{where}`: expected one of {', '.join(map(repr, arguments))}, received {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(hint, value, where)
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise _wrong(hint, value, where)
        return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise _wrong(hint, value, where) from None
    if hint in (int, float, str, bool) and (not isinstance(value, hint) or (hint is not bool and value is True)):
        raise _wrong(hint, value, where)
    return value


def _wrong(hint: Any, value: Any, where: str) -> UserError:
    name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    return UserError(f"`{where}`: expected {name}, received {json.dumps(value)}")

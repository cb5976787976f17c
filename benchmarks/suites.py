"""The suites: which sizes are measured, for how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from anomem.train.config import LossConfig
from benchmarks.harness.case import Case, case

# Widths and side lengths of the three scales (layer2 to layer4, small stem) at 32×32 pixels.
NETWORKS = {"resnet18": ((128, 16), (256, 8), (512, 4)), "resnet50": ((512, 16), (1024, 8), (2048, 4))}
PROTOTYPES = 64


@dataclass(frozen=True)
class Suite:
    """A set of cases and how long each is measured."""

    name: str
    cases: tuple[Case, ...]
    seconds: float
    """Least time spent on the repeats of one implementation of one case."""
    least_repeats: int = 5
    most_repeats: int = 50
    most_seconds: float = 4.0
    """Stop early after this many seconds, even below `least_repeats`."""
    call_seconds: float = 2.0
    """Slower calls get a row with status over-time."""
    compiled_groups: tuple[str, ...] | None = None
    """Groups in which implementations that compile for tens of seconds take part; None means all."""

    def enough(self, seconds: list[float]) -> bool:
        """Whether an implementation whose calls took these seconds needs no more repeats."""
        spent = sum(seconds)
        return spent > self.seconds and (len(seconds) >= self.least_repeats or spent > self.most_seconds)

    def compiles_for(self, case: Case) -> bool:
        """Whether these take part in a case."""
        return self.compiled_groups is None or case.group in self.compiled_groups


def suite(name: str, device: str) -> Suite:
    """One of `SUITES`, with the sizes of a device.

    Args:
        name: key of `SUITES`.
        device: "cpu" or "cuda".
    """
    return SUITES[name](device)


def smoke(device: str) -> Suite:
    """Every operator once, small: a test of the harness on this machine."""
    cases = (
        case("retrieve", N=1024, M=64, d=64, B=64),
        case("shrink", N=1024, M=64, d=64, B=64),
        case("nt_xent", G=4, B=64, d=64),
        case("info_nce", R=512, C=512, d=64),
        case("gather", B=64, C=64, H=16, n=8),
        case("variance", G=8, B=128, d=128),
        case("batch_norm", B=16, C=16, H=16),
        case("downsample", B=16, C=16, H=16, K=16),
        case("conv3x3", B=16, C=32, H=16, K=32),
        case("sample", B=64, C=64, H=16, n=8),
        case("deviation_map", B=16, d=64, H=8, M=64, training=False),
        case("usage", N=1024, M=64, d=64, training=False),
        case("memory_loss", n=4, B=64, d=64, M=64),
        case("augment", B=16, C=3, H=32, training=False),
    )
    return Suite("smoke", cases, seconds=0.1, compiled_groups=())


def small(device: str) -> Suite:
    """Calls of eight queries or pairs: what an operator costs beside its arithmetic."""
    shapes: dict[str, dict[str, int]] = {
        "retrieve": {"N": 8, "M": 64, "d": 128, "B": 8},
        "nt_xent": {"G": 1, "B": 8, "d": 128},
        "info_nce": {"R": 8, "C": 8, "d": 128},
        "variance": {"G": 1, "B": 8, "d": 128},
        "usage": {"N": 8, "M": 64, "d": 128},
    }
    cases = [
        case(operator, **shape, training=training, group="small")
        for operator, shape in shapes.items()
        for training in ((False,) if operator == "usage" else (False, True))
    ]
    return Suite("small", tuple(cases), seconds=0.05, most_repeats=400, compiled_groups=())


def kernels(device: str) -> Suite:
    """Each operator at the sizes of training AnoMem on CIFAR, and at the larger sizes that its kernel is made for."""
    batch = 1024 if device == "cuda" else 128
    dtype = "bfloat16" if device == "cuda" else "float32"
    cases: list[Case] = []
    for network, scales in NETWORKS.items():
        for s, (d, side) in enumerate(scales, 1):
            n, group = positions(side), f"{network} scale {s}"
            cases += [
                case("retrieve", N=n * batch, M=PROTOTYPES, d=d, B=batch, dtype=dtype, group=group),
                case("nt_xent", G=n, B=batch, d=d, dtype=dtype, group=group),
            ]
    scales = NETWORKS["resnet18"]
    for s, (d, side) in enumerate(scales, 1):
        n, group = positions(side), f"resnet18 scale {s}"
        cases += [
            case("gather", B=batch, C=d, H=side, n=n, dtype=dtype, group=group),
            case("variance", G=n, B=batch, d=d, dtype=dtype, group=group),
            case("deviation_map", B=batch, d=d, H=side, M=PROTOTYPES, dtype=dtype, training=False, group=group),
        ]
    # On a CPU as many queries as eager answers within the bound on a call's time.
    many, fewer = (32768, 32768) if device == "cuda" else (16384, 8192)
    cases += [
        case("retrieve", N=many, M=512, d=64, B=batch, dtype=dtype, group="large"),
        case("retrieve", N=fewer, M=512, d=256, B=batch, dtype=dtype, group="large"),
        case("retrieve", N=many, M=512, d=64, B=batch, dtype=dtype, training=False, group="large"),
        case("nt_xent", G=16, B=512, d=128, dtype=dtype, group="large"),
        case("nt_xent", G=4, B=1024, d=256, dtype=dtype, group="large"),
        case("info_nce", R=4096, C=4096, d=128, dtype=dtype, group="large"),
        case("shrink", N=8192, M=512, d=64, B=batch, dtype=dtype, group="large"),
        case("usage", N=many, M=512, d=64, dtype=dtype, training=False, group="large"),
    ]
    cases += [
        case("augment", B=size, C=3, H=side, training=False, group="augmentation")
        for size, side in ((64, 64), (batch, 32), (16, 256))
    ]
    if device == "cpu":  # the maps of the small encoder at 64 pixels and of ResNet-18 at 32
        cases += [
            case("batch_norm", B=128, C=channels, H=side, dtype=one, group="batch norm")
            for channels, side in ((16, 64), (64, 8), (64, 32), (128, 16), (512, 4))
            for one in ("float32", "bfloat16")
        ]
        cases += [
            case("downsample", B=128, C=channels, H=side, K=outputs, dtype=one, group="strided convolutions")
            for channels, side, outputs in ((16, 64, 16), (16, 32, 32), (32, 16, 64))
            for one in ("float32", "bfloat16")
        ]
        cases += [
            case("conv3x3", B=64, C=channels, H=side, K=channels, dtype=one, training=both, group="convolutions")
            for channels, side in ((32, 16), (64, 8), (64, 32), (128, 16), (256, 8), (512, 4))
            for one in ("float32", "bfloat16")
            for both in (True, False)
            if both or one == "float32"  # in bfloat16 the forward pass is torch's
        ]
    if device == "cuda":
        cases += [
            case("retrieve", N=2**20, M=512, d=256, B=batch, dtype=dtype, group="large"),
            case("retrieve", N=32768, M=512, d=256, B=batch, dtype=dtype, training=False, group="large"),
            case("nt_xent", G=16, B=1024, d=128, dtype=dtype, training=False, group="large"),
            case("nt_xent", G=4, B=8192, d=256, dtype=dtype, group="large"),
            case("retrieve", N=32768, M=512, d=128, B=batch, dtype="float32", group="large"),
            case("nt_xent", G=16, B=1024, d=128, dtype="float32", group="large"),
        ]
    # On a CPU compiling every case would take most of the time.
    layers = "batch norm", "strided convolutions", "convolutions"
    groups = None if device == "cuda" else ("resnet18 scale 1", "large", *layers)
    return Suite("kernels", tuple(cases), seconds=0.25, compiled_groups=groups)


def grid(device: str) -> Suite:
    """Retrieval, NT-Xent and InfoNCE over a grid of sizes, on a CPU every operator in bfloat16 too, and sampling from a
    large map, with a compiler in each."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    cases = [
        case("nt_xent", G=groups, B=batch, d=d, dtype=dtype, group="grid")
        for groups, batch, d in ((8, 256, 128), (16, 512, 128), (16, 1024, 128), (4, 1024, 256))
    ]
    cases += [
        case("retrieve", N=queries, M=prototypes, d=d, B=128, dtype=dtype, group="grid")
        for queries in (8192, 32768, 131072)
        for prototypes in (64, 512)
        for d in (64, 128, 256)
    ]
    if device == "cpu":  # memories filled with features
        cases += [
            case("retrieve", N=queries, M=prototypes, d=d, B=1, dtype=one, group="large memories")
            for queries, prototypes, d in ((5000, 2000, 384), (3000, 10000, 256), (600, 2000, 384), (256, 2048, 128))
            for one in ("float32", "bfloat16")
        ]
    cases += [
        case("info_nce", R=rows, C=columns, d=128, dtype=dtype, group="grid")
        for rows, columns in ((128, 128), (1024, 1024), (512, 4096))
    ]
    if device != "cuda":
        cases += [
            case("nt_xent", G=8, B=256, d=128, dtype="bfloat16", group="grid"),
            case("nt_xent", G=4, B=1024, d=256, dtype="bfloat16", group="grid"),
            case("info_nce", R=1024, C=1024, d=128, dtype="bfloat16", group="grid"),
            case("info_nce", R=512, C=4096, d=128, dtype="bfloat16", group="grid"),
            case("retrieve", N=1024, M=64, d=128, B=128, dtype="bfloat16", group="grid"),
            case("retrieve", N=8192, M=512, d=128, B=128, dtype="bfloat16", group="grid"),
            case("retrieve", N=32768, M=512, d=64, B=128, dtype="bfloat16", group="grid"),
            case("retrieve", N=8192, M=512, d=256, B=128, dtype="bfloat16", group="grid"),
            case("shrink", N=8192, M=512, d=64, B=128, dtype="bfloat16", group="grid"),
            case("gather", B=128, C=128, H=16, n=8, dtype="bfloat16", group="grid"),
            case("variance", G=8, B=128, d=128, dtype="bfloat16", group="grid"),
            case("deviation_map", B=128, d=128, H=16, M=64, dtype="bfloat16", training=False, group="grid"),
            case("usage", N=16384, M=512, d=64, dtype="bfloat16", training=False, group="grid"),
        ]
    cases.append(case("sample", B=256, C=256, H=16, n=64, dtype=dtype, group="grid"))
    return Suite("grid", tuple(cases), seconds=0.25, call_seconds=3.0)


def training(device: str) -> Suite:
    """The loss of each scale as a whole."""
    batch = 1024 if device == "cuda" else 128
    dtype = "bfloat16" if device == "cuda" else "float32"
    cases = tuple(
        case(
            "memory_loss",
            n=positions(side),
            B=batch,
            d=d,
            M=PROTOTYPES,
            dtype=dtype,
            group=f"{network} scale {s}",
        )
        for network, scales in NETWORKS.items()
        for s, (d, side) in enumerate(scales, 1)
    )
    groups = None if device == "cuda" else ("resnet18 scale 1", "resnet50 scale 3")
    return Suite("training", cases, seconds=0.5, compiled_groups=groups)


def scaling(device: str) -> Suite:
    """Sweeps of one size at a time, until each implementation runs out of memory or of time."""
    on_gpu = device == "cuda"
    dtype = "bfloat16" if on_gpu else "float32"
    thousand = 1024
    cases: list[Case] = []
    for count in (4, 16, 64, 256, 1024, 4096):
        cases.append(case("retrieve", N=count * thousand, M=512, d=64, B=128, dtype=dtype, group="over N"))
    queries = 16384 if on_gpu else 4096
    for prototypes in (64, 256, 1024, 4096, 8192):
        cases.append(case("retrieve", N=queries, M=prototypes, d=64, B=128, dtype=dtype, group="over M"))
    queries = 8192 if on_gpu else 2048
    for d in (64, 128, 256, 512, 1024, 2048):
        cases.append(case("retrieve", N=queries, M=512, d=d, B=128, dtype=dtype, group="over d"))
    for groups in (1, 4, 16, 64):
        cases.append(case("nt_xent", G=groups, B=128, d=128, dtype=dtype, group="over G"))
    for batch in (128, 512, 2048, 8192, 16384, 65536):
        cases.append(case("nt_xent", G=1, B=batch, d=128, dtype=dtype, group="over B"))
    for d in (64, 128, 256, 512):
        cases.append(case("nt_xent", G=4, B=512, d=d, dtype=dtype, group="over d"))
    return Suite(
        "scaling",
        tuple(cases),
        seconds=0.2,
        least_repeats=3,
        compiled_groups=None if on_gpu else (),
        # Long enough for the library's own largest size on two cores.
        call_seconds=5.0 if on_gpu else 6.0,
    )


def positions(side: int) -> int:
    """Sampled positions of a map of side × side, with the library's defaults."""
    loss = LossConfig()
    return max(1, min(loss.max_positions, int(side * side * loss.ratio)))


SUITES: dict[str, Callable[[str], Suite]] = {
    "smoke": smoke,
    "small": small,
    "kernels": kernels,
    "grid": grid,
    "training": training,
    "scaling": scaling,
}

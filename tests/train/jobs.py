"""What each process of a job does in `test_ranks.py`."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from anomem.augment import AugmentConfig
from anomem.data import ResidentImages
from anomem.errors import UserError
from anomem.models import DeviationHead, ModelConfig, NetworkEncoder, build_model
from anomem.nn import BatchNorm2d
from anomem.train import (
    LossConfig,
    OptimizerConfig,
    RunConfig,
    RunDirectory,
    Stage2Config,
    Stage2OptimizerConfig,
    TrainConfig,
    train_stage1,
    train_stage2,
)
from anomem.train.checkpoint import StageState
from anomem.train.config import BatchNormOver, from_dict
from anomem.train.profiling import profile_steps
from anomem.train.run import head_for, resume, train
from anomem.train.stopping import Interrupted

SIDE = 16


def config_of(parallel: str = "ddp", ring: bool = False, **changes: Any) -> TrainConfig:
    """Uneven shares, random augmentation, synthetic outliers, positions of each image, batch norm, clipping."""
    shared = {"steps": 3, "batch_size": 11, "warmup": 0}
    most = 1 if ring else 3  # the ring serves scales with fewer positions than there are processes
    config = TrainConfig(
        augment=AugmentConfig(),
        model=ModelConfig(prototypes=(5,)),
        loss=LossConfig(max_positions=most, negatives="both", positions_per_image=True, ring=ring),
        optimizer=OptimizerConfig(**shared, learning_rate=0.02, clip=1.0),
        stage2=Stage2Config(hidden=4, embedding=4, optimizer=Stage2OptimizerConfig(**shared)),
        run=RunConfig(
            device="cpu",
            precision="float32",
            memory_format="channels_last",
            parallel=parallel,
            log_every=1,  # type: ignore[arg-type]
        ),
        synthetic_outliers=0.4,
    )
    return replace(config, optimizer=replace(config.optimizer, **changes))


class Plain(nn.Module):
    """Two scales without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.one, self.two = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of 8 and 4 pixels."""
        first = torch.relu(self.one(x))
        return [first, torch.relu(self.two(first))]


class WithTanh(nn.BatchNorm2d):
    """A batch norm that does more than one."""

    def forward(self, input: Tensor) -> Tensor:
        """Between -1 and 1."""
        return torch.tanh(super().forward(input))


class Peculiar(Plain):
    """Torch's synchronised batch norm, under two names; batch norms with an activation or a hook; an unused layer;
    numbers; a buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = self.again = nn.SyncBatchNorm(6)
        self.bounded, self.classifier = WithTanh(6), nn.Linear(8, 2, bias=False)
        nn.init.ones_(self.classifier.weight)
        self.scales = nn.ParameterList(torch.tensor(1.5 + 0.1 * i) for i in range(6))
        self.hooked, self.ours = nn.SyncBatchNorm(6), BatchNorm2d(6, relu=True, impl="native")
        for norm in (self.bounded, self.hooked, self.ours):
            norm.register_forward_hook(lambda *given: 2 * given[-1])
        self.register_buffer("mask", torch.tensor([-torch.inf, torch.finfo(torch.float32).min, 0.1]))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of 8 and 4 pixels."""
        first = self.bounded(self.again(torch.relu(self.norm(self.one(x)))))
        scaled = (8 * torch.stack([*self.scales])).sin()[:, None, None] * self.ours(self.hooked(first))
        return [first, torch.relu(self.two(scaled))]


def trained(
    config: TrainConfig, run: RunDirectory | None = None, network: type[nn.Module] | None = None
) -> dict[str, Tensor]:
    """Weights, buffers and head after both stages, on 13 images of which 3 are labelled anomalies.

    Micro-batches are encoded without batch norm, which would normalise each of them.
    """
    images = ResidentImages(torch.randint(256, (13, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(2)).byte())
    is_normal = torch.tensor([True] * 10 + [False] * 3)
    network = network or (None if config.optimizer.micro_batch is None else Plain)
    encoder = None if network is None else NetworkEncoder(network(), images.size, 3)
    model = build_model(config.model, images.size, 3, (0.5,) * 3, (0.25,) * 3, encoder=encoder)
    train_stage1(model, images, is_normal, config, run, quiet=True)
    head: DeviationHead = head_for(config, model)
    train_stage2(model, head, images, is_normal, config, run, quiet=True)
    return {**model.state_dict(), **{f"head.{name}": value for name, value in head.state_dict().items()}}


def same_weights(folder: str, cases: list[dict[str, Any]]) -> None:
    """Train each case; the weights are those of one process, which are in a file."""
    for number, case in enumerate(cases):
        run = RunDirectory(Path(folder) / f"run{number}-{dist.get_world_size()}")
        if dist.get_rank() == 0:
            run.checkpoints.mkdir(parents=True)
        dist.barrier()
        found = trained(config_of(**case), run)
        expected = torch.load(Path(folder) / f"case{number}.pt", weights_only=True)
        assert_same_weights(found, expected, str(case))


def an_encoder_of_ones_own(folder: str) -> None:
    """Its batch norms are joint, whatever they are, or each process's own; its buffers stay."""
    expected = torch.load(Path(folder) / "peculiar.pt", weights_only=True)
    # The next parameters lie elsewhere in the memory of each process.
    freed = [nn.Parameter(torch.zeros(())) for _ in range(64)]
    random.Random(dist.get_rank()).shuffle(freed)
    while freed:
        freed.pop()
    for parallel in ("ddp", "fsdp"):
        assert_same_weights(trained(config_of(parallel), network=Peculiar), expected, f"own encoder, {parallel}")
    config = config_of()
    found = trained(replace(config, run=replace(config.run, batch_norm="process")), network=Peculiar)
    assert torch.equal(found["encoder.network.mask"], Peculiar().mask)


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor], about: str) -> None:
    """To the rounding of three steps in float32."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{about} {n}: {m}")


def a_run(settings: dict[str, Any], stop_after: int | None, again: bool) -> None:
    """A whole run, or one that a signal to the last process stops after a step; or its continuation."""
    config = from_dict(TrainConfig, settings)
    path = Path(str(config.run.directory))
    act_after_a_step(stop_after, lambda: os.kill(os.getpid(), signal.SIGTERM))
    if stop_after is None:
        _ = resume(path, quiet=True) if again else train(config, quiet=True)
    elif dist.get_rank() == 0:
        command = f"`torchrun --nproc-per-node {dist.get_world_size()} -m anomem train --resume {path}`"
        with pytest.raises(Interrupted) as stopped:
            train(config, quiet=True)
        assert str(stopped.value).endswith(f"stage1 is saved up to step {stop_after}; continue with {command}")
    else:
        leaves(config, 128 + signal.SIGTERM)


def a_process_dies(settings: dict[str, Any]) -> None:
    """The last one, in the middle of the training: the first says so, the others leave without a word, in time."""
    config = from_dict(TrainConfig, settings)
    began = time.monotonic()
    act_after_a_step(1, lambda: os._exit(0))
    if dist.get_rank() == 0:
        sentence = "another process of the job has ended or does not answer; no checkpoint yet.*--resume "
        with pytest.raises(UserError, match=sentence + re.escape(str(config.run.directory))):
            train(config, quiet=True)
    else:
        leaves(config, 2)
    assert time.monotonic() - began < 60
    os._exit(0)


def mistakes(settings: dict[str, Any], batch: int) -> None:
    """Said in the first process; the others leave without a word. None hangs."""
    config = from_dict(TrainConfig, settings)
    other = replace(config, optimizer=replace(config.optimizer, learning_rate=0.1 + dist.get_rank()))
    small = replace(config, optimizer=replace(config.optimizer, batch_size=batch))
    for wrong, reason in ((other, "`optimizer.learning_rate`: expected the same"), (small, "start fewer processes")):
        for call in (train, profiled):
            if dist.get_rank() == 0:
                with pytest.raises(UserError, match=reason):
                    call(wrong, quiet=True)
            else:
                leaves(wrong, 2, call)
    assert not Path(str(config.run.directory)).exists()


def the_same_failure(settings: dict[str, Any], folder: str) -> None:
    """Train until the loss is not finite, which every process finds; who raises writes what it says."""
    with pytest.raises((UserError, SystemExit)) as failed:
        train(from_dict(TrainConfig, settings), quiet=True)
    if isinstance(failed.value, UserError):
        Path(folder, f"said{dist.get_rank()}").write_text(str(failed.value))
    else:
        assert failed.value.code == 2


class Sent(TorchDispatchMode):
    """Counts what is sent to another process, and each collective, by the name of torch's operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        if func.namespace == "c10d" and func.overloadpacket.__name__ != "recv_":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def messages_of_a_step(folder: str, batch_norm: BatchNormOver) -> None:
    """Count the messages of a step of stage 1 with the default encoder."""
    model = build_model(ModelConfig(), (32, 32), 3, (0.5,) * 3, (0.25,) * 3)
    images = ResidentImages(torch.zeros(8, 3, 32, 32, dtype=torch.uint8))
    run = RunConfig(device="cpu", log_every=10**9, batch_norm=batch_norm)
    config = TrainConfig(optimizer=OptimizerConfig(steps=5, batch_size=8), run=run)
    sent = Sent()
    # DDP orders its gradients anew after the first step, and says so in the second.
    act_after_a_step(3, sent.counts.clear, everywhere=True)
    write = Path(folder, f"sent{dist.get_rank()}").write_text
    act_after_a_step(4, lambda: write(json.dumps(dict(sent.counts))), everywhere=True)
    with sent:
        train_stage1(model, images, None, config, quiet=True)


def batch_norm_of_each_process(folder: str) -> None:
    """A run whose processes normalise their own shares, whole and in two parts; each writes what it trained."""
    config = config_of(batch_size=12, accumulate=1)
    settings = replace(config.run, batch_norm="process", checkpoint_every=1)
    config = replace(config, run=settings, synthetic_outliers=0.0)
    whole = trained(config)
    run = RunDirectory(Path(folder) / "run")
    if dist.get_rank() == 0:
        run.checkpoints.mkdir(parents=True)
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        act_after_a_step(2, lambda: 1 / 0, everywhere=True, patch=patch)
        with pytest.raises(ZeroDivisionError):
            trained(config, run)
    assert_same_weights(trained(config, run), whole, "continued after a step")
    torch.save(whole, Path(folder) / f"whole{dist.get_rank()}.pt")


def profiled(config: TrainConfig, quiet: bool) -> None:
    """Profile a step."""
    assert quiet
    profile_steps(config, 1)


def act_after_a_step(
    done: int | None,
    act: Callable[[], object],
    everywhere: bool = False,
    patch: pytest.MonkeyPatch | None = None,
) -> None:
    """Have the last process, or every one, act when so many steps are done."""
    step_done = StageState.step_done

    def and_act(state: StageState, number: int, *others: Any) -> None:
        last = dist.get_rank() == dist.get_world_size() - 1
        if state.name == "stage1" and number == done and (last or everywhere):
            act()
        step_done(state, number, *others)

    (patch or pytest.MonkeyPatch()).setattr(StageState, "step_done", and_act)


def leaves(config: TrainConfig, code: int, call: Callable[..., object] = train) -> None:
    """The training, or another call, ends this process without a word."""
    with pytest.raises(SystemExit) as left:
        call(config, quiet=True)
    assert left.value.code == code

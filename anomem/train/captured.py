"""A whole step of stage 1 as one CUDA graph: views, encoder, contrast, gradients and weights in one launch.

The learning rate and the decay of the average are tensors; every random number comes from a generator that is seeded
before the launch. A captured step therefore draws and computes what the eager step does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from anomem.train.batches import Batch
from anomem.train.config import RunConfig
from anomem.train.ranks import Ranks
from anomem.train.rows import Draws
from anomem.train.steps import Loss, Shares

WARMUP = 3
"""Eager steps before the capture; the last is searched for what a graph forbids."""


def obstacle(config: RunConfig, device: torch.device, ranks: Ranks, shares: Shares) -> str | None:
    """Why the steps of a stage are not captured; None where they are.

    Args:
        config: of the run.
        device: of the model.
        ranks: the processes.
        shares: of the stage.
    """
    if device.type != "cuda":
        return f"{device.type} has none"
    if not config.cuda_graph:
        return "`run.cuda_graph` is false"
    if ranks.count > 1:
        return "the processes exchange tensors within a step"
    if sum(len(chunks) for chunks in shares.parts) > 1:
        return "a batch is encoded in parts"
    return None


class Captured:
    """Runs a step eagerly a few times, then captures it and launches the graph.

    Args:
        step: a batch's gradients, and the update of the weights.
        draws: all random numbers of the step but dropout's.
        obstacle: why it is not to be captured, or None.
        quiet: do not print the obstacle.

    Example:
        >>> captured = Captured(step, draws, obstacle(config.run, model.device, ranks, shares))
        >>> loss = captured(batch)  # its tensors are overwritten by the next step
    """

    def __init__(
        self, step: Callable[[Batch], Loss], draws: Draws, obstacle: str | None, *, quiet: bool = False
    ) -> None:
        self.step, self.draws, self.obstacle = step, draws, obstacle
        if obstacle is not None and draws.device.type == "cuda" and not quiet:
            print(f"stage1: no CUDA graph, because {obstacle}", flush=True)
        self.done = 0
        self.stream = torch.cuda.Stream(draws.device) if obstacle is None else None
        """Of the first steps and the capture."""
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: Batch | None = None
        """Whose images the graph reads."""
        self.loss: Loss | None = None
        """That the graph writes."""

    def __call__(self, batch: Batch) -> Loss:
        """The loss of a step; the weights are updated."""
        if self.obstacle is None and self.graph is None:
            if self.done < WARMUP:
                self.done += 1
                return self._warmed_up(batch)
            self._capture(batch)
        if self.graph is None or self.batch is None or self.loss is None:
            return self.step(batch)
        assert isinstance(self.batch.images, Tensor)  # parts of a batch are no graph
        assert isinstance(batch.images, Tensor)
        self.batch.images.copy_(batch.images)
        self.batch.indices.copy_(batch.indices)
        self.draws.begin(batch.step)
        with self.draws.seeded(0, 0, 0):
            self.graph.replay()
        return self.loss

    def _warmed_up(self, batch: Batch) -> Loss:
        """An eager step on a stream of its own, as a capture needs it."""
        assert self.stream is not None
        current = torch.cuda.current_stream(self.draws.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            loss = self.step(batch) if self.done < WARMUP else self._searched(batch)
        current.wait_stream(self.stream)
        return loss

    def _searched(self, batch: Batch) -> Loss:
        """An eager step that draws from separate generators and notices where the host waits for the device."""
        self.draws.separate = {}
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught, self.draws.seeded(0, 0, 0):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                loss = self.step(batch)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [found for found in caught if "synchronizing CUDA operation" in str(found.message)]
        for other in caught:
            if other not in waits and "Synchronization debug mode" not in str(other.message):
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        if waits:
            self._leave(f"the host waits for the GPU in {waits[0].filename}:{waits[0].lineno}")
        return loss

    def _capture(self, batch: Batch) -> None:
        assert isinstance(batch.images, Tensor)
        self.batch = batch._replace(images=batch.images.clone(), indices=batch.indices.clone())
        graph = torch.cuda.CUDAGraph()
        for generator in (self.draws.separate or {}).values():
            graph.register_generator_state(generator)
        self.draws.begin(batch.step)
        try:
            with self.draws.seeded(0, 0, 0), torch.cuda.graph(graph, stream=self.stream):
                self.loss = self.step(self.batch)
        except RuntimeError as error:
            self._leave(str(error).splitlines()[0])
        else:
            self.graph = graph

    def _leave(self, reason: str) -> None:
        """Go on with eager steps, and say so."""
        self.obstacle = reason
        self.draws.separate = None
        warnings.warn(f"anomem: stage 1 runs without a CUDA graph: {reason}", RuntimeWarning, stacklevel=2)

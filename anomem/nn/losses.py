"""The losses as modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anomem import functional as AF
from anomem.functional.distributed import group_of, processes
from anomem.nn.memory import HopfieldMemory
from anomem.reference.contrast import NEGATIVES, Negatives
from anomem.rules import IMPLEMENTATIONS, Impl
from anomem.validation import (
    require,
    require_choice,
    require_number,
    require_positive_number,
    require_same_kind,
    require_tensor,
    require_views,
)

if TYPE_CHECKING:
    from anomem.functional.distributed import Group


class _Contrast(nn.Module):
    """A loss with a temperature: a constant, or learned through its logarithm so that it stays positive."""

    log_temperature: nn.Parameter | None

    def __init__(self, temperature: float, learned: bool, impl: Impl) -> None:
        super().__init__()
        require_choice(impl, "impl", IMPLEMENTATIONS)
        self.register_parameter("log_temperature", nn.Parameter(torch.empty(())) if learned else None)
        self.impl: Impl = impl
        self.temperature = temperature

    @property
    def temperature(self) -> float | Tensor:
        """tau, to be read and set: a number, or with `learn_temperature` the exponential of the parameter."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    @temperature.setter
    def temperature(self, value: float) -> None:
        require_positive_number(value, "temperature")
        require(not isinstance(value, Tensor), "temperature", "a number", "a tensor", "use learn_temperature=True")
        self._temperature = float(value)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set a learned temperature to the number that was set last."""
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self._temperature))

    def extra_repr(self) -> str:
        """The temperature and the options that are not the default, for `print(module)`."""
        temperature = "learned" if self.log_temperature is not None else self._temperature
        return f"temperature={temperature}{_options_of(self)}"


class NTXentLoss(_Contrast):
    """NT-Xent of SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709).

    Stands where `lightly.loss.NTXentLoss` stood, with its arguments in their order and without a memory bank
    (https://docs.lightly.ai/self-supervised-learning/lightly.loss.html).

        criterion = NTXentLoss(temperature=0.2)
        z0, z1 = projector(view0), projector(view1)  # [B, d] each, of the same images
        criterion(z0, z1).backward()

    Args:
        temperature: tau > 0; lightly's default of 0.5. Read and set it as `criterion.temperature`.
        memory_bank_size: 0; the two lines that replace a bank are in docs/MIGRATING.md.
        gather_distributed: contrast with the rows of all processes; the mean of their losses, which the gradients of
            DDP and `fully_shard` are those of, is the loss of the joint batch. Without effect in a single process. See
            `anomem.functional.nt_xent_distributed`.
        learn_temperature: make log tau a parameter.
        process_group: whose processes; `torch.distributed`'s default group when None.
        ring: where there are fewer groups than processes, let the rows travel from one to the next instead of gathering
            them; once differentiable.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.

    Shape:
        out0, out1 [B, d] or [G, B, d] -> 0-dim. `counts` where processes pass different B:
        `anomem.functional.rows_per_process(B)`.

    Raises:
        ArgumentError: a wrong number, a memory bank, `gather_distributed` where torch has no `torch.distributed`; in
            the call an empty batch, or groups of one pair.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        learn_temperature: bool = False,
        process_group: Group | None = None,
        ring: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(temperature, learn_temperature, impl)
        # lightly's (size, features), too, is no bank where the size is 0.
        size = memory_bank_size[:1] if isinstance(memory_bank_size, Sequence) else (memory_bank_size,)
        none = tuple(size) in ((), (0,))
        hint = "docs/MIGRATING.md shows a loss over a bank"
        require(none, "memory_bank_size", "0", lambda: repr(memory_bank_size), hint)
        _require_distributed(gather_distributed)
        self.gather_distributed, self.process_group, self.ring = gather_distributed, process_group, ring

    def forward(self, out0: Tensor, out1: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Mean loss over all rows of both views."""
        require_views(out0, "out0", out1, "out1")
        if out0.dtype != out1.dtype and not torch.is_autocast_enabled(out0.device.type):
            require_same_kind(out1, "out1", out0, "out0")
        if not self.gather_distributed or _alone(self.process_group):
            _require_a_batch(out0, "out0")
            return AF.nt_xent(out0, out1, temperature=self.temperature, impl=self.impl)
        return AF.nt_xent_distributed(
            out0, out1, temperature=self.temperature, process_group=self.process_group, counts=counts, ring=self.ring,
            impl=self.impl,
        )  # fmt: skip


class InfoNCELoss(_Contrast):
    """The rectangular contrast: row i's column is i unless `positive` says otherwise (CLIP-, MoCo-type use).

    InfoNCE (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748), as in CLIP (https://arxiv.org/abs/2103.00020).

        criterion = InfoNCELoss(temperature=0.07)
        images, texts = image_encoder(x), text_encoder(t)  # [B, d] each
        loss = (criterion(images, texts) + criterion(texts, images)) / 2

    Args:
        temperature: tau > 0. Read and set it as `criterion.temperature`.
        learn_temperature: make log tau a parameter.
        gather_distributed: contrast with the columns of all processes, as in `NTXentLoss`; row i's column is i.
        process_group: as in `NTXentLoss`.
        ring: let the columns travel from process to process instead of gathering them; once differentiable.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.

    Shape:
        rows [(G,) R, d], columns [(G,) C, d], positive [R] -> 0-dim.

    Raises:
        ArgumentError: a wrong number; in the call no rows, or groups of one row without `positive`.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learn_temperature: bool = False,
        gather_distributed: bool = False,
        process_group: Group | None = None,
        ring: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(temperature, learn_temperature, impl)
        _require_distributed(gather_distributed)
        self.gather_distributed, self.process_group, self.ring = gather_distributed, process_group, ring

    def forward(
        self,
        rows: Tensor,
        columns: Tensor,
        positive: Tensor | None = None,
        exclude: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Mean loss over all rows."""
        if self.gather_distributed:
            for name, index in (("positive", positive), ("exclude", exclude)):
                require(index is None, name, "None with gather_distributed: row i's column is i", "an index")
            if _alone(self.process_group):
                require_views(rows, "rows", columns, "columns")
                _require_a_batch(rows, "rows")
            return AF.info_nce_distributed(
                rows, columns, temperature=self.temperature, process_group=self.process_group, counts=counts,
                ring=self.ring, impl=self.impl,
            )  # fmt: skip
        require_tensor(rows, "rows", (2, 3), "[R, d] or [G, R, d]")
        require_tensor(columns, "columns", (2, 3), "[C, d] or [G, C, d]")
        if positive is None:
            _require_a_batch(rows, "rows")
            count = rows.shape[-2]
            require(columns.shape[-2] >= count, "columns", lambda: f"at least {count}, one for each row", columns)
            positive = torch.arange(count, device=rows.device)
        require(rows.numel() > 0, "rows", "at least one row: the mean of no losses is NaN", rows)
        return AF.info_nce(rows, columns, positive, exclude, temperature=self.temperature, impl=self.impl)


def _options_of(module: nn.Module) -> str:
    """The options that the losses share where they are not the default, as a part of `extra_repr`."""
    options = {"gather_distributed": False, "ring": False, "impl": "auto"}
    shown = {name: getattr(module, name, default) for name, default in options.items()}
    return "".join(f", {name}={value!r}" for name, value in shown.items() if value != options[name])


def _alone(process_group: Group | None) -> bool:
    """Whether no other process has rows."""
    return processes(group_of(process_group)) == 1


def _require_distributed(wanted: bool) -> None:
    hint = "this torch was built without torch.distributed"
    require(not wanted or dist.is_available(), "gather_distributed", "False", wanted, hint)


def _require_a_batch(rows: Tensor, argument: str) -> None:
    """Rows to take the mean of; groups of one row, whose loss is 0, are [B, d] with an axis too many."""
    require(rows.numel() > 0, argument, "at least one row: the mean of no losses is NaN", rows)
    contrasted = rows.dim() == 2 or rows.shape[1] > 1
    require(contrasted, argument, "[B, d], or groups [G, B, d] of B ≥ 2 rows", rows, "one batch is x.squeeze(1)")


class VarianceHinge(nn.Module):
    """The hinge on the standard deviation over the batch of VICReg (Bardes et al. 2022, https://arxiv.org/abs/2105.04906).

        criterion = VarianceHinge(gamma=1.0)
        z = projector(images)  # [B, d]
        loss = invariance + 25 * criterion(z)

    Args:
        gamma: target standard deviation > 0.
        eps: > 0, inside the square root.
        gather_distributed: the variance over the rows of all processes, the same number in each.
        process_group: as in `NTXentLoss`.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.

    Shape:
        x [B, d] or [G, B, d] -> 0-dim. `counts` as in `NTXentLoss`.

    Raises:
        ArgumentError: a wrong number or name; in the call fewer than two rows.
    """

    def __init__(
        self,
        gamma: float = 1.0,
        eps: float = 1e-4,
        *,
        gather_distributed: bool = False,
        process_group: Group | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        require_choice(impl, "impl", IMPLEMENTATIONS)
        _require_distributed(gather_distributed)
        self.gather_distributed, self.process_group = gather_distributed, process_group
        require_positive_number(gamma, "gamma")
        require_positive_number(eps, "eps")
        self.gamma = gamma
        self.eps = eps
        self.impl: Impl = impl

    def forward(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Mean hinge over groups and features."""
        if self.gather_distributed:
            return AF.variance_hinge_distributed(
                x, gamma=self.gamma, eps=self.eps, process_group=self.process_group, counts=counts, impl=self.impl
            )
        return AF.variance_hinge(x, gamma=self.gamma, eps=self.eps, impl=self.impl)

    def extra_repr(self) -> str:
        """The target, and the options that are not the default, for `print(module)`."""
        return f"gamma={self.gamma}, eps={self.eps}{_options_of(self)}"


class ContrastedMemoryLoss(nn.Module):
    """L_COM + lambda_V · L_V of one scale (the bracket of AnoMem Eq. 4), given that scale's memory.

        memory, criterion = HopfieldMemory(128, 64), ContrastedMemoryLoss(variance_weight=0.05)
        z, z_pair = (AF.gather_positions(m, positions) for m in (map0, map1))  # [n, B, 128] each
        total, contrast, variance = criterion(z, z_pair, memory)

    Args:
        temperature: tau of the contrast.
        variance_weight: lambda_V ≥ 0; the paper finds no sensitivity from 0.01 to 0.1.
        negatives: "image", "position" or "both".
        symmetric: contrast both ways and take the mean.
        gather_distributed: the loss of the joint batch of all processes, as in `NTXentLoss`.
        process_group: as in `NTXentLoss`.
        ring: as in `NTXentLoss`.
        impl: "auto", "reference", "triton" or "native"; see `anomem.backends`.

    Shape:
        z, z_pair [n, B, d] -> three 0-dim tensors: the loss, L_COM and L_V. `counts` as in `NTXentLoss`.

    Raises:
        ArgumentError: a wrong number or name; in the call a wrong shape, or fewer than two images.
    """

    def __init__(
        self,
        temperature: float = 0.2,
        variance_weight: float = 0.05,
        *,
        negatives: Negatives = "image",
        symmetric: bool = True,
        gather_distributed: bool = False,
        process_group: Group | None = None,
        ring: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        require_choice(impl, "impl", IMPLEMENTATIONS)
        _require_distributed(gather_distributed)
        self.gather_distributed, self.process_group, self.ring = gather_distributed, process_group, ring
        require_positive_number(temperature, "temperature")
        require_number(variance_weight, "variance_weight")
        require(variance_weight >= 0, "variance_weight", "a number ≥ 0", variance_weight)
        require_choice(negatives, "negatives", NEGATIVES)
        self.temperature = temperature
        self.variance_weight = variance_weight
        self.negatives: Negatives = negatives
        self.symmetric = symmetric
        self.impl: Impl = impl

    def forward(
        self,
        z: Tensor,
        z_pair: Tensor,
        memory: HopfieldMemory,
        is_normal: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(total, L_COM, L_V), the last two for the log; `is_normal` [B] bool, None when all are."""
        return self.of_scales([(z, z_pair)], [memory], is_normal, counts)[0]

    def of_scales(
        self,
        vectors: Sequence[tuple[Tensor, Tensor]],
        memories: Sequence[HopfieldMemory],
        is_normal: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The call for several scales (z, z_pair) of the same images; processes exchange all scales at once."""
        scales = []
        for (z, z_pair), memory in zip(vectors, memories, strict=True):
            gamma = _deviation_wanted(memory, z.shape[-1])
            scale = AF.ScaleVectors(z, z_pair, memory.prototypes, memory.values, variance_gamma=gamma)
            scales.append(
                scale._replace(beta=memory.beta, steps=memory.steps, normalize=memory.normalize, shrink=memory.shrink)
            )
        terms = AF.contrasted_memory_losses(
            scales,
            is_normal=is_normal,
            temperature=self.temperature,
            negatives=self.negatives,
            symmetric=self.symmetric,
            distributed=self.gather_distributed,
            process_group=self.process_group,
            counts=counts,
            ring=self.ring,
            impl=self.impl,
        )
        return [(contrast + self.variance_weight * variance, contrast, variance) for contrast, variance in terms]

    def backward_by_blocks(
        self,
        z: Tensor,
        z_pair: Tensor,
        memory: HopfieldMemory,
        is_normal: Tensor | None = None,
        weight: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The call for one position of a batch too large for its graph, with its backward pass: for gradient caching.

        The gradients of weight · loss take the place of the vectors; those of the memory are added to `.grad`. Of n
        positions the loss of the call is the mean: pass weight=1/n for each.

            for view, other in zip(z, z_pair):  # [n, B, d] each, without a graph
                criterion.backward_by_blocks(view, other, memory, weight=1 / len(z))

        Args:
            z: [B, d], overwritten.
            z_pair: [B, d], overwritten.
            memory: the scale's.
            is_normal: [B] bool, None when all are.
            weight: on the gradients.

        Returns:
            (total, L_COM, L_V), 0-dim and without a graph.

        Raises:
            ArgumentError: as `anomem.functional.contrasted_memory_backward`, or a loss with `gather_distributed` or
                with other negatives than "image".
        """
        require(
            self.negatives == "image", "negatives", "'image', for a contrast by blocks", lambda: repr(self.negatives)
        )
        require(not self.gather_distributed, "gather_distributed", "False, for a contrast by blocks", True)
        require_tensor(z, "z", (2,), "[B, d]")
        gamma = _deviation_wanted(memory, z.shape[1])
        width = memory.prototypes.shape[1]
        require(z.shape[1] == width, "z", lambda: f"[B, {width}], the memory's features", z)
        wide = torch.float64 if z.dtype == torch.float64 else torch.float32
        right = memory.prototypes.dtype == wide
        require(right, "memory", lambda: f"in {wide}, as the contrast is", memory.prototypes.dtype)
        contrast, variance = AF.contrasted_memory_backward(
            z,
            z_pair,
            memory,
            is_normal=is_normal,
            temperature=self.temperature,
            symmetric=self.symmetric,
            variance_gamma=gamma,
            variance_weight=self.variance_weight,
            weight=weight,
            impl=self.impl,
        )
        return contrast + self.variance_weight * variance, contrast, variance

    def extra_repr(self) -> str:
        """The weights, and the options that are not the default, for `print(module)`."""
        terms = f"temperature={self.temperature}, variance_weight={self.variance_weight}"
        return f"{terms}, negatives={self.negatives!r}, symmetric={self.symmetric}{_options_of(self)}"


def _deviation_wanted(memory: HopfieldMemory, features: int) -> float:
    """Gamma of the variance term: a unit vector's coordinates have a standard deviation of at most 1/sqrt(d)."""
    right = isinstance(memory, HopfieldMemory)
    require(right, "memory", "a HopfieldMemory", lambda: type(memory).__name__)
    return features**-0.5 if memory.normalize == "l2" else 1.0

"""The contrast of a batch of which only two blocks are compared at a time: gradients of sampled vectors for gradient
caching.

The memory's answers are made anew for each block. Beside the vectors and their gradients a few numbers for each row are
kept. The products are 5/4 of those of the whole batch at once, since a block's gradient is of its own rows only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from anomem import backends, reference, rules
from anomem.functional._inputs import without_autocast
from anomem.functional.sampling import require_hinge
from anomem.ops.library import accumulator
from anomem.rules import Impl
from anomem.validation import (
    require,
    require_count,
    require_mask,
    require_number,
    require_positive_number,
    require_same_device,
    require_same_kind,
    require_setting,
    require_tensor,
    shape_of,
)

BLOCK = 1 << 17
"""Numbers of one view's rows in a block: the rows of two blocks, packed, then stay in a second-level cache of 2 MiB."""
_FEWEST_PAIRS = 512
"""In a block: fewer make the work on a block's rows as long as its products."""
_EPS = 1e-4
"""As of `variance_hinge`."""


class BlockwiseNTXent:
    """NT-Xent of B pairs that are made block by block: the mean over its 2B rows, and the gradients of each block.

        contrast = BlockwiseNTXent(lambda some: (z[some].float(), z_pair[some].float()), len(z))
        contrast.loss
        torch.cat([contrast.gradients(number)[0] for number in range(len(contrast.blocks))])  # at z

    Attributes:
        loss: 0-dim float64.
        blocks: slices of the batch.

    Args:
        pairs: makes z and z_pair, [b, d] each, of a slice of the batch; the same each time.
        batch: B ≥ 1.
        temperature: tau > 0.
        block: most pairs of a block; None for as many as a cache holds.
        impl: "auto", "reference" or "native"; where it has no kernel for blocks, it chooses by "auto".

    Raises:
        ArgumentError: a wrong number, or an implementation that cannot run here.
    """

    def __init__(
        self,
        pairs: Callable[[slice], tuple[Tensor, Tensor]],
        batch: int,
        *,
        temperature: float = 0.2,
        block: int | None = None,
        impl: Impl = "auto",
    ) -> None:
        require_count(batch, "batch", 1)
        require_setting(temperature, "temperature")
        require_positive_number(temperature, "temperature")
        self._pairs, self._tau, self._batch = pairs, float(temperature), batch
        row = pairs(slice(0, 1))[0]
        features = row.shape[1]
        size = min(batch, max(_FEWEST_PAIRS, BLOCK // max(1, features)) if block is None else block)
        problem = rules.problem_of("nt_xent", row, features=features, rows=2 * size, columns=2 * size, groups=1)
        self._native = row.device.type == "cpu" and backends.choose(problem, impl, part=True) == "native"
        if block is None and not self._native:
            size = _FEWEST_PAIRS  # plain PyTorch holds the similarities of two blocks
        require_count(size, "block", 1)
        self.blocks = [slice(first, min(first + size, batch)) for first in range(0, batch, size)]
        negatives, matched = self._sums(row.device)
        losses = torch.nn.functional.softplus(negatives - matched, threshold=40)  # [2, B]
        self.loss: Tensor = losses.mean()
        self._lse = matched + losses
        self._missing = -torch.expm1(-losses)  # 1 − P of each row's positive

    def gradients(self, number: int) -> tuple[Tensor, Tensor]:
        """Of the loss at z and z_pair, [b, d] each, of `blocks[number]`."""
        mine = self.blocks[number]
        x = self._rows(mine)
        lse = self._lse_of(mine)
        wide = x.double()
        pull = self._missing[:, mine].sum(0) / self._tau
        toward = reference.l2_normalize(wide).roll(len(x) // 2, 0)  # each row's positive
        gradient = reference.through_l2(wide, -pull.repeat(2)[:, None] * toward).to(x.dtype)
        for index, other in enumerate(self.blocks):
            y, theirs = (None, None) if index == number else (self._rows(other), self._lse_of(other))
            gradient += self._gradient(x, y, lse, theirs)
        dz, dz_pair = (gradient / (2 * self._batch)).chunk(2)
        return dz, dz_pair

    def _sums(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The log-sum of the negatives of each row [2, B], and the logit of each pair [B]; float64."""
        negatives = torch.full((2, self._batch), -torch.inf, dtype=torch.float64, device=device)
        matched = negatives.new_empty(self._batch)

        def add(some: slice, sums: Tensor) -> None:
            negatives[:, some] = torch.logaddexp(negatives[:, some], sums.view(2, -1))

        for number, mine in enumerate(self.blocks):
            x = self._rows(mine)
            first, second = reference.l2_normalize(x.double()).chunk(2)
            matched[mine] = (first * second).sum(1) / self._tau
            add(mine, self._log_sums(x, None)[0])
            for other in self.blocks[number + 1 :]:
                ours, theirs = self._log_sums(x, self._rows(other))
                add(mine, ours)
                add(other, theirs)
        return negatives, matched

    def _rows(self, some: slice) -> Tensor:
        """The rows [z; z_pair] of a block, [2b, d]."""
        return torch.cat(self._pairs(some))

    def _lse_of(self, some: slice) -> Tensor:
        """Of the rows of a block, [2b]; those of one pair are apart in memory."""
        return self._lse[:, some].flatten().contiguous()

    def _log_sums(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self._native:
            return reference.block_log_sums(x, y, self._tau)
        from anomem.ops import contrast_blocks

        return contrast_blocks.log_sums(x, y, self._tau)

    def _gradient(self, x: Tensor, y: Tensor | None, lse: Tensor, theirs: Tensor | None) -> Tensor:
        if not self._native:
            return reference.block_gradient(x, y, lse, theirs, self._tau)
        from anomem.ops import contrast_blocks

        return contrast_blocks.gradient(x, y, lse, theirs, self._tau)


@torch.no_grad()
def contrasted_memory_backward(
    z: Tensor,
    z_pair: Tensor,
    memory: Callable[[Tensor], Tensor],
    *,
    is_normal: Tensor | None = None,
    temperature: float = 0.2,
    symmetric: bool = True,
    variance_gamma: float = 1.0,
    variance_weight: float = 0.05,
    weight: float = 1.0,
    block: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`contrasted_memory_loss` of one position and its backward pass, in memory that the batch adds little to.

    The gradients of weight · (L_COM + variance_weight · L_V) take the place of `z` and `z_pair`, rounded once to their
    dtype; those of the memory's parameters are added to their `.grad`. The contrast is in float32 (float64).

    Args:
        z: [B, d], the sampled vectors of one view, B ≥ 2; overwritten.
        z_pair: [B, d], those of the other view; overwritten.
        memory: answers to queries, [b, d] -> [b, d].
        is_normal: [B] bool, y_k = 1; None when every image is normal.
        temperature: tau > 0.
        symmetric: also contrast the second view with the memory's answer to the first, and take the mean.
        variance_gamma: gamma of `variance_hinge`.
        variance_weight: lambda_V.
        weight: on the gradients.
        block: most pairs of a block; None for as many as a cache holds.
        impl: as of `BlockwiseNTXent`.

    Returns:
        (L_COM, L_V), both 0-dim, float32 (float64 for float64).

    Raises:
        ArgumentError: a wrong shape, dtype, device or number, or an implementation that cannot run here.
    """
    require_tensor(z, "z", (2,), "[B, d]")
    require(z.shape[0] >= 2 and z.shape[1] > 0, "z", "at least two rows of length d ≥ 1", z)
    require_tensor(z_pair, "z_pair", (2,), "[B, d]")
    require(z.shape == z_pair.shape, "z_pair", lambda: f"the shape of `z`, {shape_of(z)}", z_pair)
    require_same_kind(z_pair, "z_pair", z, "z")
    for view, name in ((z, "z"), (z_pair, "z_pair")):
        require(not view.requires_grad, name, "a tensor without requires_grad, for gradients in place", "one with it")
    if is_normal is not None:
        require_mask(is_normal, "is_normal", len(z))
        require_same_device(is_normal, "is_normal", z, "z")
    require_hinge(variance_gamma, _EPS)
    require_number(variance_weight, "variance_weight")
    require_number(weight, "weight")
    dtype = accumulator(z)

    def answered(queries: Tensor, some: slice) -> Tensor:
        found = memory(queries)
        return found if is_normal is None else torch.where(is_normal[some, None], found, queries)

    def pairs_of(way: int) -> Callable[[slice], tuple[Tensor, Tensor]]:
        views, queries = (z, z_pair) if way == 0 else (z_pair, z)
        return lambda some: (views[some].to(dtype), answered(queries[some].to(dtype), some))

    with without_autocast(z.device.type):
        ways = range(2 if symmetric else 1)
        contrasts = [
            BlockwiseNTXent(pairs_of(way), len(z), temperature=temperature, block=block, impl=impl) for way in ways
        ]
        hinges = [_Hinge(pairs_of(way), contrasts[way].blocks, variance_gamma) for way in ways]
        share = weight / len(ways)
        found = z.new_empty(2, *z.shape)
        for number, some in enumerate(contrasts[0].blocks):
            slopes = z.new_zeros(2, some.stop - some.start, z.shape[1], dtype=dtype)
            for way in ways:
                of_view, of_answer = contrasts[way].gradients(number)
                with torch.enable_grad():
                    query = (z_pair, z)[way][some].to(dtype).requires_grad_()
                    answer = answered(query, some)
                answer.backward(share * (of_answer + variance_weight * hinges[way].gradient(answer.detach())))
                assert query.grad is not None  # every answer depends on its query
                slopes[way] += share * of_view
                slopes[1 - way] += query.grad
            found[:, some] = slopes
        z.copy_(found[0])
        z_pair.copy_(found[1])
    contrast = torch.stack([contrast.loss for contrast in contrasts]).mean()
    variance = torch.stack([hinge.loss for hinge in hinges]).mean()
    return contrast.to(dtype), variance.to(dtype)


class _Hinge:
    """`variance_hinge` of the answers to a batch, from the moments of its blocks."""

    def __init__(
        self, pairs: Callable[[slice], tuple[Tensor, Tensor]], blocks: list[slice], gamma: float | Tensor
    ) -> None:
        moments = []
        for some in blocks:
            x = pairs(some)[1].double()
            variance, mean = torch.var_mean(x, dim=0, correction=0)
            moments.append(torch.cat([mean, variance, mean.new_tensor([len(x)])]))
        self._mean, variance, count = reference.merged_moments(torch.stack(moments))
        with torch.enable_grad():
            leaf = (variance * count / (count - 1)).requires_grad_()
            loss = torch.relu(gamma - (leaf + _EPS).sqrt()).mean()
        (slope,) = torch.autograd.grad(loss, leaf)
        self.loss = loss.detach()
        self._factor = 2 * slope / (count - 1)

    def gradient(self, x: Tensor) -> Tensor:
        """At the answers to a block, [b, d]."""
        return (self._factor * (x - self._mean)).to(x.dtype)

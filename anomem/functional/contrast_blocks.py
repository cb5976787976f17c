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

    For gradient caching: encode all pairs without a graph, then each block again with one, and pass its gradients on.
    Nothing here has a graph.

        contrast = BlockwiseNTXent(lambda some: (z[some], z_pair[some]), len(z))
        for number, some in enumerate(contrast.blocks):
            torch.autograd.backward([encode(x[some]), encode(x_pair[some])], contrast.gradients(number))

    Attributes:
        loss: 0-dim float64.
        blocks: slices of the batch.

    Args:
        pairs: gives z and z_pair, [b, d] each, of a slice of the batch; the same each time it is called.
        batch: B ≥ 1, all of the pairs.
        temperature: tau > 0, a number; `nt_xent` takes a learned one.
        block: most pairs of a block, 512 or more for speed; None for as many as a cache holds.
        impl: "auto", "reference" or "native"; any other name that runs here chooses by "auto".

    Raises:
        ArgumentError: a wrong number, other vectors than described, or an implementation that cannot run here.
    """

    @torch.no_grad()
    def __init__(
        self,
        pairs: Callable[[slice], tuple[Tensor, Tensor]],
        batch: int,
        *,
        temperature: float = 0.2,
        block: int | None = None,
        impl: Impl = "auto",
    ) -> None:
        require(callable(pairs), "pairs", "a function of a slice", lambda: type(pairs).__name__)
        require_count(batch, "batch", 1)
        require_setting(temperature, "temperature")
        require_positive_number(temperature, "temperature")
        if block is not None:
            require_count(block, "block", 1)
        self._pairs, self._tau, self._batch = pairs, float(temperature), batch
        row = self._checked(slice(0, 1))[0]
        self._like = row.new_empty(0, row.shape[1])
        size = min(batch, max(_FEWEST_PAIRS, BLOCK // row.shape[1]) if block is None else block)
        rows = row.to(accumulator(row))
        problem = rules.problem_of("nt_xent", rows, features=row.shape[1], rows=2 * size, columns=2 * size, groups=1)
        self._native = row.device.type == "cpu" and backends.choose(problem, impl, part=True) == "native"
        if block is None and not self._native:
            size = _FEWEST_PAIRS  # plain PyTorch holds the similarities of two blocks
        self.blocks = [slice(first, min(first + size, batch)) for first in range(0, batch, size)]
        negatives, matched = self._sums(row.device)
        losses = torch.nn.functional.softplus(negatives - matched, threshold=40)  # [2, B]
        self.loss: Tensor = losses.mean()
        self._lse = matched + losses
        self._missing = -torch.expm1(-losses)  # 1 − P of each row's positive

    @torch.no_grad()
    def gradients(self, number: int) -> tuple[Tensor, Tensor]:
        """The gradients of the loss at z and z_pair of `blocks[number]`, [b, d] each, rounded once to their dtype.

        Raises:
            ArgumentError: no such block.
        """
        require_count(number, "number", 0, len(self.blocks) - 1)
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
        dz, dz_pair = (gradient / (2 * self._batch)).to(self._like.dtype).chunk(2)
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

    def _checked(self, some: slice) -> tuple[Tensor, Tensor]:
        """The vectors of a slice, as `pairs` is asked for them."""
        found, count = self._pairs(some), some.stop - some.start
        two = isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(x, Tensor) for x in found)
        require(two, "pairs", "a function that gives two tensors", lambda: type(found).__name__)
        z, z_pair = found
        for x in (z, z_pair):
            right = x.dim() == 2 and len(x) == count and x.shape[1] > 0 and x.is_floating_point()
            alike = x.shape == z.shape and x.dtype == z.dtype and x.device == z.device
            expected = f"two alike floating tensors [{count}, d] of slice({some.start}, {some.stop})"
            received = " and ".join(f"{shape_of(y)} {y.dtype}" for y in (z, z_pair))
            require(right and alike, "pairs", expected, received)
        return z, z_pair

    def _rows(self, some: slice) -> Tensor:
        """The rows [z; z_pair] of a block, [2b, d], in the accumulation dtype."""
        z, z_pair = self._checked(some)
        fits = z.shape[1] == self._like.shape[1] and z.dtype == self._like.dtype
        require(
            fits,
            "pairs",
            lambda: f"[b, {self._like.shape[1]}] of {self._like.dtype} each time",
            f"{shape_of(z)} {z.dtype}",
        )
        return torch.cat([z.to(accumulator(z)), z_pair.to(accumulator(z))])

    def _lse_of(self, some: slice) -> Tensor:
        """Of the rows of a block, [2b]; those of one pair are apart in memory."""
        return self._lse[:, some].flatten().contiguous()

    def _log_sums(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the rows of two blocks [2b, d], [2b] each; `reference.block_log_sums`."""
        if not self._native:
            with without_autocast(x.device.type):
                return reference.block_log_sums(x, y, self._tau)
        from anomem.ops import contrast_blocks

        return contrast_blocks.log_sums(x, y, self._tau)

    def _gradient(self, x: Tensor, y: Tensor | None, lse: Tensor, theirs: Tensor | None) -> Tensor:
        """What the rows y [2c, d] give to the gradient at x [2b, d]: [2b, d]; `reference.block_gradient`."""
        if not self._native:
            with without_autocast(x.device.type):
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
    """`contrasted_memory_loss` of one position and its backward pass, which need little more than `z` and `z_pair` do.

    The gradients of weight · (L_COM + variance_weight · L_V) take the place of `z` and `z_pair`, rounded once to their
    dtype; those of the memory's parameters are added to their `.grad`. The contrast is in float32 (float64). After an
    error in the memory the parameters may have parts of their gradients, and the vectors are unchanged.

        memory = HopfieldMemory(64, 32)
        contrasted_memory_backward(z, z_pair, memory)  # [B, 64] each: now gradients
        for some in blocks:
            torch.autograd.backward([encode(x[some]), encode(x_pair[some])], [z[some], z_pair[some]])

    Args:
        z: [B, d], the sampled vectors of one view, B ≥ 2; overwritten.
        z_pair: [B, d], those of the other view; overwritten.
        memory: the answers to queries, [b, d] -> [b, d], with a graph: row by row and the same each time.
        is_normal: [B] bool, y_k = 1; None when every image is normal.
        temperature: tau > 0.
        symmetric: also contrast the second view with the memory's answer to the first, and take the mean.
        variance_gamma: gamma of `variance_hinge`; 1/sqrt(d) where answers have unit length.
        variance_weight: lambda_V ≥ 0.
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
        hint = "pass its detach()"
        require(not view.requires_grad, name, "a tensor without requires_grad, to be overwritten", "one with it", hint)
        apart = all(step > 0 or size == 1 for step, size in zip(view.stride(), view.shape, strict=True))
        require(apart, name, "rows and columns apart in memory, to be overwritten", lambda view=view: view.stride())
    own = z.data_ptr() != z_pair.data_ptr()
    require(own, "z_pair", "memory of its own, to be overwritten", "that of `z`")
    require(callable(memory), "memory", "a function [b, d] -> [b, d]", lambda: type(memory).__name__)
    if is_normal is not None:
        require_mask(is_normal, "is_normal", len(z))
        require_same_device(is_normal, "is_normal", z, "z")
    require_number(variance_gamma, "variance_gamma")
    require(variance_gamma > 0, "variance_gamma", "a number > 0", variance_gamma)
    require_number(variance_weight, "variance_weight")
    require(variance_weight >= 0, "variance_weight", "a number ≥ 0", variance_weight)
    require_number(weight, "weight")
    dtype = accumulator(z)

    def answered(queries: Tensor, some: slice) -> Tensor:
        found = memory(queries)
        right = isinstance(found, Tensor) and found.shape == queries.shape and found.dtype == queries.dtype
        expected = f"answers {shape_of(queries)} {queries.dtype}"
        require(
            right,
            "memory",
            expected,
            lambda: f"{shape_of(found)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__,
        )
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
                require(answer.requires_grad, "memory", "answers with a graph", "answers without one")
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
        """The gradient [b, d] at the answers x [b, d] to a block."""
        return (self._factor * (x - self._mean)).to(x.dtype)

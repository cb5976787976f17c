"""What each process of a job checks in `test_distributed.py`: its share of a loss against the joint batch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from anomem import functional as AF
from anomem import nn as ann
from anomem.errors import ArgumentError
from anomem.nn.batch_norm import JointBatchNorm, sum_of_two
from anomem.testing import assert_within_budget, draw

UNEVEN = {2: (3, 2), 3: (3, 1, 2), 4: (2, 0, 3, 1)}
"""Rows of each process; one has none."""
FEATURES = 6
Loss = Callable[[list[Tensor], nn.Module, "tuple[int, ...] | None", "Tensor | None"], Tensor]


def own(everyone: Tensor, counts: tuple[int, ...]) -> Tensor:
    """This process's share of [..., ΣB, d]."""
    return everyone.split(counts, dim=-2)[dist.get_rank()]


def losses(gathered: bool) -> Iterator[tuple[str, nn.Module, Loss]]:
    """Every loss of `anomem.nn` on three views, [B, d] each: name, module with parameters, and its call."""

    def pairs(views: list[Tensor], loss: nn.Module, counts: object, _: object) -> Tensor:
        return loss(views[0], views[1], counts=counts) + loss(views[0], views[2], counts=counts)

    def alone(views: list[Tensor], loss: nn.Module, counts: object, _: object) -> Tensor:
        return loss(torch.stack(views), counts=counts)

    def memory(views: list[Tensor], loss: nn.Module, counts: object, normal: Tensor | None) -> Tensor:
        z, z_pair = (torch.stack([views[0], views[i]]) for i in (1, 2))
        # Three scales of 2, 2 and 1 positions and of 6, 3 and 5 features.
        vectors = [(z, z_pair), (z[..., :3], z_pair[..., 3:]), (z[:1, :, :5], z_pair[1:, :, 1:])]
        found = loss.criterion.of_scales(vectors, list(loss.memories), normal, counts)
        return torch.stack([weight * term[0] for weight, term in zip((1.0, 0.5, 2.0), found, strict=True)]).sum()

    for ring in (False, True):
        options = {"gather_distributed": gathered, "ring": ring}
        yield f"nt_xent {ring=}", ann.NTXentLoss(0.3, learn_temperature=True, **options), pairs
        yield f"info_nce {ring=}", ann.InfoNCELoss(0.3, learn_temperature=True, **options), pairs
        for negatives in ("image", "position", "both") if not ring else ("image",):
            scales = nn.Module()
            torch.manual_seed(2)
            scales.memories = nn.ModuleList(ann.HopfieldMemory(size, 4, learn_beta=True) for size in (FEATURES, 3, 5))
            scales.criterion = ann.ContrastedMemoryLoss(0.3, 0.4, negatives=negatives, **options)  # type: ignore[arg-type]
            yield f"memory {negatives} {ring=}", scales, memory
    yield "variance", ann.VarianceHinge(gather_distributed=gathered), alone


def gradients_are_those_of_one_process() -> None:
    """Of an encoder under DDP and `fully_shard`, called three times, and of the losses' own parameters; in float64."""
    counts = UNEVEN[dist.get_world_size()]
    x = [draw(sum(counts), 5, seed=seed).double() for seed in (1, 2, 3)]
    normal = torch.arange(sum(counts)) % 3 != 1
    for (name, module, call), (_, plain, _) in zip(losses(True), losses(False), strict=True):
        whole = encoder()
        plain = plain.double()
        expected = call([whole(view) for view in x], plain, None, normal)
        expected.backward()
        for wrap in (DistributedDataParallel, fully_shard):
            module.double().zero_grad()
            wrapped = wrap(encoder())
            own_normal = normal.split(counts)[dist.get_rank()]
            loss = call([wrapped(own(view, counts)) for view in x], module, counts, own_normal)
            loss.backward()
            torch.testing.assert_close(mean(loss.detach()), expected.detach(), msg=f"{name}: loss")
            found = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in wrapped.parameters()]
            found += [mean(p.grad) for p in module.parameters()]
            whole_of = [*whole.parameters(), *plain.parameters()]
            assert len(found) == len(whole_of) >= 2
            for gradient, parameter in zip(found, whole_of, strict=True):
                assert parameter.grad.abs().max() > 0, name
                torch.testing.assert_close(gradient, parameter.grad, msg=f"{name} {wrap.__name__}: {gradient}")


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, FEATURES)).double()


def mean(values: Tensor) -> Tensor:
    """Over the processes."""
    return sum_of(values) / dist.get_world_size()


def sum_of(values: Tensor) -> Tensor:
    """Over the processes."""
    total = values.clone()
    dist.all_reduce(total)
    return total


class Messages(TorchDispatchMode):
    """Counts tensors sent to other processes, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        if func.overloadpacket is torch.ops.c10d.send:
            self.count += len(args[0])
            self.bytes += sum(x.numel() * x.element_size() for x in args[0])
        return func(*args, **(kwargs or {}))


def rows_are_those_of_one_process() -> None:
    """Row by row in float32; with groups; in the implementations that run here; gathered and in the ring."""
    counts = UNEVEN[dist.get_world_size()]
    for shape in ((sum(counts), 16), (3, sum(counts), 16)):
        z, z_pair = (draw(*shape, seed=seed) for seed in (1, 2))
        plain, exact = (
            AF.nt_xent(z.to(dtype), z_pair.to(dtype), temperature=0.1, reduction="none", impl="reference")
            for dtype in (torch.float32, torch.float64)
        )
        expected = [
            torch.cat([own(half[..., None], counts)[..., 0] for half in x.chunk(2, -1)], -1) for x in (plain, exact)
        ]
        for impl, ring in (("reference", False), ("native", False), ("native", True), ("auto", True)):
            rows = AF.nt_xent_distributed(
                own(z, counts), own(z_pair, counts), temperature=0.1, reduction="none", counts=counts, ring=ring,
                impl=impl,
            )  # fmt: skip
            assert_within_budget(rows, *expected)


def half_precision_and_far_means_keep_the_budget() -> None:
    """bfloat16 rows and their gradients, gathered and in the ring; a variance whose mean is 10⁴ standard deviations."""
    counts = UNEVEN[dist.get_world_size()]
    z, z_pair = (draw(3, sum(counts), 16, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))

    def results(one: Tensor, two: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in (one, two)]
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    plain, exact = (
        results(z.to(dtype), z_pair.to(dtype), lambda a, b: AF.nt_xent(a, b, impl="reference"))
        for dtype in (torch.bfloat16, torch.float64)
    )
    for ring in (False, True):
        found = results(own(z, counts), own(z_pair, counts), partial(AF.nt_xent_distributed, counts=counts, ring=ring))
        assert_within_budget(mean(found[0]), plain[0], exact[0], "loss")
        for gradient, low, high in zip(found[1:], plain[1:], exact[1:], strict=True):
            shares = [own(x, counts) for x in (low, high)]
            if gradient.numel():
                assert_within_budget(gradient / dist.get_world_size(), *shares, "gradient")
    for dtype, offset in ((torch.float32, 1e4), (torch.bfloat16, 100.0)):
        x = (draw(3, sum(counts), 16, seed=3) + offset).to(dtype)
        results_of = [AF.variance_hinge(x.to(kind), gamma=2.0, impl="reference") for kind in (dtype, torch.float64)]
        assert_within_budget(AF.variance_hinge_distributed(own(x, counts), gamma=2.0, counts=counts), *results_of)


def batch_norm_is_that_of_the_joint_batch() -> None:
    """Map, running statistics and gradients; one message in each pass.

    A process with more rows than another takes the same implementation: each sends other sums.
    """
    joint_batch_norm(UNEVEN[dist.get_world_size()], torch.contiguous_format, "reference", "auto")
    joint_batch_norm(UNEVEN[dist.get_world_size()], torch.channels_last, "reference", "auto")
    joint_batch_norm((300, 1, 2), torch.channels_last, "auto")
    joint_batch_norm((300, 0, 2), torch.channels_last, "reference", "auto")  # a process without rows
    joint_batch_norm((3, 1, 2), mixed_layouts(), "auto")
    for impl in ("reference", "auto"):  # all without rows
        running = [torch.zeros(4), torch.ones(4)]
        nothing = torch.zeros(0, 4, 3, 5)
        AF.batch_norm(nothing, *running, training=True, impl=impl, process_group=dist.group.WORLD)  # type: ignore[arg-type]
        assert [x.unique().tolist() for x in running] == [[0], [1]], impl
        moved = torch.zeros(4).double()
        ones = torch.ones(2, 4, 1, 1).double()
        AF.batch_norm(ones, moved, training=True, impl=impl, process_group=dist.group.WORLD)  # type: ignore[arg-type]
        torch.testing.assert_close(moved, torch.full_like(moved, 0.1), rtol=1e-12, atol=0)
    alone = torch.zeros(int(dist.get_rank() == 0), 3, 1, 1).contiguous(memory_format=torch.channels_last)
    for impl in ("reference", "auto"):
        with pytest.raises(ArgumentError, match="`x`: expected more than one value per channel"):
            AF.batch_norm(alone, training=True, impl=impl, process_group=dist.group.WORLD)  # type: ignore[arg-type]


def mixed_layouts() -> torch.memory_format:
    """Another layout in the first process than in the others."""
    return torch.contiguous_format if dist.get_rank() == 0 else torch.channels_last


def joint_batch_norm(counts: tuple[int, ...], layout: torch.memory_format, *impls: str) -> None:
    """Compare with one process, for images of each process."""
    rank = dist.get_rank()
    x, add, upstream = (draw(sum(counts), 4, 3, 5, seed=seed) + 3 for seed in (1, 2, 3))
    weight, bias = draw(4, seed=4), draw(4, seed=5)

    def results(rows: slice, dtype: torch.dtype, **options: object) -> list[Tensor]:
        leaves = [v[rows].to(dtype, memory_format=layout).requires_grad_() for v in (x, add)]
        leaves += [v.clone().to(dtype).requires_grad_() for v in (weight, bias)]
        running = [torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)]
        out = AF.batch_norm(
            leaves[0], *running, *leaves[2:], training=True, add=leaves[1], relu=True, **options  # type: ignore[arg-type]
        )  # fmt: skip
        found = torch.autograd.grad(out, leaves, upstream[rows].to(dtype))
        return [out.detach(), *running, *found]

    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    names = ("map", "mean", "variance", "d_x", "d_add", "d_weight", "d_bias")
    plain, exact = (results(slice(None), dtype, impl="reference") for dtype in (torch.float32, torch.float64))
    for impl in impls:
        with Messages() as sent:
            found = results(mine, torch.float32, impl=impl, process_group=dist.group.WORLD)
        assert sent.count == 2 * (dist.get_world_size() - 1), impl
        for name, actual, low, high in zip(names, found, plain, exact, strict=True):
            per_row = actual.dim() == 4
            joint = actual if per_row or name in ("mean", "variance") else sum_of(actual)
            assert_within_budget(joint, *([v[mine] for v in (low, high)] if per_row else (low, high)), name)


def two_batch_norms_share_their_messages() -> None:
    """The sum of two, as at the end of a residual block, in float64; compare with one process."""
    world, rank = dist.get_world_size(), dist.get_rank()
    counts = UNEVEN[world]
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    x, y, upstream = (draw(sum(counts), 4, 3, 5, seed=seed).double() + 3 for seed in (1, 2, 3))

    def results(
        rows: slice, impl: Any, joint: bool, relu: bool, layout: Any, one: bool = False
    ) -> tuple[list[Tensor], ...]:
        torch.manual_seed(0)
        layers: list[Any] = [ann.BatchNorm2d(4, relu=relu, impl=impl), ann.BatchNorm2d(4, eps=0.1, momentum=None)]
        for layer in layers:
            nn.init.normal_(layer.weight)
        first, second = (JointBatchNorm(layer.double()) if joint else layer.double() for layer in layers)
        first = second if one else first
        maps = [v[rows].contiguous(memory_format=layout).requires_grad_() for v in (x, y)]
        out = sum_of_two(first, maps[0], second, maps[1])
        parameters = [*first.parameters(), *second.parameters()]
        found = torch.autograd.grad(out, [*maps, *parameters], upstream[rows])
        return [out.detach(), *found[:2]], list(found[2:]), [*first.buffers(), *second.buffers()]

    for impl, relu, layout, messages in (
        ("reference", False, torch.channels_last, 4),
        ("auto", False, mixed_layouts(), 2),
        ("auto", True, torch.channels_last, 2),
    ):
        maps, gradients, buffers = results(slice(None), "reference", False, relu, torch.contiguous_format)
        with Messages() as sent:
            found = results(mine, impl, True, relu, layout)
        assert sent.count == messages * (world - 1), impl
        actual = [*found[0], *map(sum_of, found[1]), *found[2]]
        for one, expected in zip(actual, [*(v[mine] for v in maps), *gradients, *buffers], strict=True):
            torch.testing.assert_close(one, expected, msg=f"{impl} {relu=}")
    # One batch norm of both maps moves its running statistics in the order of its calls.
    buffers, expected_buffers = (
        results(share, "auto", joint, False, torch.channels_last, one=True)[2]
        for share, joint in ((mine, True), (slice(None), False))
    )
    torch.testing.assert_close(buffers, expected_buffers)
    seen: list[Any] = []
    layers = [JointBatchNorm(ann.BatchNorm2d(4)) for _ in range(2)]
    layers[1].register_forward_hook(lambda *call: seen.append(call))
    sum_of_two(layers[0], x[mine].float(), layers[1], y[mine].float())
    assert len(seen) == 1


def gathering_is_twice_differentiable() -> None:
    """Σ of cubes over all processes: the second derivative of one's rows is 6 W x."""
    world = dist.get_world_size()
    counts = UNEVEN[world]
    x = own(draw(sum(counts), 4).double(), counts).requires_grad_()
    assert AF.rows_per_process(len(x)) == counts
    gathered = AF.gather_rows(x, counts=counts)
    assert gathered.shape == (sum(counts), 4)
    torch.testing.assert_close(own(gathered.detach(), counts), x.detach())
    (first,) = torch.autograd.grad(gathered.pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, 3 * world * x**2)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * world * x.detach())


def groups_meshes_and_mistakes() -> None:
    """A mesh dimension is a group; what cannot be sent is refused in every process before anything is sent."""
    world, rank = dist.get_world_size(), dist.get_rank()
    z, z_pair = draw(3, 4, seed=rank), draw(3, 4, seed=10 + rank)
    expected = AF.nt_xent_distributed(z, z_pair)
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("one", "all"))
    for group in (dist.group.WORLD, (mesh, "all"), (mesh, 1), mesh["all"]):
        assert torch.equal(AF.nt_xent_distributed(z, z_pair, process_group=group), expected)
    assert torch.equal(AF.nt_xent_distributed(z, z_pair, process_group=(mesh, "one")), AF.nt_xent(z, z_pair))
    # What the last two say of this process is right in all but one.
    for wrong in (
        {"process_group": mesh}, {"counts": (3,)}, {"counts": (4,) * world}, {"counts": 3},
        {"counts": (3, -1, 3)[:world]}, {"counts": (3, 3.5, 3)[:world]},
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=r"`(process_group|counts|z)`: expected"):
            AF.nt_xent_distributed(z, z_pair, **wrong)
    for shape in ((3 + rank % 2, 4), (world + rank % 2, 3, 4)):  # other rows, other groups; gloo ended the processes
        for call in (AF.nt_xent_distributed, AF.info_nce_distributed):
            with pytest.raises(ArgumentError, match=r"`(z|rows)`: expected the same shape in every .* in rank 0; "):
                call(torch.ones(shape), torch.ones(shape))
    for wrong in ({"gamma": "1"}, {"gamma": torch.ones((), requires_grad=True)}, {"eps": -1.0}):
        with pytest.raises(ArgumentError, match=r"`(gamma|eps)`: expected"):
            AF.variance_hinge_distributed(z, **wrong)


def the_compiler_traces_a_loss() -> None:
    """One graph, the collectives within; columns are gathered and groups are shared."""

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return AF.nt_xent_distributed(a, b, impl="reference") + AF.variance_hinge_distributed(b, gamma=2.0)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for shape in ((3, 4), (5, 3, 4)):
        z, z_pair = (draw(*shape, seed=seed + dist.get_rank()).requires_grad_() for seed in (0, 10))
        expected = torch.autograd.grad(loss(z, z_pair), (z, z_pair))
        for actual, gradient in zip(torch.autograd.grad(compiled(z, z_pair), (z, z_pair)), expected, strict=True):
            torch.testing.assert_close(actual, gradient)


def messages_have_the_size_that_the_documentation_says() -> None:
    """(W − 1)/W · S in each pass where groups are shared, (W − 1)·S where columns are gathered; the ring sends backward
    the columns again and W·S of gradients.
    """
    world = dist.get_world_size()
    z, z_pair = (draw(3, 4, seed=seed + dist.get_rank()).requires_grad_() for seed in (0, 10))
    size = 2 * 3 * 4 * 4  # both views, in float32
    for ring, backward in ((False, world - 1), (True, 2 * world - 1)):
        with Messages() as sent:
            loss = AF.nt_xent_distributed(z, z_pair, ring=ring, counts=(3,) * world)
            assert sent.bytes == (world - 1) * size
            loss.backward()
        assert sent.bytes == (world - 1 + backward) * size
    groups = [x.detach().expand(world, 3, 4).clone().requires_grad_() for x in (z, z_pair)]
    with Messages() as sent:
        loss = AF.nt_xent_distributed(*groups, counts=(3,) * world)
        assert sent.bytes == (world - 1) * size
        loss.backward()
    assert sent.bytes == 2 * (world - 1) * size  # of W groups, each of `size` bytes


def rows_agree_with_lightly() -> None:
    """Loss and what reaches the views."""
    from lightly.loss import NTXentLoss

    views = [draw(6, 16, seed=seed + dist.get_rank()).double() for seed in (5, 16)]
    results = []
    for criterion in (NTXentLoss(0.5, gather_distributed=True), ann.NTXentLoss(0.5, gather_distributed=True)):
        leaves = [view.clone().requires_grad_() for view in views]
        loss = criterion(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


CHECKS = {
    check.__name__: check
    for check in (
        gradients_are_those_of_one_process,
        rows_are_those_of_one_process,
        half_precision_and_far_means_keep_the_budget,
        batch_norm_is_that_of_the_joint_batch,
        two_batch_norms_share_their_messages,
        gathering_is_twice_differentiable,
        groups_meshes_and_mistakes,
        the_compiler_traces_a_loss,
        messages_have_the_size_that_the_documentation_says,
        rows_agree_with_lightly,
    )
}


def check(names: list[str]) -> None:
    """Do these checks."""
    for name in names:
        CHECKS[name]()

"""What ranks do that hold one model together: a module of its own, since new processes import it by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from distro_optim import DisTrO
from distro_optim.comm.exchange import LocalExchange
from distro_optim.compress.flat import encode_flat
from distro_optim.coordinator.types import BatchId
from distro_optim.errors import ConfigurationError, DistroError
from distro_optim.strategy.model.identity import weights_root
from distro_optim.strategy.model.named_tensors import NamedTensors
from distro_optim.strategy.rounds.results import encode_result
from optimizer.process_group_ranks import fingerprint, gathered

SHAPES = ((64, 48), (50, 33), (7, 40), (3, 30), (21,), (), (20, 3, 5), (18, 70))
"""Tiles of 16: shards of the first one, over four ranks and over two by two, are whole tiles; the others are cut
otherwise, and the fourth has fewer rows than there are ranks."""

FOUR: Any = {2: [Shard(0)], 1: [Shard(0)], 0: [Replicate()], 3: [Shard(0)]}
COLUMNS: Any = {2: [Shard(1)], 1: [Shard(0)], 0: [Replicate()], 3: [Shard(1)]}
SQUARE: Any = {2: [Shard(0), Shard(1)], 1: [Replicate(), Shard(0)], 0: [Replicate()] * 2, 3: [Shard(0), Replicate()]}
TWICE: Any = {2: [Shard(0), Shard(0)], 1: [Shard(0), Shard(0)], 0: [Replicate()] * 2, 3: [Shard(2), Shard(0)]}
STEPS = 5


def weights(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=numbers).to(dtype) for shape in SHAPES]


def sharded(tensors: Sequence[Tensor], mesh: DeviceMesh, placements: Any) -> list[nn.Parameter]:
    """As parameters, placed by their number of dimensions."""
    return [nn.Parameter(distribute_tensor(tensor, mesh, placements[tensor.dim()])) for tensor in tensors]


def whole(tensors: Sequence[Any]) -> list[Tensor]:
    return [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors]


def give_gradients(ours: Sequence[Any], plain: Sequence[Tensor], seed: int) -> None:
    """The same to both; of some there is none, or zeros in some rows, or nothing but zeros at first."""
    for number, grad in enumerate(weights(plain[0].dtype, seed)):
        if number == 1:
            grad[:30] = 0
        if number == 3 and seed == 0:
            grad.zero_()
        missing = number == 2 and seed % 2 == 0
        plain[number].grad = None if missing else grad
        mine = ours[number]
        mine.grad = None if missing else distribute_tensor(grad, mine.device_mesh, mine.placements)


def meshes() -> list[tuple[DeviceMesh, Any]]:
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    return [(line, FOUR), (line, COLUMNS), (square, SQUARE), (square, TWICE)]


def optimizers(
    mesh: DeviceMesh, placements: Any, dtype: torch.dtype, **settings: Any
) -> tuple[list[nn.Parameter], DisTrO, list[nn.Parameter], DisTrO]:
    settings = {"lr": 1e-2, "weight_decay": 0.1, "compression_chunk": 16, "compression_topk": 4, **settings}
    ours, plain = sharded(weights(dtype), mesh, placements), [nn.Parameter(w) for w in weights(dtype)]
    return ours, DisTrO(ours, **settings), plain, DisTrO(plain, exchange=LocalExchange(), **settings)


def assert_same(ours: Sequence[Tensor], plain: Sequence[Tensor], where: object) -> None:
    for number, (mine, other) in enumerate(zip(whole(ours), plain, strict=True)):
        assert torch.equal(_bits(mine), _bits(other)), (where, number, SHAPES[number])


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


# ---------------------------------------------------------------- jobs


def steps_are_those_of_the_whole_model(rank: int, size: int) -> None:
    cases: list[tuple[torch.dtype, dict[str, Any]]] = [
        (torch.float32, {}),
        (torch.bfloat16, {"quantize_1bit": False}),
        (torch.float32, {"overlap": False, "quantize_1bit": False}),
        (torch.float32, {"overlap": False, "tiling": "divisor"}),
    ]
    places = meshes()
    # Every mesh, every case, and the default on a line and on a square.
    for (mesh, placements), (dtype, settings) in [*zip(places, cases, strict=True), (places[2], cases[0])]:
        ours, optimizer, plain, twin = optimizers(mesh, placements, dtype, **settings)
        for step in range(STEPS):
            give_gradients(ours, plain, step)
            optimizer.step()
            twin.step()
        # With overlap they look ahead here, by this peer's own momentum.
        assert_same(ours, plain, (mesh.shape, placements, dtype, settings))
        assert_same([optimizer.delta(param) for param in ours], [twin.delta(param) for param in plain], "momentum")
        optimizer.eval()
        twin.eval()
        assert_same(ours, plain, "the true weights")
        assert not any(torch.equal(w, p) for w, p in zip(weights(dtype), plain, strict=True) if w.numel() > 1)


def updates_are_those_of_the_whole_model(rank: int, size: int) -> None:
    for mesh, placements in meshes():
        ours, optimizer, plain, twin = optimizers(mesh, placements, torch.float32)
        for step in range(3):
            give_gradients(ours, plain, step)
            mine, other = optimizer.generate(), twin.generate()
            assert mine.plan.layout == other.plan.layout
            assert mine.present == other.present
            assert encode_flat(mine) == encode_flat(other), (mesh.shape, placements, step)
            assert len(set(gathered(encode_flat(mine)))) == 1
            sent, expected = (encode_result(u, step=step, trainer_nonce=1, batch=BatchId(0, 1)) for u in (mine, other))
            assert sent == expected  # the bytes, and what is committed to
            optimizer.apply([mine])
            twin.apply([other])
        hashes = [
            weights_root(NamedTensors({str(n): param for n, param in enumerate(params)}, {}, {}))
            for params in (ours, plain)
        ]
        assert hashes[0] == hashes[1]
        assert_same(optimizer.decode([mine]), twin.decode([other]), "decoded")
        assert_same(ours, plain, "weights")


def other_rules_are_those_of_the_whole_model(rank: int, size: int) -> None:
    """Steps of a fixed size add up the squares of all ranks; Muon's directions are made of whole matrices."""
    [(line, rows), (_, columns), (square, both), (_, twice)] = meshes()
    matrices = {**both, 3: [Shard(0), Replicate()]}
    orthogonal: dict[str, Any] = {"direction": "orthogonal", "momentum": 0.8}
    cases: list[tuple[DeviceMesh, Any, torch.dtype, dict[str, Any]]] = [
        (line, rows, torch.float32, {"update": "rms", "quantize_1bit": False}),
        (line, columns, torch.float32, orthogonal),
        (line, columns, torch.float32, {**orthogonal, "ahead": "delta"}),
        (square, both, torch.bfloat16, {**orthogonal, "update": "rms", "overlap": False, "quantize_1bit": False}),
        (square, matrices, torch.float32, {**orthogonal, "update": "rms", "tiling": "divisor"}),
        (square, twice, torch.float32, {"update": "rms", "overlap": False}),
    ]
    for mesh, placements, dtype, settings in cases:
        ours, optimizer, plain, twin = optimizers(mesh, placements, dtype, **settings)
        where = (mesh.shape, placements, settings)
        for step in range(4):
            give_gradients(ours, plain, step)
            optimizer.step()
            twin.step()
            assert_same(ours, plain, (*where, step))
        assert_same([optimizer.delta(param) for param in ours], [twin.delta(param) for param in plain], where)
        give_gradients(ours, plain, 1)
        mine, other = optimizer.generate(), twin.generate()
        assert encode_flat(mine) == encode_flat(other), where
        assert_same(optimizer.decode([mine, other]), twin.decode([other, mine]), where)
        saved, expected = optimizer.state_dict()["state"], twin.state_dict()["state"]
        for number, entry in expected.items():
            for key in {"momentum_buffer", "direction"} & entry.keys():
                assert torch.equal(saved[number][key], entry[key]), (where, number, key)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for step in range(2):
            give_gradients(ours, plain, step)
            optimizer.step()
            twin.step()
        assert_same(ours, plain, where)


def copies_look_ahead_as_the_whole_model(rank: int, size: int) -> None:
    [(line, rows), _, (square, both), _] = meshes()
    matrices = {**both, 3: [Shard(0), Replicate()]}  # batches of them, cut between matrices
    for mesh, placements, tiling in ((line, rows, "padded"), (square, matrices, "divisor")):
        ours, optimizer, plain, twin = optimizers(mesh, placements, torch.bfloat16, tiling=tiling)
        for step in range(1, 4):
            give_gradients(ours, plain, step)
            mine, other = optimizer.generate(), twin.generate()
            assert encode_flat(mine) == encode_flat(other), (mesh, step)
            optimizer.apply([mine])
            twin.apply([other])
            optimizer.lookahead()
            twin.lookahead()
            assert_same(ours, plain, "ahead")
        # What was borrowed for the lookahead is not copied; all ranks copy.
        again = copy.deepcopy(optimizer)
        again.eval()
        twin.eval()
        assert_same([param for group in again.param_groups for param in group["params"]], plain, "a copy")
        optimizer.reset()
        twin.reset()
        optimizer.lookahead()
        twin.lookahead()
        assert_same(ours, plain, "ahead by nothing")


def shards_may_take_the_place_of_parameters(rank: int, size: int) -> None:
    """As accelerate does it: FSDP2 shards a model whose optimizer exists already."""
    [(mesh, placements), *_] = meshes()
    plain = [nn.Parameter(w) for w in weights(torch.float32)]
    before = [nn.Parameter(w) for w in weights(torch.float32)]
    settings: Any = {"lr": 1e-2, "compression_chunk": 16}
    optimizer, twin = DisTrO(before, **settings), DisTrO(plain, exchange=LocalExchange(), **settings)
    ours = sharded(weights(torch.float32), mesh, placements)
    optimizer.param_groups[0]["params"][:] = ours
    for step in range(2):
        give_gradients(ours, plain, step)
        optimizer.step()
        twin.step()
    assert_same(ours, plain, "in the place of parameters")


def only_rows_of_tiles_that_are_cut_travel(rank: int, size: int) -> None:
    shapes = ((100, 48), (50, 33), (7, 40), (64, 20))
    mesh = init_device_mesh("cpu", (4,))
    numbers = torch.Generator().manual_seed(0)
    ours = [
        nn.Parameter(distribute_tensor(torch.randn(shape, generator=numbers), mesh, [Shard(0)])) for shape in shapes
    ]
    optimizer = DisTrO(ours, lr=1e-2, compression_chunk=16)
    sent: list[int] = []

    def counted(arrived: Tensor, outgoing: Tensor, come: list[int], to: list[int], group: Any) -> None:
        assert to[rank] == 0
        sent.append(sum(to))
        swap(arrived, outgoing, come, to, group=group)

    swap = dist.all_to_all_single
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted)
        patch.setattr(DTensor, "full_tensor", None)  # no tensor comes together as a whole
        for _ in range(3):
            for param in ours:
                param.grad = torch.ones_like(param)
            sent.clear()
            optimizer.step()
    total = torch.tensor(sent)
    dist.all_reduce(total)
    # Below each boundary, as far as the tile that it cuts: gradients in float32 to the owner, signs back.
    edges = ((25, 50, 75), (13, 26, 39), (2, 4, 6), (16, 32, 48))
    rows = [[min(-edge % 16, shape[0] - edge) for edge in some] for shape, some in zip(shapes, edges, strict=True)]
    rows[2] = [2, 2, 1]  # one row of tiles, cut three times
    elements = [sum(some) * shape[1] for shape, some in zip(shapes, rows, strict=True)]
    assert total.tolist() == [4 * sum(elements), sum(elements)]
    assert all(count <= 3 * 16 * shape[1] for count, shape in zip(elements, shapes, strict=True))
    assert elements[3] == 0


def a_gradient_that_some_ranks_do_not_have_is_told(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (4,))
    ours, optimizer, plain, _ = optimizers(mesh, FOUR, torch.float32)
    give_gradients(ours, plain, 1)
    if rank == 2:
        ours[1].grad = None
    with pytest.raises(DistroError, match="parameter 1 is sharded over ranks of which only some have a gradient"):
        optimizer.step()


def a_rank_changes_what_is_its_own(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (4,))
    ours, optimizer, _, twin = optimizers(mesh, FOUR, torch.float32)
    memory = [param.to_local().data_ptr() for param in ours]  # type: ignore[attr-defined]
    shapes = [tuple(optimizer.state[param]["delta"].shape) for param in ours]
    assert shapes[0] == (16, 48)  # its own tiles
    assert shapes[1] == ((16, 33), (16, 33), (16, 33), (2, 33))[rank]  # the tiles that its 13 rows begin
    assert shapes[2] == ((7, 40), (0, 40), (0, 40), (0, 40))[rank]  # one row of tiles, whose first element it has
    assert sum(s["delta"].numel() for s in optimizer.state.values()) < sum(
        s["delta"].numel() for s in twin.state.values()
    )
    give_gradients(ours, weights(torch.float32), 1)
    optimizer.step()
    assert memory == [param.to_local().data_ptr() for param in ours]  # type: ignore[attr-defined]


def a_gradient_that_is_not_finite_on_one_rank_is_left_out_by_all(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    ours, optimizer, plain, twin = optimizers(mesh, SQUARE, torch.float32)
    for step, wrong in enumerate((float("nan"), 3e19, float("inf"))):
        give_gradients(ours, plain, step)
        broken = torch.full(SHAPES[0], 0.5)
        # Squares of 3e19 are below float32's largest number by themselves, not their sum.
        broken[: 64 if wrong == 3e19 else 1, 0] = wrong
        plain[0].grad = broken
        ours[0].grad = distribute_tensor(broken, mesh, ours[0].placements)  # type: ignore[attr-defined]
        optimizer.step()
        twin.step()
        assert_same(ours, plain, wrong)
        assert optimizer.quarantined == twin.quarantined == step + 1


def what_is_saved_is_the_state_of_the_whole_model(rank: int, size: int) -> None:
    for overlap in (True, False):
        [_, (line, columns), (square, placements), _] = meshes()
        ours, optimizer, plain, twin = optimizers(square, placements, torch.float32, overlap=overlap)
        for step in range(3):
            give_gradients(ours, plain, step)
            optimizer.step()
            twin.step()
        saved, expected = optimizer.state_dict(), twin.state_dict()
        assert saved["param_groups"] == expected["param_groups"]
        for number, entry in expected["state"].items():
            assert saved["state"][number].keys() == entry.keys()
            for key, value in entry.items():
                if key == "own_index" and not bool(entry["own_value"].any()):
                    continue
                assert torch.equal(saved["state"][number][key], value), (number, key)
        # Into a model that is sharded in another way, and into one that is not.
        others, resumed, again, unsharded = optimizers(line, columns, torch.float32, overlap=overlap)
        resumed.load_state_dict(saved)
        unsharded.load_state_dict(saved)
        with torch.no_grad():
            for mine, other, trained in zip(others, again, plain, strict=True):
                if not overlap:  # with overlap the state has the weights
                    other.copy_(trained)
                    mine.copy_(distribute_tensor(trained.detach(), line, mine.placements))  # type: ignore[attr-defined]
        for step in range(3, 6):
            give_gradients(others, plain, step)
            for param, source in zip(again, plain, strict=True):
                param.grad = source.grad
            resumed.step()
            twin.step()
            unsharded.step()
            assert_same(others, plain, step)
            assert_same(again, plain, step)


def copies_of_a_sharded_model_are_peers(rank: int, size: int) -> None:
    """Two peers of two ranks each, beside two peers that are not sharded: all end with the same weights."""
    for names, placements in ((("shard",), FOUR), (("one", "shard"), SQUARE)):
        mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("peer", "one", "shard"))
        _are_peers(rank, mesh, mesh[names], placements)


def _are_peers(rank: int, mesh: DeviceMesh, shards: DeviceMesh, placements: Any) -> None:
    settings: Any = {"lr": 1e-2, "compression_chunk": 16}
    ours = sharded(weights(torch.float32), shards, placements)
    optimizer = DisTrO(ours, process_group=mesh.get_group("peer"), **settings)
    plain = [nn.Parameter(tensor) for tensor in weights(torch.float32)]
    twin = DisTrO(plain, process_group=mesh.get_group("peer"), **settings)
    for step in range(STEPS):
        give_gradients(ours, plain, 2 * step + 1 + 10 * (rank // 2))
        optimizer.step()
        twin.step()
    optimizer.eval()
    twin.eval()
    assert_same(ours, plain, "two peers")
    assert len(set(gathered(fingerprint(whole(ours))))) == 1


def writes_to_weights_that_look_ahead_are_seen(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    ours, optimizer, plain, twin = optimizers(mesh, SQUARE, torch.float32)
    give_gradients(ours, plain, 1)
    optimizer.step()
    twin.step()
    with torch.no_grad():
        for mine, other in zip(ours, plain, strict=True):
            mine.mul_(2)
            other.mul_(2)
    optimizer.eval()
    twin.eval()
    assert_same(ours, plain, "all of them were written to")


def a_run_of_psyches_gives_the_settings_and_the_steps_of_the_whole_model(rank: int, size: int) -> None:
    for mesh, placements in meshes()[1:3]:
        ours, optimizer, plain, twin = optimizers(mesh, placements, torch.bfloat16)
        for step in range(3):
            give_gradients(ours, plain, step)
            mine, other = optimizer.generate(), twin.generate()
            assert encode_flat(mine) == encode_flat(other), step
            optimizer.apply([mine, mine])
            twin.apply([other, other])
            assert_same(ours, plain, step)
            if not step:  # with a momentum by then, and other tiles from there on
                for each in (optimizer, twin):
                    each.reconfigure(tiling="divisor", quantize_1bit=False, arithmetic="psyche", compression_chunk=8)
                assert_same([optimizer.delta(p) for p in ours], [twin.delta(p) for p in plain], "momentum")


def what_cannot_be_sharded_is_refused(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (4,))
    params = sharded(weights(torch.float32), mesh, FOUR)
    with pytest.raises(ConfigurationError, match="arithmetic='float' with sharded"):
        DisTrO(params, arithmetic="float")
    with pytest.raises(ConfigurationError, match="hold one model together"):
        DisTrO(params, process_group=dist.group.WORLD).step()
    half = init_device_mesh("cpu", (2, 2), mesh_dim_names=("peer", "shard"))["shard"]
    with pytest.raises(ConfigurationError, match="sharded over 2 of 4 ranks"):
        DisTrO(sharded(weights(torch.float32), half, FOUR)).step()
    with pytest.raises(ConfigurationError, match=r"arithmetic='psyche' with sharded.*bfloat16"):
        DisTrO(params, arithmetic="psyche")
    optimizer = DisTrO(params)
    optimizer.found_inf = torch.zeros(1)  # type: ignore[attr-defined]
    with pytest.raises(DistroError, match="GradScaler"):
        optimizer.step()


def fully_sharded_modules_train_as_the_whole_model(rank: int, size: int) -> None:
    """FSDP2 itself: shards of its own making, padded, and gradients that it reduces."""
    from torch.distributed.fsdp import fully_shard

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 50), nn.Tanh(), nn.Linear(50, 6))

    def train(net: nn.Module, optimizer: DisTrO, steps: Callable[[int], Tensor]) -> None:
        for step in range(STEPS):
            optimizer.zero_grad()
            net(steps(step)).square().mean().backward()
            optimizer.step()
        optimizer.eval()

    def batch(step: int) -> Tensor:
        # The same on all ranks, so that the mean of four gradients is exact.
        return torch.randn(8, 24, generator=torch.Generator().manual_seed(step))

    net, twin = model(), model()
    for layer in (net[0], net[2]):
        fully_shard(layer)
    fully_shard(net)
    train(net, DisTrO(net.parameters(), lr=1e-2, compression_chunk=16), batch)
    train(twin, DisTrO(twin.parameters(), lr=1e-2, compression_chunk=16, exchange=LocalExchange()), batch)
    for mine, other in zip(whole(list(net.parameters())), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


def modules_that_are_sharded_twice_train_as_the_whole_model(rank: int, size: int) -> None:
    """FSDP2 over tensor parallelism: the first layer's rows are cut by both, the last layer's by one of them each."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 50), nn.Tanh(), nn.Linear(50, 6), nn.LayerNorm(6))
    plain = [nn.Parameter(param.detach().clone()) for param in net.parameters()]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in net:
        fully_shard(layer, mesh=mesh["data"])
    # The last layer's norm lies on a part of the mesh, and a scale of our own on every rank.
    scale, other = (nn.Parameter(torch.ones(3)) for _ in range(2))
    settings: Any = {"lr": 1e-2, "compression_chunk": 16}
    optimizer = DisTrO([*net.parameters(), scale], **settings)
    twin = DisTrO([*plain, other], exchange=LocalExchange(), **settings)
    for step in range(STEPS):
        optimizer.zero_grad()
        # Ranks that differ in the data have other data.
        numbers = torch.Generator().manual_seed(2 * step + mesh.get_local_rank("data"))
        net(torch.randn(8, 24, generator=numbers)).sub(1).square().mean().backward()
        scale.grad = torch.arange(3.0) - step
        for param, source in zip([*plain, other], [*net.parameters(), scale], strict=True):
            assert source.grad is not None
            [param.grad] = whole([source.grad])
        optimizer.step()
        twin.step()
    optimizer.eval()
    twin.eval()
    for mine, theirs in zip(whole([*net.parameters(), scale]), [*plain, other], strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(other, torch.ones(3))


JOBS: tuple[Callable[[int, int], None], ...] = (
    steps_are_those_of_the_whole_model,
    updates_are_those_of_the_whole_model,
    other_rules_are_those_of_the_whole_model,
    copies_look_ahead_as_the_whole_model,
    shards_may_take_the_place_of_parameters,
    only_rows_of_tiles_that_are_cut_travel,
    a_gradient_that_some_ranks_do_not_have_is_told,
    a_rank_changes_what_is_its_own,
    a_gradient_that_is_not_finite_on_one_rank_is_left_out_by_all,
    what_is_saved_is_the_state_of_the_whole_model,
    copies_of_a_sharded_model_are_peers,
    writes_to_weights_that_look_ahead_are_seen,
    a_run_of_psyches_gives_the_settings_and_the_steps_of_the_whole_model,
    what_cannot_be_sharded_is_refused,
    *(
        (fully_sharded_modules_train_as_the_whole_model, modules_that_are_sharded_twice_train_as_the_whole_model)
        if hasattr(torch.distributed.fsdp, "fully_shard")  # from PyTorch 2.6 on
        else ()
    ),
)

"""What ranks do that are one peer of a run: a module of its own, since new processes import it by name."""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
import torch.distributed.fsdp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from typing_extensions import override

from distro_optim import DisTrO, SwarmSession
from distro_optim.compress import CompressedUpdate
from distro_optim.compress.flat import encode_flat
from distro_optim.errors import ConfigurationError
from distro_optim.optim.sharding import is_sharded, shard_of
from distro_optim.strategy.environment import REPORT
from distro_optim.strategy.frameworks.shards import load_whole, whole_state
from distro_optim.strategy.model.checkpoint import CheckpointStore
from distro_optim.strategy.model.checkpoint_keeper import CheckpointFolder
from distro_optim.strategy.model.named_tensors import NamedTensors
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.strategy.ranks.holders import ShardHolders
from distro_optim.strategy.ranks.local_ranks import LocalRanks
from distro_optim.strategy.round import Round

from .world import SessionWorld, SimulatedPort

SAMPLES = 60
RUN = {"total_steps": 6, "epoch_time": 200, "init_min_clients": 2, "min_clients": 2}


class Net(nn.Module):
    """Rows that two kinds of sharding cut, a norm, and what no sharding touches: a scale, and a count of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(24, 50)
        self.second = nn.Linear(50, 6)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.full((3,), 1.0 + seed))
        self.fixed = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("seen", torch.tensor(float(seed)))

    @override
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.second(torch.tanh(self.first(x))))
        return y


def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def shard(net: Net, mesh: DeviceMesh) -> Net:
    """FSDP2 over tensor parallelism."""
    from torch.distributed.fsdp import fully_shard

    parallelize_module(net, mesh["tensor"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
    for layer in (net.first, net.second, net.norm):
        fully_shard(layer, mesh=mesh["data"])
    return net


class RecordingPort(SimulatedPort):
    """Keeps what was published."""

    def __init__(self, world: SessionWorld, number: int) -> None:
        super().__init__(world, number)
        self.published: dict[int, bytes] = {}

    @override
    def trained(self, step: int, update: CompressedUpdate, own: object, *, loss: float | None = None) -> None:
        self.published[step] = encode_flat(update)
        super().trained(step, update, own, loss=loss)


class Gradients(Protocol):
    def __call__(self, net: Net, round_: Round) -> None: ...


def shard_like(value: Tensor, param: Any) -> Tensor:
    """The whole value, placed as the parameter is."""
    if not is_sharded(param):
        return value
    here = value[tuple(slice(*span) for span in shard_of(param))].contiguous()
    return DTensor.from_local(
        here, param.device_mesh, param.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def made_up(net: Net, round_: Round) -> None:
    """The same for a model and for its shards; not finite in one round."""
    numbers = torch.Generator().manual_seed(1000 * round_.step + round_.batch.start)
    for name, param in net.named_parameters():
        if not param.requires_grad:
            continue
        grad = torch.randn(param.shape, generator=numbers)
        if round_.step == 3 and name == "second.weight":
            grad[-1, -1] = torch.inf
        param.grad = shard_like(grad, param)


def computed(net: Net, round_: Round, *, mesh: DeviceMesh | None = None) -> None:
    """By forward and backward passes of the samples that are assigned."""
    place = (0, 1) if mesh is None else (mesh.get_local_rank("data"), mesh["data"].size())
    for indices, weight in round_.parts(2, rank=place[0], world_size=place[1]):
        x = torch.stack([torch.randn(24, generator=torch.Generator().manual_seed(index)) for index in indices])
        (net(x).sub(1).square().mean() * weight).backward()
    net.scale.grad = torch.arange(3.0)


class Peer:
    """What a process of a peer does; call it with a port, or with None where another process of the peer has it."""

    def __init__(self, net: Net, gradients: Gradients, **settings: Any) -> None:
        self.net, self.gradients = net, gradients
        self.settings = settings
        self.trained: list[int] = []
        self.news: list[str] = []

    def __call__(self, port: SimulatedPort | None) -> None:
        trained = [param for param in self.net.parameters() if param.requires_grad]
        optimizer = DisTrO(trained, lr=1e-2, weight_decay=0.1, compression_chunk=16, compression_topk=4)
        settings: dict[str, Any] = {"dataset_size": SAMPLES, "on_event": self.news.append, **self.settings}
        self.session = SwarmSession(self.net, optimizer, port=port, **settings)
        with self.session as session:
            for round_ in session.rounds():
                self.gradients(self.net, round_)
                if round_.finish(loss=1.0):
                    self.trained.append(round_.step)
                self.net(torch.zeros(2, 24))  # a look at the model, without a backward pass

    @property
    def weights(self) -> list[Tensor]:
        """All of them, whole."""
        return [whole(tensor) for tensor in [*self.net.parameters(), *self.net.buffers()]]


def whole(tensor: Any) -> Tensor:
    made: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return made.detach().clone()


def run(rank: int, peer: Peer, other: Peer, **settings: Any) -> list[RecordingPort]:
    """A run of ``other``, which begins it, and of a peer that several processes are, of which the first has the world.

    Returns:
        the ports; none on ranks that have none.
    """
    if rank:
        peer(None)
        return []
    world = SessionWorld(**{**RUN, **settings})
    try:
        ports = []
        for number, script in enumerate((other, peer), start=1):
            port = RecordingPort(world, number)
            world.ports.append(port)
            world.run(port, script)
            ports.append(port)
        world.until_all_ended()
        world.assert_equal_hashes()
    finally:
        world.release()
    return ports


# ---------------------------------------------------------------- jobs


def a_peer_of_shards_is_the_peer_of_the_whole_model(rank: int, size: int, folder: Path) -> None:
    """Beside the same run with a peer that is not sharded: what is sent, hashed, saved and left at the end."""
    results = []
    for name, net in (("shards", shard(Net(7), square())), ("whole", Net(7))):
        # The weights are those of the other one, whose first ones are others: the shards are filled from a peer.
        peer, other = Peer(net, made_up, checkpoint_dir=folder / name), Peer(Net(0), made_up)
        if name == "whole" and rank:
            continue
        ports = run(rank, peer, other)
        weights = peer.weights
        assert peer.trained == list(range(1, 6))
        if ports:
            assert [text for text in peer.news if "gradients of 1 tensors are not finite" in text]
            assert not [text for text in peer.news if "our weights" in text]
            assert all(set(range(3, 6)) <= port.hashes.keys() for port in ports), [port.hashes.keys() for port in ports]
            for mine, theirs in zip(weights, other.weights, strict=True):
                assert torch.equal(mine, theirs)
            results.append((ports[1].published, ports[1].hashes, weights))
    _what_was_saved_fills_other_shards(rank, folder / "shards")
    if rank:
        return
    (sent, hashes, weights), (other_sent, other_hashes, other_weights) = results
    assert sent == other_sent
    assert hashes == other_hashes
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))
    assert not torch.equal(weights[0], Net(0).first.weight)
    # What is saved, weights and momentum.
    steps = {name: sorted(path.name for path in (folder / name).glob("step-*")) for name in ("shards", "whole")}
    assert steps["shards"] == steps["whole"] != []
    for step in steps["whole"]:
        for file in ("model.safetensors", "momentum.safetensors"):
            saved, expected = (load_file(folder / name / step / file) for name in ("shards", "whole"))
            assert saved.keys() == expected.keys()
            assert all(torch.equal(saved[key], expected[key]) for key in expected), (step, file)


def _what_was_saved_fills_other_shards(rank: int, folder: Path) -> None:
    """The latest weights and the momentum, in a model that is sharded in another way."""
    from torch.distributed.fsdp import fully_shard

    net = Net(1)
    fully_shard(net)
    trained = [param for param in net.parameters() if param.requires_grad]
    optimizer = DisTrO(trained, lr=1e-2, compression_chunk=16, compression_topk=4)
    tensors = NamedTensors.of(net, optimizer, ShardHolders(LocalRanks()))
    keeper = CheckpointFolder(CheckpointStore(folder, writes=not rank), net, tensors, optimizer, lambda text: None)
    checkpoint = keeper.restore()
    assert checkpoint is not None
    trainer = SwarmTrainer(tensors, optimizer)
    trainer.load_momentum(tensors.holders.read(checkpoint.momentum))
    momentum, weights = trainer.momentum(), tensors.copies()
    if rank:
        assert not momentum
        assert all(tensor.is_meta for tensor in weights.values())
        return
    for found, file in ((weights, "model.safetensors"), (momentum, "momentum.safetensors")):
        saved = load_file(checkpoint.path / file)
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved), file
    assert any(bool(part.any()) for part in momentum.values())


def a_peer_of_shards_trains_by_its_own_passes(rank: int, size: int, folder: Path) -> None:
    mesh = square()
    peer = Peer(shard(Net(7), mesh), functools.partial(computed, mesh=mesh))
    other = Peer(Net(0), computed)
    report = folder.with_name("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(REPORT, str(report))
        run(rank, peer, other)
    weights = peer.weights
    assert peer.trained == list(range(1, 6))
    if not rank:
        assert all(torch.equal(a, b) for a, b in zip(weights, other.weights, strict=True))
        assert not torch.equal(weights[0], Net(0).first.weight)
        ended = [line for line in map(json.loads, report.read_text().splitlines()) if line["kind"] == "ended"]
        assert len({line["peer"] for line in ended}) == 2
        assert len({line["weights_hash"] for line in ended}) == 1


def a_state_goes_out_whole_and_comes_in_in_shards(rank: int, size: int) -> None:
    """As the strategies for frameworks save and load it."""
    net = shard(Net(7), square())
    net(torch.zeros(2, 24))  # leaves whole weights behind
    state = whole_state(net, keep=not rank)
    plain = Net(7).state_dict()
    assert state.keys() == (set() if rank else plain.keys())
    assert all(torch.equal(state[name], plain[name]) for name in state)
    load_whole(net, Net(3).state_dict())
    for (name, mine), other in zip(net.state_dict().items(), Net(3).state_dict().values(), strict=True):
        assert torch.equal(whole(mine), other), name
    with pytest.raises(RuntimeError, match=r"loading state_dict: missing \['scale'\]"):
        load_whole(net, {name: value for name, value in plain.items() if name != "scale"})
    with pytest.raises(RuntimeError, match=r"size mismatch for first\.weight"):
        load_whole(net, {**plain, "first.weight": torch.zeros(3, 3)})


def what_runs_cannot_do_with_shards_is_refused(rank: int, size: int) -> None:
    net = shard(Net(), square())
    with pytest.raises(ConfigurationError, match="audit_loss with a sharded model"):
        SwarmSession(net, DisTrO(net.parameters(), lr=1e-2), dataset_size=8, audit_loss=lambda indices: torch.zeros(()))


def what_goes_wrong_for_the_leader_goes_wrong_for_all(rank: int, size: int) -> None:
    """A port is taken, which only one of them opens: the others wait for nothing."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        peer = Peer(shard(Net(7), square()), made_up, web=taken.getsockname()[1])

        def refused(port: SimulatedPort | None) -> None:
            with pytest.raises(ConfigurationError, match="web"):
                peer(port)

        if rank:
            refused(None)
            return
        world = SessionWorld()
        try:
            port = RecordingPort(world, 1)
            world.ports.append(port)
            world.run(port, refused)
            world.until(lambda state: port.ended)
            assert not world.failures
        finally:
            world.release()


JOBS: tuple[Callable[..., None], ...] = (
    a_peer_of_shards_is_the_peer_of_the_whole_model,
    a_peer_of_shards_trains_by_its_own_passes,
    a_state_goes_out_whole_and_comes_in_in_shards,
    what_runs_cannot_do_with_shards_is_refused,
    what_goes_wrong_for_the_leader_goes_wrong_for_all,
)

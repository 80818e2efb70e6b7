"""A training script for tests: a small model with everything in it that could make peers differ."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.strategy.model.participant import Participant
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.strategy.session import Round, SwarmSession

from .world import SimulatedPort

SAMPLES = 60
LR = 1e-2
_NARRATION = re.compile(
    r"^(found the run|the model comes|in the run|waiting for)|(came|left): \d+ peers? now$|next epoch$"
    r"|\.\.\.( \d+ s so far)?$|waiting for the others"
)


class Net(nn.Module):
    """A linear layer, a norm with statistics, a tied pair, and a parameter that only some samples use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.norm: nn.Module = nn.BatchNorm1d(10)
        self.second = nn.Linear(10, 6, bias=False)
        self.tied = self.second.weight
        self.sometimes = nn.Parameter(torch.zeros(5))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.norm(self.first(x)))) * self.frozen.repeat(2)
        return y + self.sometimes.sum() if bool(x[0, 0] > 0) else y


def samples(dtype: torch.dtype) -> Tensor:
    return torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(5)).to(dtype)


def batched(share: list[int]) -> list[list[int]]:
    return [share[start : start + 4] for start in range(0, len(share), 4)]


def new_model(seed: int = 0, dtype: torch.dtype = torch.float32, kind: type[Net] = Net) -> Net:
    torch.manual_seed(seed)
    return kind().to(dtype)


def new_optimizer(model: nn.Module, *, backwards: bool = False, **settings: Any) -> DisTrO:
    trained = [p for p in model.parameters() if p.requires_grad]
    trained = trained[::-1] if backwards else trained
    return DisTrO(trained, **{"lr": LR, "weight_decay": 0.1, "compression_topk": 4, "compression_chunk": 8, **settings})


@dataclass
class Script:
    """What a peer does; call it with a port.

    Attributes:
        seconds: that a micro-batch takes, or what gives them for a round.
        during: called with the gradients computed and the round still open.
        after: called after each round that was begun.
        skips: the rounds in which nothing is to be said.
        norm_in_eval: use the norm's statistics, since a batch of one sample has none.
        schedule: factor of the learning rate, of a LambdaLR.
        by_data_index: the samples know themselves by data index, as those of a token dataset.
        session, model, optimizer: of the peer, once it runs.
        news: what the session said, but for how it gets in and who else comes and leaves.
        trained, cancelled: steps.
    """

    seed: int = 0
    model_class: type[Net] = Net
    reversed_parameters: bool = False
    dtype: torch.dtype = torch.float32
    seconds: float | Callable[[Round], float] = 1.0
    during: Callable[[Script], None] = lambda script: None
    after: Callable[[Script, Round], None] = lambda script, round_: None
    skips: Callable[[Round], bool] = lambda round_: False
    norm_in_eval: bool = False
    schedule: Callable[[int], float] | None = None
    by_data_index: bool = False
    optimizer_settings: dict[str, Any] = field(default_factory=dict)
    session_settings: dict[str, Any] = field(default_factory=dict)
    news: list[str] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    samples_seen: list[int] = field(default_factory=list)

    def _hear(self, text: str) -> None:
        if _NARRATION.search(text) is None:
            self.news.append(text)

    def __call__(self, port: SimulatedPort) -> None:
        self.port, port.script = port, self
        self.model = new_model(self.seed, self.dtype, self.model_class)
        self.model.norm.train(not self.norm_in_eval)
        self.optimizer = new_optimizer(self.model, backwards=self.reversed_parameters, **self.optimizer_settings)
        data = samples(self.dtype)
        settings = {"dataset_size": SAMPLES, "on_event": self._hear, **self.session_settings}
        self.session = SwarmSession(self.model, self.optimizer, port=port, **settings)
        self.session.by_data_index = self.by_data_index
        if self.schedule is not None:
            self.session.follow(LambdaLR(self.optimizer, self.schedule))
        with self.session as session:
            for round_ in session.rounds():
                losses = []
                without_length = settings["dataset_size"] is None  # as distro-optim join
                share = list(range(round_.batch.start, round_.batch.end + 1)) if without_length else round_.indices
                for indices in batched(share) if without_length else round_.micro_batches(4):
                    port.compute(self.seconds(round_) if callable(self.seconds) else self.seconds, round_.step)
                    x = data[[index % SAMPLES for index in indices]]
                    loss = (self.model(x) - x.flip(1)).pow(2).mean()
                    (loss * len(indices) / len(share)).backward()
                    losses.append(loss.item() * len(indices))
                self.during(self)
                loss = sum(losses) / len(share)
                if round_.skip() if self.skips(round_) else round_.finish(loss=loss):
                    self.trained.append(round_.step)
                    self.samples_seen += share
                else:
                    self.cancelled.append(round_.step)
                self.after(self, round_)

    @property
    def trainer(self) -> SwarmTrainer:
        """What carries out actions; once the session is in the run."""
        return participant_of(self.session).trainer

    @staticmethod
    def fresh_weights(dtype: torch.dtype) -> list[Tensor]:
        return [p.detach() for p in new_model(0, dtype).parameters()]

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters()]


def participant_of(session: SwarmSession) -> Participant:
    """What the session has made of itself in the run."""
    assert session._participant is not None
    return session._participant


def equal_weights(*scripts: Script) -> bool:
    first, *others = (script.weights for script in scripts)
    return all(a.dtype == b.dtype and torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))

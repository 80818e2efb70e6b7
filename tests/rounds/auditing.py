"""Members of a simulated run that audit: what they find is made up, of honest results and of others."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from distro_optim.coordinator.model import Hub
from distro_optim.coordinator.rules.checkpoints import hub_of_peers
from distro_optim.strategy.rounds import actions as act
from distro_optim.verify.recompute import Agreement, Evidence
from rounds.simulator import Member, World

TELLING = 400
TOTAL = 1000


def evidence(siding: float, *, agree: float | None = None) -> Evidence:
    """What test 1 would find in a result whose telling signs side with its batch at this share."""
    assigned, common = int(siding * TELLING), int(0.7 * (TOTAL - TELLING))
    agreeing = assigned + common if agree is None else int(agree * TOTAL)
    return Evidence(
        assigned=Agreement(agreeing, TOTAL),
        control=Agreement(TELLING - assigned + common, TOTAL),
        only_assigned=min(assigned, agreeing),
        only_control=TELLING - assigned,
        sent=TOTAL,
        expected=TOTAL,
    )


class AuditedWorld(World):
    """A run with audits.

    Attributes:
        fraction: of the results that are audited.
        riders: numbers of members that train nothing.
    """

    def __init__(self, fraction: float, **settings: Any) -> None:
        self.fraction = fraction
        self.checkpoint = Hub(hub_of_peers(audit_fraction=fraction))
        self.riders: set[int] = set()
        self.results: dict[tuple[int, bytes], float] = {}
        super().__init__(**settings)

    def has_trained(self, step: int, key: bytes) -> bool:
        """Whether the owner of a public key trained its batch of a step."""
        member = next(member for member in self.members if member.key.public == key)
        return not isinstance(member, Auditor) or member.has_trained(step)


class Auditor(Member):
    """Audits as it is asked to. The first one hosts."""

    def __init__(self, world: AuditedWorld, number: int, **settings: Any) -> None:
        self.audited_world = world
        self.number = number
        self.settled: list[act.AuditSettled] = []
        super().__init__(world, number, **settings)

    @override
    def carry_out(self, action: act.Action) -> None:
        match action:
            case act.AuditResults():
                self.audit(action)
            case act.AuditSettled(trainer=trainer, passed=passed):
                self.settled.append(action)
                client = self.identity_of_key(trainer)
                if self.number == 1 and not passed and client != self.id:
                    self.world.host.ban(trainer)
                    self.world.host.kick(client)
            case _:
                super().carry_out(action)

    def identity_of_key(self, public: bytes) -> Any:
        return next(member.id for member in self.world.members if member.key.public == public)

    def audit(self, action: act.AuditResults) -> None:
        draw = self.world.rng
        for each in action.audited:
            trained = self.audited_world.has_trained(action.of_step, each.trainer)
            # All auditors see the same result; what they see of it hardly depends on their arithmetic.
            seen = self.audited_world.results.setdefault(
                (action.of_step, each.trainer), draw.gauss(0.66 if trained else 0.5, 0.05)
            )
            found = evidence(seen + draw.gauss(0, 0.005))
            own = None if action.own is None else evidence(draw.gauss(0.66, 0.05))
            self.answer(action.of_step, each.trainer, found, own)

    def answer(self, step: int, trainer: bytes, found: Evidence, own: Evidence | None) -> None:
        self.do(self.rounds.audited(step, trainer, found, own, self.world.now))

    def has_trained(self, step: int) -> bool:
        """Whether it trained its own batch of a step."""
        return self.number not in self.audited_world.riders

    @property
    def named(self) -> set[bytes]:
        """Peers that have failed."""
        return {settled.trainer for settled in self.settled if not settled.passed}

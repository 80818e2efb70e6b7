"""How the place of the weights changes during a run.

Rules: PsycheFoundation/psyche, ``shared/coordinator/src/coordinator.rs``. While a client of the last epoch is left,
joiners get the weights from peers; when all are gone, only a stored copy remains. The kinds come in pairs::

    storage     peers
    Hub         P2P
    Gcs         P2PGcs
    Dummy       P2P         (on the way to the peers only)
"""

from __future__ import annotations

import re
from typing import Final

from ..model import P2P, Checkpoint, DummyCheckpoint, Gcs, Hub, HubRepo, P2PGcs
from ..types import Coordinator

__all__ = [
    "SHARED_BY_PEERS",
    "TRUSTING_PEERS",
    "audit_fraction_of",
    "audits_momentum",
    "believes_host",
    "hub_of_peers",
    "is_run_of_psyche",
    "is_shared_by_peers",
    "is_with_peers",
    "shared_checkpoint",
    "stored_checkpoint",
    "uploaded_checkpoint",
]

SHARED_BY_PEERS: Final = HubRepo("distro_optim/shared-by-peers")
"""Stands where a run of Psyche names its weights. The coordinator's rules turn ``P2P`` into ``Hub`` in an epoch without
any client of the epoch before. Under this name that means: the first client of the list has the weights."""

TRUSTING_PEERS: Final = HubRepo(SHARED_BY_PEERS.repo_id, "trust-peers")
"""The same, in a run whose host does not claim that its weights are right; see :func:`believes_host`."""

_SETTINGS: Final = re.compile(r"(?P<trust>trust-peers)?(?:(?(trust),)audit-(?P<audit>[0-9.e-]{1,24}))?")
"""What such a run says about itself in the place of a revision."""

_MOMENTUM: Final = "0"
"""Before the share that is audited, in a run that audits momenta, too. A number does not begin with a zero and another
digit by itself, and builds that know of test 1 alone read the same number: they train along, and audit by that."""


def hub_of_peers(*, trust_peers: bool = False, audit_fraction: float = 0.0, audit_momentum: bool = False) -> HubRepo:
    """What stands where a run of Psyche names its weights, in a run of our own kind.

    Args:
        trust_peers: the host does not claim that its weights are right.
        audit_fraction: of the results of a round that are audited, 0 to 1.
        audit_momentum: by test 2, too; without a share that is audited it means nothing.
    """
    settings = [TRUSTING_PEERS.revision] if trust_peers and TRUSTING_PEERS.revision is not None else []
    settings += [f"audit-{_MOMENTUM if audit_momentum else ''}{audit_fraction!r}"] if audit_fraction else []
    return HubRepo(SHARED_BY_PEERS.repo_id, ",".join(settings) or None)


def is_with_peers(checkpoint: Checkpoint) -> bool:
    """Whether a peer of the last epoch has the weights, so that joiners ask for them."""
    return isinstance(checkpoint, P2P | P2PGcs)


def is_shared_by_peers(checkpoint: Checkpoint) -> bool:
    """Whether the run has no storage for its weights, so that a client without them must ask a peer."""
    return _settings_of(checkpoint) is not None


def believes_host(checkpoint: Checkpoint) -> bool:
    """Whether the weights of the host of such a run count, if it trains, whatever the others report."""
    settings = _settings_of(checkpoint)
    return settings is not None and not settings[0]


def audit_fraction_of(checkpoint: Checkpoint) -> float:
    """The share of the results of a round that the peers of such a run audit, 0 to 1; 0 in any other run."""
    settings = _settings_of(checkpoint)
    return 0.0 if settings is None else settings[1]


def audits_momentum(checkpoint: Checkpoint) -> bool:
    """Whether the peers of such a run commit to their momenta, and audit each other by test 2, too."""
    settings = _settings_of(checkpoint)
    return settings is not None and settings[1] > 0 and settings[2]


def _settings_of(checkpoint: Checkpoint) -> tuple[bool, float, bool] | None:
    """Whether most peers are believed, the share that is audited, and whether momenta are; None if the run is none of
    our own kind."""
    match checkpoint:
        case Hub(repo) | P2P(repo) if repo.repo_id == SHARED_BY_PEERS.repo_id:
            found = _SETTINGS.fullmatch(repo.revision or "")
            if found is None or repo.revision == "":
                return None
            said = found["audit"] or "0"
            try:
                fraction = float(said)
            except ValueError:
                return None
            momentum = said.startswith(_MOMENTUM) and said[1:2].isdigit()
            return (found["trust"] is not None, fraction, momentum) if 0 <= fraction <= 1 else None
    return None


def is_run_of_psyche(state: Coordinator) -> bool:
    """Whether a run is one of Psyche's, and not of our own kind, in which nobody but the peers has the weights."""
    return not is_shared_by_peers(state.model.checkpoint)


def shared_checkpoint(present: Checkpoint) -> Checkpoint:
    """After an epoch: the peers have the weights."""
    match present:
        case Hub(repo) | DummyCheckpoint(repo):
            return P2P(repo)
        case Gcs(repo):
            return P2PGcs(repo)
    return present


def stored_checkpoint(present: Checkpoint) -> Checkpoint:
    """No peer is left: the stored weights."""
    match present:
        case P2P(repo):
            return Hub(repo)
        case P2PGcs(repo):
            return Gcs(repo)
    return present


def uploaded_checkpoint(present: Checkpoint, uploaded: Checkpoint) -> Checkpoint:
    """After an upload. A run that shares by peers keeps doing so and remembers the new storage of either kind;
    a run that loads from storage accepts only storage of its own kind. Anything else changes nothing.
    """
    match present, uploaded:
        case (P2P() | P2PGcs(), Hub(repo)):
            return P2P(repo)
        case (P2P() | P2PGcs(), Gcs(repo)):
            return P2PGcs(repo)
        case (Hub(), Hub()) | (Gcs(), Gcs()):
            return uploaded
    return present

"""How the place of the weights changes during a run.

Rules: PsycheFoundation/psyche, ``shared/coordinator/src/coordinator.rs``. While someone of the last epoch is left,
joiners get the weights from peers; a stored copy is what remains when all are gone. The kinds come in pairs::

    storage     peers
    Hub         P2P
    Gcs         P2PGcs
    Dummy       P2P         (on the way to the peers only)
"""

from __future__ import annotations

from ..model import P2P, Checkpoint, DummyCheckpoint, Gcs, Hub, P2PGcs

__all__ = ["shared_checkpoint", "stored_checkpoint", "uploaded_checkpoint"]


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
    a run that loads from storage takes only storage of its own kind. Whatever else is said changes nothing.
    """
    match present, uploaded:
        case (P2P() | P2PGcs(), Hub(repo)):
            return P2P(repo)
        case (P2P() | P2PGcs(), Gcs(repo)):
            return P2PGcs(repo)
        case (Hub(), Hub()) | (Gcs(), Gcs()):
            return uploaded
    return present

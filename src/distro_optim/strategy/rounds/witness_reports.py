"""What a client reports to the coordinator, made of what it knows of its rounds. No I/O.

Rules: PsycheFoundation/psyche, ``shared/client/src/state/{witness,warmup,steps}.rs``.
"""

from __future__ import annotations

from ...coordinator.rules.consensus import check_worker, trainer_scores, witness_quorum
from ...coordinator.rules.probation import newcomers_report, on_probation
from ...coordinator.types import CommitteeProof, Coordinator, MerkleRoot, NodeIdentity, Witness, WitnessProof
from ...errors import CoordinatorError
from ...verify.merkle import merkle_root
from .round_state import RoundState

__all__ = ["health_checks", "warmup_witness", "witness_report"]


def witness_report(current: RoundState, previous: RoundState | None) -> Witness | None:
    """Our report: elected in ``current``, it is about the round before. None if we are not elected.

    A client that knows nothing of the round before, since it joined in between, does not report: an empty report would
    say that nobody took part. One on probation only says that it has finished.
    """
    proof = current.witness_proof
    if current.is_newcomer:
        return newcomers_report(proof, current.selection.seed)
    if not proof.witness:
        return None
    if previous is None:
        return Witness(proof) if current.height == 0 else None
    return Witness(
        proof,
        previous.participant_bloom,
        previous.broadcast_bloom,
        MerkleRoot(merkle_root(previous.broadcasts)),
    )


def warmup_witness(index: int) -> Witness:
    """The report of the client at ``index`` that everybody is ready. Every client sends one; nobody is elected."""
    return Witness(WitnessProof(position=index, index=index, witness=False))


def health_checks(
    state: Coordinator, finished: RoundState, before: RoundState | None, me: NodeIdentity
) -> tuple[tuple[NodeIdentity, CommitteeProof], ...]:
    """Clients that did no work, as the witnesses of the round ``finished`` say about the round ``before`` it.

    Names only clients that had work to do. (Psyche also names those that got no work because there were fewer samples
    than clients, and has them dropped.) Nobody on probation is named: nobody waits for those, and a client that is
    dropped comes again and wants an epoch to end for it. A client that the coordinator could not judge is not named:
    for one such check it would refuse the whole message.
    """
    elected = finished.witness_proof.witness
    if not elected or finished.height < 1 or state.epoch_state.first_round or before is None:
        return ()
    round_ = state.previous_round
    if round_ is None:
        return ()
    try:
        quorum = witness_quorum(state.config.witness_nodes, len(round_.witnesses))
    except CoordinatorError:
        return ()  # there are no reports, so nobody can be judged by them
    worked = set(before.assignments.values())
    newcomers = on_probation(state)
    had_work = [
        (index, client.id)
        for index, client in enumerate(state.epoch_state.clients)
        if client.id != me and client.id in worked and index not in newcomers
    ]
    scores = trainer_scores([client for _, client in had_work], round_.witnesses)
    idle = []
    for (index, client), score in zip(had_work, scores, strict=True):
        if score >= quorum:
            continue
        try:
            proof = finished.selection.get_committee(index)
            check_worker(state, client, proof)
        except CoordinatorError:
            continue
        idle.append((client, proof))
    return tuple(idle)

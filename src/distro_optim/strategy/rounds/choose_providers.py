"""Which peers a client asks for the run's model before an epoch, and when it stops asking and gives its own. No I/O."""

from __future__ import annotations

from collections.abc import Collection

from ...comm.model_exchange import Patience
from ...coordinator.rules.checkpoints import is_shared_by_peers, is_with_peers
from ...coordinator.rules.probation import regular_clients
from ...coordinator.types import Coordinator, NodeIdentity
from .actions import Initialize
from .trust.votes import Electorate

__all__ = ["whom_to_ask"]


def whom_to_ask(
    state: Coordinator,
    me: NodeIdentity,
    *,
    right: Collection[bytes],
    electorate: Electorate,
    has_standing: bool,
    ready: Collection[NodeIdentity],
    had_the_weights: bool,
    vain_attempts: int,
) -> Initialize:
    """How the model is to be loaded for the epoch of ``state``, in whose list ``me`` is.

    Args:
        state: of the coordinator, in warm-up.
        me: our own identity.
        right: public keys of peers whose weights were found right where ours were not.
        electorate: whose word about weights counts.
        has_standing: we have trained in this run: then we take no weights from others than those.
        ready: the clients that have said in this warm-up that they have the weights.
        had_the_weights: ours were once those of the run, and the run is one whose peers share them.
        vain_attempts: in a row, over all warm-ups, in which nobody gave us the model.
    """
    clients = [client.id for client in state.epoch_state.clients]
    regular = regular_clients(state) - {me}
    # Nobody on probation has had the weights of an earlier epoch, unless there is nobody else.
    others = [client.p2p_identity for client in clients if client != me and (client in regular or not regular)]
    healing = [peer for peer in right if peer in others]
    # Somebody who has only just come may give whatever it likes.
    first = [peer for peer in electorate.deciding if peer in others]
    others = first if has_standing and first else [*first, *others]
    checkpoint = state.model.checkpoint
    shared = is_with_peers(checkpoint)
    if is_shared_by_peers(checkpoint) and not shared:
        # No client is left of an earlier epoch: the first of the list has the weights. A client that lost them on the
        # way does not know whether the others still have them.
        shared = clients[0] != me or had_the_weights
    attempts_left = _attempts_left(clients, me, ready, vain_attempts) if had_the_weights else None
    gives_its_own = electorate.host == me.p2p_identity and had_the_weights
    asks = (healing or shared) and attempts_left != 0 and not gives_its_own
    return Initialize(
        epoch=state.progress.epoch,
        step=state.progress.step,
        checkpoint=checkpoint,
        providers=tuple(dict.fromkeys([*healing, *others])) if asks else (),
        patience=Patience.SHORT if attempts_left == 1 else Patience.LONG,
    )


def _attempts_left(
    clients: list[NodeIdentity], me: NodeIdentity, ready: Collection[NodeIdentity], vain_attempts: int
) -> int:
    """How often we ask the others until we say that our weights are the run's.

    This happens when all clients have found their weights to be wrong, for example after a partition in which each
    missed a different result: then nobody shares any. The first of the list gives up asking first, the second next. A
    client that says it is ready has the weights, or lies: for each of those we ask once more. If two clients give
    theirs at once, or one had the right ones and could not be reached, the reports on weights decide.
    """
    before_us = {*clients[: clients.index(me)], *ready} - {me}
    return max(0, len(before_us) + 1 - vain_attempts)

"""A wallet's part in a run, as a user describes it: names, addresses and keys in text become what the client takes."""

from __future__ import annotations

from collections.abc import Callable

from ...comm.signing import SecretKey
from ..formats.account import account_size
from ..solana_clusters import cluster_of
from ..solana_deployments import deployment_of
from ..solana_options import SolanaOptions
from ..types import NodeIdentity
from .client import SolanaCoordinator
from .fees import FeeMeter
from .instructions import check_claimer
from .programs import Programs, optional_key, parse_key
from .wallet import derive_peer_secret, find_wallet

__all__ = ["Participation", "programs_of"]


def programs_of(options: SolanaOptions) -> Programs:
    """The deployment: a preset or a file, but for what is said besides.

    Raises:
        ConfigurationError: there is no such deployment, one of the ids is no key, or there is no such version.
    """
    known = deployment_of(options.programs)
    version = options.account_version
    if version is not None:
        account_size(version)  # says which there are
    return Programs(
        parse_key(options.coordinator_program or known.coordinator, "coordinator_program"),
        parse_key(options.authorizer_program or known.authorizer, "authorizer_program"),
        parse_key(options.treasurer_program or known.treasurer, "treasurer_program"),
        known.account_version if version is None else version,
    )


class Participation:
    """Reads the wallet and checks the rest; no network.

    Args:
        run_id: name of the run.
        options: the cluster, the wallet and the limits.

    Raises:
        ConfigurationError: no run can have this name, the wallet cannot be used, or an option makes no sense.
    """

    def __init__(self, run_id: str, options: SolanaOptions) -> None:
        self.run_id = run_id
        self._options = options
        self._programs = programs_of(options)
        self._programs.instance(run_id)  # says if no run can have this name
        account_size(self._programs.account_version)  # says if we do not know such runs
        self._claimer = optional_key(options.claimer, "claimer")
        check_claimer(self._programs, self._claimer)
        self._cluster = cluster_of(options.cluster, options.rpc, options.websockets)
        self._authorizer = optional_key(options.authorizer, "authorizer")
        self._join_authority = optional_key(options.join_authority, "join_authority")
        self._main_authority = optional_key(options.main_authority, "main_authority")
        FeeMeter(options.max_fees, options.compute_unit_price)  # says if the limit pays for nothing
        self._wallet = find_wallet(str(options.wallet))

    @property
    def peer_key(self) -> SecretKey:
        """The key by which peers know the wallet's owner, if it is given no other."""
        return SecretKey(derive_peer_secret(self.run_id, self._wallet))

    def identity(self, peer: bytes) -> NodeIdentity:
        """Ours in the run: the wallet, and the public key of our endpoint."""
        return NodeIdentity(bytes(self._wallet.pubkey()), peer)

    def coordinator(self, peer: bytes, *, on_note: Callable[[str], None] | None = None) -> SolanaCoordinator:
        """The client of the chain, not used yet.

        Args:
            peer: public key of our endpoint.
            on_note: told what people should know, in a sentence.
        """
        return SolanaCoordinator(
            self._cluster.rpc,
            self._cluster.websockets,
            self._wallet,
            self.run_id,
            peer_key=peer,
            programs=self._programs,
            authorizer=self._authorizer,
            claimer=self._claimer,
            join_authority=self._join_authority,
            client_version=self._options.client_version,
            main_authority=self._main_authority,
            max_fees=self._options.max_fees,
            compute_unit_price=self._options.compute_unit_price,
            on_note=on_note,
        )

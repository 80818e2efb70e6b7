"""A run of Psyche that is coordinated by a program on Solana.

==================  ==========================================================================
``programs``        which programs, on which cluster, and the addresses of their accounts
``small_accounts``  what stands in the accounts beside the run's own
``arguments``       the instructions of the programs and what each of them takes
``instructions``    one builder for each instruction of a client or an operator
``program_errors``  the numbers of errors, their names and what to do
``decisions``       what follows from what was read, without I/O
``wallet``          key files, and the key that peers know
``fees``            what it costs
``rpc``             requests to nodes of the cluster
``sending``         transactions on their way
``feed``            the newest copy, by subscription and by reading
``finding``         whether there is such a run, and whether this wallet may join it
``settings``        what an operator changes of a halted run
``steps``           transactions that are planned, and what they cost
``treasury``        runs whose points are paid, and what a wallet can claim
``operating``       what an operator does with a run
``viewing``         what anybody can see of a run
``client``          all of it: a participant of a run
``participation``   that participant, made of what a user says
==================  ==========================================================================

Everything here needs solders, which brings Solana's keys, messages and transactions:
``pip install 'distro-optim[solana]'``.
"""

from __future__ import annotations

from importlib.util import find_spec

from ...errors import MissingDependencyError

if find_spec("solders") is None:
    raise MissingDependencyError("a coordinator on Solana needs solders: pip install 'distro-optim[solana]'")

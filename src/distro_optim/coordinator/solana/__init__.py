"""A run of Psyche that is coordinated by a program on Solana.

==================  ==========================================================================
``programs``        which programs, on which cluster, and the addresses of their accounts
``small_accounts``  what stands in the accounts beside the run's own
``arguments``       the instructions of the programs and what each of them takes
``instructions``    one builder for each instruction of a client or an operator
``program_errors``  the numbers of errors, their names and what to do
==================  ==========================================================================

Everything here needs solders, which brings Solana's keys, messages and transactions:
``pip install 'distro-optim[solana]'``.
"""

from __future__ import annotations

from importlib.util import find_spec

from ...errors import MissingDependencyError

if find_spec("solders") is None:
    raise MissingDependencyError("a coordinator on Solana needs solders: pip install 'distro-optim[solana]'")

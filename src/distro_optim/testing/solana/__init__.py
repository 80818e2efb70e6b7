"""A cluster of Solana in this process, with Psyche's programs on it: nothing has to be installed, paid or waited for.

======================  ==========================================================================================
``validator``           accounts, fees, a clock that you move: :class:`~.validator.Validator`
``transactions``        what it takes and what it answers
``ledger``              accounts, and what a program may do with them
``anchor``              the checks that Anchor makes before a program of Psyche runs
``coordinator_twin``    the rules of Psyche's coordinator program: :class:`~.coordinator_twin.CoordinatorTwin`
``coordinator_calls``   that program's instructions, with the accounts they name
``authorizer_calls``    the same of the authorizer
``treasurer_calls``     and of the treasurer
``rpc_methods``         what a node answers to requests
``server``              the cluster on a port of this machine, with faults to inject
``native_programs``     creating accounts, moving lamports and tokens
======================  ==========================================================================================

The programs are twins in Python, checked against recordings of the real ones: same errors, same accounts.
"""

from __future__ import annotations

from ...coordinator import solana as _solana  # noqa: F401 - says what to install if solders is missing

"""A client of Psyche's as far as its peers and its coordinator can tell, without I/O, for tests of mixed runs.

:class:`PsycheTwin` takes the inputs of :class:`~distro_optim.strategy.rounds.rounds.Rounds` and gives the same actions,
so whatever drives the one drives the other. What it decides follows PsycheFoundation/psyche,
``shared/client/src/{client,state/steps,state/train,state/witness}.rs``, quirks included:

==========================  ========================================================================================
senders                     it knows those of the last warm-up that it saw, and hears nothing before it is initialised
rounds                      messages about the current round and the one before; nothing is kept for the next
consensus                   candidates in order of arrival; of equals the last
results                     any numbers, infinities and NaN included; only the commitment is compared
"finished"                  once, when it has trained and has every result of the round before; until then it waits
repetition                  one message every 10 s, in turn, each time with another nonce
health check                about every client that the witnesses did not see, itself included
dropped                     it waits without another ``Join``
end of the run              an error, since "finished" follows no step of its machine
==========================  ========================================================================================

Where it is:

===============  ===================================================================================================
``twin``         :class:`PsycheTwin`: inputs, actions, and the steps of its machine
``rounds``       what it keeps of a round, and what follows from that
``messages``     which messages it takes
``voice``        what it says, and says again
``wild_values``  results as clients of Psyche's can send them
===============  ===================================================================================================
"""

from __future__ import annotations

from .twin import PsycheTwin
from .voice import REBROADCAST_SECONDS
from .wild_values import with_wild_values

__all__ = ["REBROADCAST_SECONDS", "PsycheTwin", "with_wild_values"]

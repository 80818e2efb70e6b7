"""A client's side of a coordinator: one interface, whatever lies between.

==============  ==============================================================
``interface``   what a participant can do with the coordinator of its run
``remote``      ... over a stream of bytes, by Psyche's TCP protocol
``opening``     ... whose links are opened here, or it is said why not
``connection``  one of them: a stream and the protocol on it
``joining``     asking to be in a run that one has looked at
``state_feed``  between a link and who reads its states
==============  ==============================================================

:class:`~.remote.RemoteCoordinator` speaks Psyche's protocol; :class:`~..server.in_process.InProcessClient` needs no
network. Both pass the same suite, :mod:`distro_optim.testing.coordinator`.
"""

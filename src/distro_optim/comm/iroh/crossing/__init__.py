"""Shorter ways over the border between Python and the ``iroh`` package's Rust. No I/O.

==============  ===========================================================
``calls``       a call that cannot fail makes one object, not three
``values``      bytes and counters cross in one piece, not field by field
``signatures``  signatures are checked there, in little more than half the time
==============  ===========================================================

Each function of the first two gives replacements for private names of the generated module, or raises if that is not as
this folder knows it; :mod:`~distro_optim.comm.iroh.ffi` puts them there. The last one gives a function for
:mod:`~distro_optim.comm.signing`.
"""

"""What carries out a step: engines, which agree in the weights, and the choice among them.

===============  =======================================================================================
``base``         :class:`Engine`: the seam
``blocks``       :class:`BlockEngine`: by torch, block by block, on any device
``parts``        which classes do the two halves of a step for the blocks of a batch
``long_blocks``  blocks joined to longer ones, for kernels
``shifting``     the lookahead by torch
``looking``      which gradients are finite, by several threads
``deferred``     an update of which the device knows sooner than the host what it speaks of
``transfer``     updates between main memory and devices
``triton``       a folder: the kernels for GPUs, and the engine that launches them
``choice``       which engine an optimizer gets
===============  =======================================================================================

The compiled kernels of :mod:`distro_optim.compress.fast` are no engine of their own: on a CPU they are what
:class:`BlockEngine` does a block with, so that it shares out blocks among threads in the same way with and without
them.
"""

from __future__ import annotations

from .base import Engine, Intake
from .blocks import BlockEngine
from .choice import ENGINES, EngineName, check_engine, make_engine

__all__ = ["ENGINES", "BlockEngine", "Engine", "EngineName", "Intake", "check_engine", "make_engine"]

"""Both halves of a step as Triton kernels, for GPUs: one launch for all tensors of a batch. ``engine="triton"``.

Imported only if chosen: Triton comes with PyTorch for CUDA and with ``distro-optim[gpu]``, and is not needed elsewhere.

==============  =====================================================================================
``engine``      :class:`~.engine.TritonEngine`: the kernels where they are for a batch, torch elsewhere
``trial``       one block by both, before the first step
``batches``     one batch: its tables, and the two halves of a step without a look at the device
``tables``      where tiles and tensors lie, and the bases, on the device
``lists``       tables of tensors that are worked on element by element
``launching``   the kernels as functions of tensors: what they are compiled for
``bounds``      why two words of 32 bits hold every sum, and which tiles the kernels are for
``checking``    kernel: which gradients are finite
``extracting``  kernel: gradients to coefficients
``merging``     kernel: everybody's coefficients to weights, exactly
``shifting``    kernels: the lookahead alone, and its undoing
``tiles``       in kernels: where a tile lies
``products``    in kernels: products with the basis, on tensor cores
``selecting``   in kernels: the largest coefficients of a tile
==============  =====================================================================================
"""

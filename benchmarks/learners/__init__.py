"""Workers in one process that train in lock-step, one file for each way of exchanging what they learn.

===============  =====================================================================================
``base``         what is compared, the interface of all workers, gradients
``tasks``        models and data: bytes of source code, digits by convolutions or by a transformer
``averaged``     AdamW and Muon on averaged gradients, as with DistributedDataParallel
``swarm``        ``DisTrO``, an optimizer for each worker
``plain``        its plain twin, ``distro_optim.optim.reference``
``diloco``       AdamW on each worker for many steps, then a step of Nesterov's momentum on the mean
``sparse_loco``  the same, of which the largest are sent with two bits, and the rest is remembered
``varied``       the recipe in plain PyTorch, with what was tried beyond it
``beyond``       what was tried: the methods of the setting "bytes, beyond"
``results``      finished runs, each in a file of its own
``settings``     which methods run with which rates in which setting
``report``       what finished runs say: a table, curves, a picture
===============  =====================================================================================
"""

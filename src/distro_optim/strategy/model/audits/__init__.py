"""Audits in the thread that trains: gradients beside the training, and the momentum that others may ask for.

===========  =============================================================================================
``results``  others' results are audited by test 1, without a trace in the training; what comes in goes here
``momenta``  likewise by test 2: what others have opened is computed again, and ourselves now and then
``keeper``   our momentum of the last steps, committed to and shown, in another thread
===========  =============================================================================================
"""

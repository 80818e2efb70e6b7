"""What a client decides from what it has read. No I/O, no clock, no keys.

=====================  =======================================================================
``newest``             which of many copies of an account is the newest
``ticking``            when to say that time has passed
``checkpoint_format``  whether the run's program understands a checkpoint as it is written now
=====================  =======================================================================
"""

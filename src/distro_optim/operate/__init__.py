"""``distro-optim run``: what there is to see of the runs that a blockchain coordinates.

===========  =======================================
``command``  its options
``looking``  what it does
===========  =======================================
"""

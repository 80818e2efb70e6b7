"""``distro-optim run``: looks at runs that a blockchain coordinates, and asks servers of this machine.
``distro-optim localnet``: has such a blockchain on this machine. ``distro-optim ledger``: checks points.

=============  ====================================================================
``command``    its options
``looking``    what there is to see of runs on Solana
``following``  one of them as it goes on
``changing``   what an operator does with one
``run_file``   the file in which an operator describes it
``asking``     pause, resume, and other settings for a run that is hosted here
``ledger``     who has how many points, and whether the host changed nothing afterwards
``ticket``     ``distro-optim ticket``: a fresh ticket of a run, from any of its peers
``localnet``   a simulated cluster with a run, and what to type to use it
=============  ====================================================================
"""

"""``distro-optim serve``: a coordinator of its own process, and training data beside it.

============  ===========================================
``command``   its options
``serving``   files, server and console put together
``console``   what it shows: a live table, lines, or JSON
``status``    how the run is doing
``watch``     what its page and Prometheus see of it
``guests``    who may join, from files that may change
============  ===========================================
"""

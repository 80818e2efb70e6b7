"""Who is believed about the run's weights where the reports on them differ. Nothing here does I/O.

================  ===================================================================
``standing``      who has trained in this run, and so may vote on its weights
``votes``         the rule: which of several reports on the weights of a step is right
``succession``    who hosts when the host is gone: rules alone, which nothing calls yet
================  ===================================================================
"""

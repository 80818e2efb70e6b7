"""Several processes of one machine as one peer: what they tell each other.

================  ============================================================================
``local_ranks``   their group, in which one of them, the leader, speaks for all
``one_peer``      the leader's access to a run, and that of the others, who do as it does
``holders``       who has the tensors of a model: each process all of them, or all together
================  ============================================================================
"""

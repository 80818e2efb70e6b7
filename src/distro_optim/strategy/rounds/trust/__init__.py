"""Who is believed about the run's weights where the reports on them differ. Nothing here does I/O.

=======================  ===================================================================
``standing``             who has trained in this run, and so may vote on its weights
``votes``                the rule: which of several reports on the weights of a step is right
``succession``           who hosts when the host is gone: the rules
``voter_lists``          ... who votes, as long as there is a host
``succeeding``           ... one peer's part in it: when the rules are used
``succession_outcomes``  ... and what is to be done
``estate``               ... and what a host leaves to the next one
``saved_step``           ... and where a run goes on that was saved
``succession_words``     ... and what people are told about it
``succession_messages``  ... what peers say to each other about it, and the bytes
=======================  ===================================================================
"""

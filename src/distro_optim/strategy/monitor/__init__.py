"""What people and machines see of a run: sentences, numbers, a page. Nothing here has a say in the run.

=================  ==================================================================
``narration``      the sentences of a peer: how it comes in, and who comes and leaves
``summary``        what there is to say at the end
``figures``        how it goes in numbers: loss, tokens a second, bytes, role
``metrics``        the same for Prometheus
=================  ==================================================================
"""

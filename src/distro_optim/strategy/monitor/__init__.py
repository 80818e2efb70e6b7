"""What people and machines see of a run: sentences, numbers, a page. Nothing here has a say in the run.

=================  ==================================================================
``narration``      the sentences of a peer: how it comes in, and who comes and leaves
``summary``        what there is to say at the end
``bars``           progress bars that are in the way of sentences
``shell``          the line with which others join
``figures``        how it goes in numbers: loss, tokens a second, bytes, role
``metrics``        the same for Prometheus
``page``           the same in a browser, live; ``page.html`` is what it shows
``picture``        what that page shows, as JSON
``windows``        opens page and metrics for a session
``history``        how the run has gone so far, in few points
=================  ==================================================================
"""

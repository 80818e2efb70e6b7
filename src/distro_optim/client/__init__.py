"""A client that needs no script: it joins a run of Psyche's and trains what the run says.

================  ============================================================================================
``command``       ``distro-optim join``: its options, also from the environment, as Psyche's client has them
``options``       what was asked for
``joining``       the whole of it, from connecting to leaving
``preparing``     the run's model and data, refused before joining where they are not available
``first_model``   a model that only peers have, downloaded before there is one to compare it with
``tokenizers``    how many tokens a tokenizer knows
``recording``     everybody's results and the first weights in a folder, for ``replay``
``replay``        a recorded run once more, compared with its clients' checkpoints
``replaying``     ``distro-optim replay``: that, from the command line
``verify``        test 1 on a recorded run: do results agree with the batches that their senders were given
``verifying``     ``distro-optim verify``: that, from the command line
``keeping``       where a client keeps its model, told before it trains
``training``      rounds of a language model
``devices``       where it computes; several of them as one client
``dummy``         test runs without any tensors
``display``       how it goes as a live picture, lines, or JSON
``doctor``        ``distro-optim doctor``: can this machine train with others, and what must be done?
``probing``       what it looks at
``findings``      what it makes of that
``round_cost``    bytes and seconds of a round
================  ============================================================================================

``several`` is a client of several processes that hold a model together.
"""

"""Training data: token sequences by data index, whatever they come from.

The seam is :class:`~.provider.TokenProvider`; :mod:`.opening` makes the one that a run's ``data_location`` asks for.

==================  ==================================================
``provider``        the class, and the checks of what is given
``opening``         from a ``data_location`` to a provider
``dummy``           zeros
``token_files``     raw token files on the own disk
``sidecar``         what is known of a token file, in a file beside it
``sequences``       where in token files a sequence lies
``parquet``         packed sequences with labels, as for finetuning
``mixture``         other providers in given proportions
``mixture_file``    the JSON file that lists them
``mixture_index``   which of them gives which sample
``shuffle``         Psyche's order: ChaCha8 and Rust's shuffles
``data_file``       ``data.toml``: what a data server hands out
``dataset``         sequences as a PyTorch data set
``lightning``       a data module for a Lightning ``Trainer``
==================  ==================================================

``web`` are token files behind web servers, ``remote`` is a TCP data server with its client, ``mirrors`` are several
places of the same data, ``making`` turns texts into token files.
"""

"""Training data: token sequences by data index, whatever they come from.

The seam is :class:`~.provider.TokenProvider`; :mod:`.opening` makes the one that a run's ``data_location`` asks for.

===================  ======================================================================================
``provider``         the class, and the checks of what is given
``dummy``            zeros
``token_files``      raw token files on the own disk; ``sidecar``: what is known of one, beside it
``http``             the same behind web servers
``mixture``          others in given proportions
``parquet``          packed sequences with labels, as for finetuning
``remote``           a TCP data server's client; the server is ``server``, its ``service`` has no sockets
===================  ======================================================================================

Without I/O are ``shuffle`` (ChaCha8 and Rust's shuffles), ``sequences`` (where in files a sequence lies),
``mixture_index``, ``mixture_file``, ``web_files``, ``requests`` and ``service``.

``lightning`` has data sets and a data module for a ``Trainer``. Token files are made of texts by ``tokenizing``, the
command ``distro-optim tokenize``, of ``corpus`` (texts in), ``vocabulary`` (tokenizers) and ``token_writer`` (tokens
out).
"""

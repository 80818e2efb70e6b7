"""iroh-blobs: verified transfer of content-addressed bytes, compatible with iroh-blobs 0.99 (``/iroh-bytes/4``).

Without I/O, from the hash upwards:

=============  ===================================================================
``tree``       BLAKE3 chaining values of chunks, groups and parents
``outboard``   a blob's hash pairs
``ranges``     which chunks
``walk``       in which order
``encoder``    from a blob to the bytes of a response
``decoder``    from the bytes of a response to proven data
``span``       1 MiB of a response taken apart at once
``prefix``     the beginning of a blob verified at the speed of the native package
``request``    the request's bytes
``provider``   a provider's side of one stream
``getter``     a getter's side, and a download that goes from provider to provider
=============  ===================================================================

With I/O:

====================  ==================================================
``store``             what a store promises, and the store in memory
``disk``              blobs in a directory, whole at every moment
``disk_partial``      downloads on disk, kept across a restart
``net``               blobs on a node: serving a store, fetching into it
``switch_interval``   lets the network thread have its turn soon
====================  ==================================================

The wire and the bounds on one page: ``docs/blobs.md``.
"""

"""iroh-blobs: verified transfer of content-addressed bytes, compatible with iroh-blobs 0.99 (ALPN ``/iroh-bytes/4``).

Without I/O, from the hash upwards: :mod:`.tree` (BLAKE3 chaining values), :mod:`.outboard` (a blob's hash pairs),
:mod:`.ranges` (which chunks), :mod:`.walk` (in which order), :mod:`.encoder` and :mod:`.decoder` (bytes of a response),
:mod:`.prefix` (fast verification), :mod:`.request` (the request's bytes), :mod:`.provider` and :mod:`.getter` (one
stream each). With I/O: :mod:`.store` and :mod:`.disk` (where blobs live), :mod:`.net` (streams of a node).
"""

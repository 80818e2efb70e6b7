"""Raw token files behind web servers, read in ranges of bytes.

===========  ==========================================================
``tokens``   the provider
``files``    which files a run's data are, and what servers say of them
``client``   the HTTP client: servers may be slow, broken or lying
===========  ==========================================================
"""

"""Token files made of texts: ``distro-optim tokenize``.

=================  =============================================================
``tokenizing``     the command's work, resumed where it was killed
``corpus``         the texts of a folder, in an order that is the same each time
``vocabulary``     from text to numbers
``token_writer``   a token file written over several lives of a process
=================  =============================================================
"""

"""Plain versions of formats and models, every formula written out, that only tests compare with."""

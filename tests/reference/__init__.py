"""Plain versions of what the package does fast: one tensor at a time, every formula written out."""

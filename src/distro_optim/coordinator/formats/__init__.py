"""What the run state looks like outside of Python.

============  ============================================================================
``text``      ``state.toml`` and JSON
``raw``       the layout in memory of Psyche's programs
``account``   the on-chain account that holds it
``borsh``     what on-chain programs read from instructions, and their small accounts
============  ============================================================================
"""

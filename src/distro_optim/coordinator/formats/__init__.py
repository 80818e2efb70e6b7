"""What the run state looks like outside of Python.

============  ====================================================
``text``      ``state.toml`` and JSON
``raw``       the layout in memory of Psyche's programs; read only
``account``   the on-chain account that holds it; read only
============  ====================================================
"""

"""Runs for training loops of other libraries. Nothing is imported here, since each needs its library.

===============  =====================================================================
``huggingface``  ``transformers.Trainer``, and trainers derived from it such as TRL's
===============  =====================================================================
"""

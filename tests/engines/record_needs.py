"""Compiles all kernels, and writes down what they need: ``PYTHONPATH=src:tests python -m engines.record_needs``.

For whoever has changed a kernel, or has another Triton: the tests compile what is not written down, which takes most
of a minute.
"""

from __future__ import annotations

import json

from engines import ahead_of_time
from engines.test_kernels_compile_for_gpus_that_are_not_here import EXTRACTIONS, MERGES, TARGETS, needs_of

if __name__ == "__main__":
    for target in TARGETS:
        for kind in (*EXTRACTIONS, *MERGES):
            print(target, kind, needs_of(target, kind, None), flush=True)
    ahead_of_time.RECORD.write_text(json.dumps(ahead_of_time.written_down, indent=1, sort_keys=True) + "\n", "utf-8")

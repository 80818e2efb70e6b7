"""What the kernels do in Triton's interpreter; prints all that is found as JSON.

A script, since TRITON_INTERPRET must be set before Triton is imported for the first time. One for all of it: loading
PyTorch and Triton takes longer than most of what is tried.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["DISTRO_OPTIM_FAST"] = "0"

import torch

from engines.counted_bytes import moved_bytes
from engines.interpreted_steps import steps
from engines.interpreted_training import training
from engines.quick_interpreter import replace_the_language_once

if __name__ == "__main__":
    torch.set_num_threads(1)
    replace_the_language_once()
    print(json.dumps({"steps": steps(), "training": training(), "bytes": moved_bytes()}))

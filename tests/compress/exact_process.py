"""Takes the steps of all cases and prints their hashes.

A program of its own: libraries choose their kernels once, when they are loaded, by the environment.
"""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import torch

from compress.exact_cases import BY_RMS, LARGE, SMALL, digest, merged


def main(threads: int, backwards: bool) -> None:
    torch.set_num_threads(threads)
    hashes = []
    for case in (*SMALL, *LARGE, *BY_RMS):
        order = list(range(case.contributors))
        hashes.append(digest(merged(case, order[::-1] if backwards else order)))
    # That the environment had an effect: a product of floats, whose bits depend on the kernel.
    generator = np.random.Generator(np.random.PCG64(5))
    left, right = (generator.integers(-(1 << 23), 1 << 23, (64, 64)).astype(np.float32) for _ in range(2))
    kernel = hashlib.sha256((left @ right).tobytes()).hexdigest()
    print(json.dumps({"hashes": hashes, "kernel": kernel, "capability": torch.backends.cpu.get_cpu_capability()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "backwards")

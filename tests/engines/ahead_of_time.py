"""Compiles the kernels for GPUs that are not here, and reads what they need from what the compiler made.

``ptxas``, ``cuobjdump`` and AMD's LLVM come with Triton. What they said about the present kernels is written down in
:data:`RECORD`, for the compiler takes most of a minute; any other kernel, setting or Triton is compiled.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distro_optim.compress import ParamSpec, make_plan
from distro_optim.compress.engine import triton as kernels
from distro_optim.compress.engine.triton import launching
from distro_optim.compress.engine.triton.extracting import extract_kernel
from distro_optim.compress.engine.triton.merging import merge_kernel
from distro_optim.compress.plan import Batch

TARGETS: Final = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

SHARED_OF_TWO_BLOCKS: Final = {
    "sm_80": 164 * 1024 // 2 - 1024,
    "sm_89": 100 * 1024 // 2 - 1024,
    "sm_90": 228 * 1024 // 2 - 1024,
    "gfx942": 64 * 1024 // 2,
}
"""Bytes that a block may have if a multiprocessor is to hold two: half of what there is, and on NVIDIA's 1 KiB less,
which the system takes for each."""

RECORD: Final = Path(__file__).with_name("needs_of_kernels.json")
"""What the programs need, by the hash of all that they are made from. ``record_needs.py`` writes it."""

_POINTERS: Final = {
    "places": "*i64", "addresses": "*i64", "present": "*i32", "codes": "*u8", "numbers": "*fp32", "first": "i64",
    "index_out": "*i32", "left_out": "*fp32", "spoken": "*i32", "parts": "i32",
    "said": "*i64", "bh": "*i8", "bw": "*i8", "total": "i32", "tensors": "i32",
}  # fmt: skip

_NAMES: Final = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "u8"}


@dataclass(frozen=True)
class Needs:
    """Of a program of a kernel.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread in memory for want of registers.
        shared: bytes of fast memory.
    """

    registers: int
    spilled: int
    shared: int


def batch_of(dtype: torch.dtype, k: int) -> Batch:
    """One of a model with whole tiles of 64 x 64."""
    spec = ParamSpec((256, 256), dtype, torch.device("cpu"), 0, 64, k)
    return make_plan([spec], "padded", arithmetic="exact").batches[0]


def needs_of_extraction(target: str, batch: Batch, how: launching.Extracting, cache: Path | None) -> Needs:
    """What :func:`extract_kernel` needs there; see :func:`_needs` for ``cache``."""
    constants = launching.extract_constants(batch, how, emulate=False, aligned=True)
    value = _NAMES[torch.bool if how.signs else batch.value_dtype]
    return _needs(extract_kernel, constants, {"fh": "*bf16", "fw": "*bf16", "value_out": f"*{value}"}, target, cache)


def needs_of_merge(target: str, batch: Batch, how: launching.Merging, cache: Path | None) -> Needs:
    """What :func:`merge_kernel` needs there; see :func:`_needs` for ``cache``."""
    return _needs(merge_kernel, launching.merge_constants(batch, how, emulate=False, aligned=True), {}, target, cache)


written_down: dict[str, dict[str, int]] = {}
"""What was asked for in this process, by the hashes of :data:`RECORD`."""


def _needs(kernel: Any, constants: dict[str, Any], types: dict[str, str], target: str, cache: Path | None) -> Needs:
    """From the record; else from ``cache``, or compiled and kept there. Without a cache it is compiled in any case."""
    folder = Path(kernels.__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    asked = json.dumps([triton.__version__, kernel.__name__, sorted(constants.items()), target], default=str)
    key = hashlib.sha256(sources + asked.encode()).hexdigest()
    found = None if cache is None else json.loads(RECORD.read_text("utf-8")).get(key)
    if found is None:
        known = None if cache is None else cache / key
        if known is None or not known.exists():
            found = asdict(_compiled(kernel, constants, {**_POINTERS, **types}, target))
            if known is not None:
                known.parent.mkdir(parents=True, exist_ok=True)
                known.write_text(json.dumps(found), "utf-8")
        else:
            found = json.loads(known.read_text("utf-8"))
    written_down[key] = found
    return Needs(**found)


def _compiled(kernel: Any, constants: dict[str, Any], types: dict[str, str], target: str) -> Needs:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # As with tensors that PyTorch allocated.
        attrs={(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if signature[name].startswith("*")},
    )
    made = triton.compile(source, target=TARGETS[target], options={"num_warps": launching.WARPS})
    if TARGETS[target].backend == "hip":
        text = made.asm["amdgcn"]
        return Needs(
            _number(r"\.vgpr_count:\s+(\d+)", text),
            # Some lie in registers of other lanes, which costs no memory.
            _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
            made.metadata.shared,
        )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as room:
        cubin = Path(room) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        done = subprocess.run([str(tool), "-res-usage", str(cubin)], capture_output=True, text=True, check=True)
    text = done.stdout + done.stderr
    return Needs(_number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text), made.metadata.shared)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in {text[-2000:]}"
    return int(found[1])

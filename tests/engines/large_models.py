"""Shapes of the parameters of models that are large enough for a GPU; their tensors are made without memory."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]

GPT2: Shapes = [(50304, 768), (1024, 768)]
for _ in range(12):
    GPT2 += [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
    GPT2 += [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
GPT2 += [(768,), (768,)]
"""124 million parameters, with 100 small tensors among them."""

LLAMA: Shapes = [(128256, 2048)]
for _ in range(16):
    LLAMA += [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
    LLAMA += [(2048,), (2048,)]
LLAMA += [(2048,)]
"""1.2 billion."""

"""serde's postcard format, from the annotations of dataclasses.

====================  =========================================================
``from_annotations``  which codec a type has; the table of all annotations
``codecs``            one small codec per wire type
``varints``           many varints at once
``decoded_values``    what was decoded before, found again by its bytes
====================  =========================================================
"""

from __future__ import annotations

from .from_annotations import (
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    MAX_NESTING,
    U8,
    U16,
    U32,
    U64,
    USIZE,
    Bytes32,
    Bytes64,
    Codec,
    Err,
    Fixed,
    Float,
    Int,
    Limit,
    Ok,
    OnlyVariant,
    Via,
    codec,
    decode,
    encode,
    pull,
    push,
)

__all__ = [
    "F32",
    "F64",
    "I8",
    "I16",
    "I32",
    "I64",
    "MAX_NESTING",
    "U8",
    "U16",
    "U32",
    "U64",
    "USIZE",
    "Bytes32",
    "Bytes64",
    "Codec",
    "Err",
    "Fixed",
    "Float",
    "Int",
    "Limit",
    "Ok",
    "OnlyVariant",
    "Via",
    "codec",
    "decode",
    "encode",
    "pull",
    "push",
]

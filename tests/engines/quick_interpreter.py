"""Triton's interpreter, without what it does again and again: a third of the time of all that it interprets here.

It replaces the functions of Triton's language by its own when a kernel starts, and once more for each function that
the kernel calls. The second time changes nothing: what it would replace is replaced already.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["replace_the_language_once"]


class _Nothing:
    """In place of what a kernel that ends puts back, where nothing was replaced."""

    def restore(self) -> None:
        pass


def replace_the_language_once() -> None:
    """From now on the language is replaced once for each launch, and each module in which functions look it up.

    Versions of Triton that do it otherwise are left as they are.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    language = (interpreter.tl, interpreter.tl.core)
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[tuple[bool, ...]] = set()

    def patch_once(function: Any) -> Any:
        modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        seen = tuple(module in modules for module in language)
        if seen in replaced:
            return _Nothing()
        replaced.add(seen)
        return patch(function)

    def launched(executor: Any, *args: Any, **options: Any) -> Any:
        replaced.clear()
        try:
            return launch(executor, *args, **options)
        finally:
            replaced.clear()  # the end of a launch puts the language back

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launched

"""What was tried beyond the recipe: methods of two settings of bytes. The page is ``docs/benchmarks/beyond.md``.

Those of :data:`CONFIRMED` are of ``DisTrO`` itself and send as many bytes as the recipe, or up to 6 % more. Those of
:data:`TRIED` were looked at with one seed for 100 steps.
"""

from __future__ import annotations

from dataclasses import replace

from learners.base import Method, Variation

__all__ = ["confirmed", "tried"]


def confirmed(recipe: Method) -> tuple[Method, ...]:
    """From the recipe, what ``DisTrO`` has, one change after the other."""
    small = replace(recipe, name="tiles of 16, k=1", chunk=16, topk=1)
    faster = replace(small, name="and momentum 0.9", momentum=0.9)
    return recipe, small, faster, replace(faster, name="and ahead by delta", ahead="delta")


def tried(recipe: Method) -> tuple[Method, ...]:
    """One change of the best of the others each."""
    *_, small, faster, best = confirmed(recipe)

    def other(name: str, method: Method = best, **changes: object) -> Method:
        return replace(method, name=name, variation=Variation(**changes))  # type: ignore[arg-type]

    large = replace(recipe, name="tiles of 64, k=8, momentum 0.9, by delta", momentum=0.9, ahead="delta")
    return (
        replace(recipe, name="tiles of 32, k=2", chunk=32, topk=2),
        large,
        other("tiles of 64, k=7 and a scale", replace(large, topk=7), tile_scale=True),
        other("tiles of 64, k=12, positions coded", replace(large, topk=12), coded=True),
        other("tiles of 64, k from 4 to 12", large, growing_over=100),
        other("tiles of 64, k=12 by energy, positions coded", replace(large, topk=12), by_energy=True, coded=True),
        other("by energy, positions coded", by_energy=True, coded=True),
        replace(best, name="four times the bytes: k=4", topk=4),
        other("all sent, gain 1", replace(small, gain=1.0), sends_all=True),
        other("all sent, gain 1, momentum 0.9", replace(faster, gain=1.0), sends_all=True),
        replace(best, name="momentum 0.95", momentum=0.95),
        replace(best, name="momentum 0.85", momentum=0.85),
        replace(best, name="decay 0.5", decay=0.5),
        replace(best, name="decay 0.85", decay=0.85),
        replace(best, name="gain 1.4", gain=1.4),
        replace(best, name="gain 2.8", gain=2.8),
        replace(best, name="lr 0.004, gain 1.5", lr=4e-3, gain=1.5),
        other("twice as far ahead by the direction", faster, times=2.0),
        other("1.5 times as far ahead by delta", times=1.5),
        other("ahead by applied updates, too", small, applied_ahead=1.0),
        other("3 steps of Newton and Schulz", faster, squarings=3),
        other("rows of equal size", small, equal_rows=True),
        other("applied updates in the direction", small, shared=0.5),
        other("signs added up", adds_up=True),
        other("orthogonalised after merging", orthogonal_after=True),
        other("momentum 0.5 after merging", momentum_after=0.5),
        other("embeddings by 1.5 times the gain", embedding_gain=1.5),
        other("2 local steps, k=2, in time", replace(faster, topk=2, local_steps=2, overlap=False)),
        other("4 local steps, tiles of 8, in time", replace(faster, chunk=8, local_steps=4, overlap=False)),
    )

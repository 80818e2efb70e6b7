"""A step as Psyche's clients do it, to the last bit.

``basis`` is their inverse DCT and the order of their sums, ``prepared`` what the coefficients of all contributors mean
together, ``merge`` the step, ``halves`` the signs of numbers in half precision by their bits.
"""

from .basis import inverse_basis, sum_in_order
from .merge import PsycheMerge

__all__ = ["PsycheMerge", "inverse_basis", "sum_in_order"]

"""A step as Psyche's clients do it, to the last bit.

===============  ===================================================================================
``basis``        their inverse DCT, and the order in which they sum
``halves``       signs of numbers in half precision, by their bits
``prepared``     what the coefficients of all contributors mean together, in the order of the sums
``nearly_zero``  signs that rounding decides: sums that are done again in that order
``merge``        the step
===============  ===================================================================================
"""

from .basis import inverse_basis, sum_in_order
from .merge import PsycheMerge

__all__ = ["PsycheMerge", "inverse_basis", "sum_in_order"]

"""What taking part has cost, and for how long the wallet lasts. No I/O."""

from __future__ import annotations

from typing import Final

from ...errors import ConfigurationError, PaymentError
from ..solana_options import LAMPORTS_PER_SOL, shown_sol

__all__ = [
    "COMPUTE_UNITS",
    "FEE_PER_SIGNATURE",
    "KEPT_IN_A_WALLET",
    "LAMPORTS_PER_SOL",
    "NEEDED_TO_BEGIN",
    "FeeMeter",
    "FeesSpentError",
    "shown_sol",
]

FEE_PER_SIGNATURE: Final = 5000
"""Lamports; Solana's base fee."""

COMPUTE_UNITS: Final = 200_000
"""That a transaction may use where it offers a price for them: as many as a call may without saying anything."""

_MICRO: Final = 1_000_000
"""Prices are in millionths of a lamport."""

_MAX_PRICE: Final = 1_000_000_000
"""Millionths of a lamport; a transaction would cost 0.2 SOL, which is surely a mistake. Chosen arbitrarily."""

KEPT_IN_A_WALLET: Final = 890_880
"""Lamports that no fee can be paid from: what an account without data must hold, 128 bytes at 6,960 lamports each."""

TRANSACTIONS_TO_BEGIN: Final = 4
"""A wallet must pay for a join, a report of the warm-up and a tick or two; chosen so that a first epoch is possible."""

NEEDED_TO_BEGIN: Final = KEPT_IN_A_WALLET + TRANSACTIONS_TO_BEGIN * FEE_PER_SIGNATURE
"""Lamports of a wallet that takes part and offers no price."""

WARN_EPOCHS_AHEAD: Final = 2
"""A wallet that lasts for fewer epochs is told about: the one that begins, and one ahead."""


class FeesSpentError(PaymentError):
    """Another transaction would cost more than may be spent."""


class FeeMeter:
    """Counts lamports.

    Args:
        limit: what may be spent in all; None for no limit.
        price: offered for each of :data:`COMPUTE_UNITS`, in millionths of a lamport, so that a busy cluster takes ours
            first; 0 offers nothing.

    Raises:
        ConfigurationError: the limit does not pay for one transaction, or the price makes no sense.
    """

    def __init__(self, limit: int | None = None, price: int = 0) -> None:
        if not 0 <= price <= _MAX_PRICE:
            raise ConfigurationError(
                f"compute_unit_price is {price} millionths of a lamport: give 0 to {_MAX_PRICE}",
                name="compute_unit_price",
                value=price,
            )
        self.price = price
        if limit is not None and limit < self.fee_of():
            raise ConfigurationError(
                f"max_fees is {limit} lamports, but one transaction costs {self.fee_of()}",
                name="max_fees",
                value=limit,
            )
        self.limit = limit
        self.spent = 0
        self.transactions = 0
        self._at_epoch = 0
        self._of_epoch = 0

    def fee_of(self, signatures: int = 1) -> int:
        """What a transaction costs."""
        return FEE_PER_SIGNATURE * signatures - (-self.price * COMPUTE_UNITS // _MICRO)

    @property
    def needed_to_begin(self) -> int:
        """Lamports of a wallet that takes part."""
        return KEPT_IN_A_WALLET + TRANSACTIONS_TO_BEGIN * self.fee_of()

    def check(self, fee: int = FEE_PER_SIGNATURE) -> None:
        """Raises FeesSpentError if another transaction would go beyond the limit."""
        if self.limit is not None and self.spent + fee > self.limit:
            raise FeesSpentError(
                f"taking part has cost {shown_sol(self.spent)}, and more than {shown_sol(self.limit)} may not be "
                "spent: raise max_fees"
            )

    def paid(self, fee: int = FEE_PER_SIGNATURE) -> None:
        """A transaction is on its way, or taken."""
        self.spent += fee
        self.transactions += 1

    def returned(self, fee: int = FEE_PER_SIGNATURE) -> None:
        """It was not taken, and will never be."""
        self.spent -= fee
        self.transactions -= 1

    def epoch_begins(self, balance: int) -> str | None:
        """An epoch begins; returns a warning if the wallet will not last for the next one.

        Args:
            balance: lamports of the wallet.
        """
        self._of_epoch, self._at_epoch = self.spent - self._at_epoch, self.spent
        needed = max(self._of_epoch, self.fee_of())
        if balance - KEPT_IN_A_WALLET >= WARN_EPOCHS_AHEAD * needed:
            return None
        return (
            f"the wallet holds {shown_sol(balance)}, of which {shown_sol(KEPT_IN_A_WALLET)} must stay in it, and an "
            f"epoch costs about {shown_sol(needed)}: it does not last for the next one"
        )

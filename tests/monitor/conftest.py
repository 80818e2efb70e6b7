"""Lightning, and its strategy for runs without a network."""

from __future__ import annotations

from frameworks.conftest import pl, runs, strategy

__all__ = ["pl", "runs", "strategy"]

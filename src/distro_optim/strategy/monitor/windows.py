"""What others look at a peer's run through, while it is in it: a page for people, figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from ...coordinator.server.acting import HostActs, named_acts
from .figures import Figures
from .metrics import MetricsServer, metrics_of
from .picture import picture_of
from .shell import shell_line

__all__ = ["Windows"]


class Windows:
    """See the module.

    Args:
        figures: how it goes; for any thread.
        ticket: of the run, as it is now; for any thread.
        is_host: whether we host it; for any thread.
        tell: told where they are.
    """

    def __init__(
        self,
        figures: Callable[[], Figures],
        ticket: Callable[[], str | None],
        is_host: Callable[[], bool],
        tell: Callable[[str], None],
    ) -> None:
        self._figures = figures
        self._ticket = ticket
        self._is_host = is_host
        self._tell = tell
        self._open = ExitStack()

    def open(self, web: int | str | None, metrics_port: int | None, acts: HostActs | None) -> None:
        """Opens those that are asked for.

        Args:
            web: where the page is; None for no page.
            metrics_port: where the figures are; None for none.
            acts: what a host can do there.

        Raises:
            ConfigurationError: a port is taken.
        """
        if web is not None:
            from .page import PageServer  # brings a web server, which few sessions need

            page = PageServer(web, self._picture, named_acts(acts) if acts is not None else None)
            self._open.enter_context(page)
            self._tell(f"the run is shown at {page.url}")
        if metrics_port is not None:
            server = self._open.enter_context(MetricsServer(metrics_port, lambda: metrics_of(self._figures())))
            self._tell(f"metrics at http://127.0.0.1:{server.port}/metrics")

    def close(self) -> None:
        """Closes all of them. May be called again."""
        self._open.close()

    def _picture(self) -> dict[str, Any]:
        """What the page shows."""
        ticket = self._ticket()
        return picture_of(
            self._figures(),
            ticket=ticket,
            is_host=self._is_host(),
            how_to_join=None if ticket is None else shell_line(ticket),
        )

"""The figures for Prometheus, under the names that Psyche's client has for them (``shared/metrics/src/lib.rs``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import ModuleType, TracebackType
from typing import Any, Self

from ..errors import ConfigurationError, MissingDependencyError
from ..strategy.rounds.actions import DropReason
from .figures import Figures

__all__ = ["MetricsServer", "counters", "gauges", "load_prometheus"]


def load_prometheus() -> ModuleType:
    """prometheus_client, which comes with an extra; called before anything is opened, so that its lack is told at once.

    Raises:
        MissingDependencyError: it is not installed; says how to install it.
    """
    try:
        import prometheus_client
    except ImportError:
        raise MissingDependencyError(
            "--metrics-local-port needs prometheus-client: pip install 'distro-optim[metrics]'"
        ) from None
    return prometheus_client


def gauges(figures: Figures) -> Iterator[tuple[str, str, float | None]]:
    """Name, meaning and value of what goes up and down."""
    view = figures.view
    yield "psyche_round_step", "Step of the run", view.step
    yield "psyche_peer_connections", "Peers connected", sum(peer.path != "none" for peer in view.peers)
    yield "psyche_gossip_neighbors", "Peers that pass announcements on directly", view.neighbors
    rate = sum(peer.send_rate + peer.receive_rate for peer in view.peers)
    yield "psyche_bandwidth_bytes_per_second", "Bytes to and from peers", rate
    yield "psyche_last_train_time_seconds", "Duration of the latest batch", figures.last_train_seconds
    yield "psyche_training_loss", "Loss of the latest batch", figures.loss
    yield "psyche_training_perplexity", "Perplexity of the latest batch", figures.perplexity
    yield "psyche_training_efficiency", "Share of the time that was spent in training", figures.efficiency
    yield "psyche_learning_rate", "Learning rate of the step", view.lr
    yield "psyche_total_tokens", "Tokens that the run has trained", figures.total_tokens
    yield "psyche_tokens_per_second", "Speed of the whole run", figures.tokens_per_second
    yield "distro_optim_epoch", "Epoch of the run", view.epoch
    yield "distro_optim_clients", "Clients of the epoch", view.num_peers
    yield "distro_optim_coordinator_connected", "Whether there is a link to the coordinator", float(view.connected)
    yield "distro_optim_weights_in_doubt", "Whether our weights differ from the others'", float(view.fault is not None)
    if figures.downloaded is not None:
        done, total = figures.downloaded
        yield "psyche_p2p_model_params_downloaded", "Percent of the model", 100 * done / max(total, 1)


def counters(figures: Figures) -> Iterator[tuple[str, str, float]]:
    """Name, meaning and value of what only grows."""
    view = figures.view
    yield "distro_optim_sent_bytes", "Bytes to peers", view.bytes_sent
    yield "distro_optim_received_bytes", "Bytes from peers", view.bytes_received
    yield "distro_optim_rounds_trained", "Rounds trained to the end", view.rounds_trained
    yield "distro_optim_rounds_cancelled", "Rounds that were over before we were", view.rounds_cancelled
    yield "distro_optim_waiting_seconds", "Seconds that training waited for the run", view.seconds_waiting
    yield "distro_optim_training_seconds", "Seconds of training", view.seconds_training


class MetricsServer:
    """Answers ``http://127.0.0.1:PORT/metrics`` for as long as it is entered.

    Args:
        port: 0 takes any free one.
        figures: the present ones; called from another thread.

    Raises:
        ConfigurationError: the port is taken.
        MissingDependencyError: prometheus-client is not installed.
    """

    def __init__(self, port: int, figures: Callable[[], Figures]) -> None:
        prometheus_client = load_prometheus()
        registry = prometheus_client.CollectorRegistry(auto_describe=False)
        registry.register(_Collector(figures))
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, "127.0.0.1", registry)
        except OSError as error:
            raise ConfigurationError(
                f"--metrics-local-port {port} cannot be opened: {error.strerror or error}; give another one",
                name="metrics_port",
                value=port,
            ) from None
        self.port = int(self._server.server_port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Collector:
    def __init__(self, figures: Callable[[], Figures]) -> None:
        self._figures = figures

    def describe(self) -> list[Any]:
        return []  # so that nothing is asked before the first scrape

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        figures = self._figures()
        for name, meaning, value in gauges(figures):
            if value is not None:
                yield GaugeMetricFamily(name, meaning, value=value)
        for name, meaning, count in counters(figures):
            yield CounterMetricFamily(name, meaning, value=count)
        role = GaugeMetricFamily("psyche_participating_in_round", "Our part in the round", labels=["role"])
        for name in ("not_in_round", "trainer", "witness"):
            role.add_metric([name], float(figures.role == name))
        yield role
        dropped = CounterMetricFamily("distro_optim_dropped", "Messages and results not taken", labels=["reason"])
        for reason in DropReason:
            dropped.add_metric([reason.name.lower()], figures.view.dropped.get(reason, 0))
        yield dropped

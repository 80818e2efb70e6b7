"""The figures for Prometheus, under the names that Psyche's client has for them (``shared/metrics/src/lib.rs``).

A peer with a script, ``distro-optim join`` and ``distro-optim serve`` have the same names for the same things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any, Literal, Self

from ...errors import ConfigurationError, MissingDependencyError
from ..port import Contribution
from ..rounds.actions import DropReason
from .figures import Figures

__all__ = ["Metric", "MetricsServer", "contribution_metrics", "load_prometheus", "metrics_of"]


def load_prometheus(option: str = "metrics_port") -> ModuleType:
    """prometheus_client, which comes with an extra; called before anything is opened, so that its lack is told at once.

    Raises:
        MissingDependencyError: it is not installed; says how to install it.
    """
    try:
        import prometheus_client
    except ImportError:
        raise MissingDependencyError(f"{option} needs prometheus-client: pip install 'distro-optim[metrics]'") from None
    return prometheus_client


@dataclass(frozen=True)
class Metric:
    """A number, or several that labels tell apart.

    Attributes:
        kind: a gauge goes up and down, a counter only grows; a counter's name ends in ``_total`` for those who scrape.
        values: by the label's value; under ``""`` a number without a label.
        label: the label's name.
    """

    name: str
    meaning: str
    kind: Literal["gauge", "counter"]
    values: Mapping[str, float] = field(default_factory=dict)
    label: str = ""


def metrics_of(figures: Figures) -> list[Metric]:
    """All numbers of a peer; those that are not known are left out."""
    view = figures.view
    metrics = [Metric(n, m, "gauge", {"": value}) for n, m, value in _gauges(figures) if value is not None]
    metrics += [Metric(name, meaning, "counter", {"": value}) for name, meaning, value in _counters(figures)]
    roles = {name: float(figures.role == name) for name in ("not_in_round", "trainer", "witness")}
    metrics.append(Metric("psyche_participating_in_round", "Our part in the round", "gauge", roles, "role"))
    dropped = {reason.name.lower(): float(view.dropped.get(reason, 0)) for reason in DropReason}
    metrics.append(Metric("distro_optim_dropped", "Messages and results not taken", "counter", dropped, "reason"))
    metrics += contribution_metrics(view.contributions)
    if figures.uploads:
        uploads = {outcome: float(count) for outcome, count in figures.uploads.items()}
        metrics.append(Metric("distro_optim_uploads", "Checkpoints to be uploaded", "gauge", uploads, "outcome"))
    return metrics


def contribution_metrics(contributions: Mapping[bytes, Contribution]) -> list[Metric]:
    """What each identity has given; labelled with the first 16 digits of its key."""
    named = {key.hex()[:16]: given for key, given in contributions.items()}
    return [
        Metric(
            f"distro_optim_contributed_{what}",
            meaning,
            "counter",
            {key: float(getattr(given, what)) for key, given in named.items()},
            "peer",
        )
        for what, meaning in (
            ("rounds", "Rounds in which a result of the peer counted"),
            ("samples", "Samples of those results"),
            ("bytes", "Bytes of those results"),
            ("dropped", "Messages and results of the peer not taken"),
        )
        if named
    ]


def _gauges(figures: Figures) -> Iterator[tuple[str, str, float | None]]:
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
    # A gauge by Psyche's name, though it never falls: a counter's name would end in _total once more.
    yield "psyche_total_tokens", "Tokens that the run has trained", figures.total_tokens
    yield "psyche_tokens_per_second", "Speed of the whole run", figures.tokens_per_second
    yield "distro_optim_total_steps", "Steps of the whole run", view.total_steps
    yield "distro_optim_epoch", "Epoch of the run", view.epoch
    yield "distro_optim_clients", "Clients of the epoch", view.num_peers
    yield "distro_optim_waiting_clients", "Clients that wait for the next epoch", view.waiting_peers
    # Not a counter: what was not taken in the end costs nothing.
    yield "distro_optim_fees_lamports", "Fees that taking part has cost", view.fees
    yield "distro_optim_coordinator_connected", "Whether there is a link to the coordinator", float(view.connected)
    yield "distro_optim_weights_in_doubt", "Whether our weights differ from the others'", float(view.fault is not None)
    if figures.downloaded is not None:
        done, total = figures.downloaded
        yield "psyche_p2p_model_params_downloaded", "Percent of the model", 100 * done / max(total, 1)


def _counters(figures: Figures) -> Iterator[tuple[str, str, float]]:
    """Name, meaning and value of what only grows."""
    view = figures.view
    yield "distro_optim_sent_bytes", "Bytes to peers", view.bytes_sent
    yield "distro_optim_received_bytes", "Bytes from peers", view.bytes_received
    yield "distro_optim_ddp_bytes", "Bytes that gradients in bfloat16 would have taken", figures.ddp_bytes
    yield "distro_optim_rounds_trained", "Rounds trained to the end", view.rounds_trained
    yield "distro_optim_rounds_cancelled", "Rounds that were over before we were", view.rounds_cancelled
    yield "distro_optim_waiting_seconds", "Seconds that training waited for the run", view.seconds_waiting
    yield "distro_optim_training_seconds", "Seconds of training", view.seconds_training


class MetricsServer:
    """Answers ``http://127.0.0.1:PORT/metrics`` from its making to :meth:`close`, or as a context manager.

    Args:
        port: 0 takes any free one.
        metrics: the present ones; called from another thread.
        option: what the user calls the port.

    Raises:
        ConfigurationError: the port is taken.
        MissingDependencyError: prometheus-client is not installed.
    """

    def __init__(self, port: int, metrics: Callable[[], Iterable[Metric]], *, option: str = "metrics_port") -> None:
        prometheus_client = load_prometheus(option)
        registry = prometheus_client.CollectorRegistry(auto_describe=False)
        registry.register(_Collector(metrics))
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, "127.0.0.1", registry)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(
                f"{option} {port} cannot be opened: {reason}; give another one",
                name="metrics_port",
                value=port,
            ) from None
        self.port = int(self._server.server_port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Answers no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Collector:
    def __init__(self, metrics: Callable[[], Iterable[Metric]]) -> None:
        self._metrics = metrics

    def describe(self) -> list[Any]:
        return []  # so that nothing is asked before the first scrape

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}
        for metric in self._metrics():
            family = families[metric.kind](metric.name, metric.meaning, labels=[metric.label] if metric.label else [])
            for value, number in metric.values.items():
                family.add_metric([value] if metric.label else [], number)
            yield family

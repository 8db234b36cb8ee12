"""
Prometheus metrics of all workers of this host. Imported only if METRICS_TOKEN is set.

prometheus-client reads PROMETHEUS_MULTIPROC_DIR when it is imported, and then keeps its values in
files of that directory, which the workers share.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal

from flask import Flask
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from clerkhooks.clerk.signing_keys import FetchedKeys
from clerkhooks.events import Outcome
from clerkhooks.store import Store, activity
from clerkhooks.web.state import EXTENSION, State

FAMILIES = frozenset(
    """
    email invitation organization organizationDomain organizationInvitation organizationMembership
    paymentAttempt permission role session sms subscription subscriptionItem user waitlistEntry
    """.split()  # noqa: SIM905  # as a list it takes fifteen lines
)
USER_EVENTS = frozenset(("user.created", "user.updated", "user.deleted"))
DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds
LAGS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 21600, 86400)  # seconds
PREFIX = "clerkhooks_"
_IN_USE = "clerkhooks.in_use"


class Metrics:
    """The metrics of this process, or of all processes that share a directory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.registry = CollectorRegistry()
        self.webhooks = self._counter(
            "webhooks", "Verified deliveries, by event type and outcome.", "type", "outcome"
        )
        self.webhook_refusals = self._counter(
            "webhook_refusals", "Deliveries that were rejected.", "reason"
        )
        self.webhook_duration = self._histogram(
            "webhook_duration_seconds", "Processing time of verified deliveries.", DURATIONS
        )
        self.webhook_lag = self._histogram(
            "webhook_lag_seconds", "Time from an event to the end of its processing.", LAGS
        )
        self.sessions_verified = self._counter("sessions_verified", "Authenticated calls.")
        self.sessions_refused = self._counter("sessions_refused", "Rejected calls.", "reason")
        self.fetches = self._counter(
            "signing_keys_fetches", "Fetches of the signing keys.", "result"
        )
        # The label keeps a worker that has not fetched keys yet from exporting a value of 0.
        self.fetched_at = self._gauge(
            "signing_keys_fetched_timestamp_seconds",
            "When the oldest key set in use was fetched.",
            "livemin",
            "source",
        )
        self.fallback_users = self._counter("fallback_users", "Users created by their first call.")
        self.connections = self._gauge(
            "database_connections_in_use", "Connections of the pool that are in use.", "livesum"
        )
        self.connections_limit = self._gauge(
            "database_connections_limit", "Connections that the pool may open.", "livesum"
        )

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, documentation, buckets=buckets, registry=self.registry)

    def _gauge(
        self,
        name: str,
        documentation: str,
        over_workers: Literal["livemin", "livesum"],
        *labels: str,
    ) -> Gauge:
        return Gauge(
            PREFIX + name,
            documentation,
            labels,
            registry=self.registry,
            multiprocess_mode=over_workers,
        )

    def count_delivery(self, status: int, fields: dict[str, Any], seconds: float) -> None:
        """Count a delivery by the *fields* of its log line; it took *seconds*."""
        event_type = fields.get("event_type")
        if event_type is None or (fields.get("outcome") is None and status != 500):
            self.webhook_refusals.labels(fields.get("reason") or "other").inc()
            return
        outcome = fields.get("outcome") or Outcome.FAILED
        self.webhooks.labels(family_of(event_type), outcome).inc()
        self.webhook_duration.observe(seconds)
        if fields.get("lag_s") is not None and outcome in (Outcome.APPLIED, Outcome.STALE):
            self.webhook_lag.observe(max(0.0, fields["lag_s"]))

    def count_fetch(self, succeeded: bool) -> None:
        """Count a fetch of the signing keys."""
        self.fetches.labels("ok" if succeeded else "failed").inc()
        if succeeded:
            self.fetched_at.labels("jwks").set(time.time())

    def watch_pool(self) -> None:
        """Count the private pool's connections as they are checked out and in."""
        event.listen(self._store.database.engine, "checkout", self._count_checkout)
        event.listen(self._store.database.engine, "checkin", self._count_checkin)

    def _count_checkout(self, _connection: object, record: Any, _proxy: object) -> None:
        record.record_info[_IN_USE] = True
        self.connections.inc()

    def _count_checkin(self, _connection: object, record: Any) -> None:
        # In an outage the pool also checks in connections that failed before their checkout.
        if record.record_info.pop(_IN_USE, False):
            self.connections.dec()

    def begin_process(self) -> None:
        """Record how many connections this process may open."""
        pool: Any = self._store.database.engine.pool
        self.connections_limit.set(pool.size())

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all processes, and those read from the database."""
        for family in _read_files() if is_shared() else self.registry.collect():
            yield (
                _age(family)
                if family.name == f"{PREFIX}signing_keys_fetched_timestamp_seconds"
                else family
            )
        yield from _from_database(self._store)


def init_metrics(state: State) -> None:
    """Start counting for the application of *state*."""
    metrics = state.metrics = Metrics(state.store)
    keys = state.authenticator.verifier.keys
    if isinstance(keys, FetchedKeys):
        keys.on_fetch = metrics.count_fetch
    metrics.watch_pool()
    if not is_shared():
        metrics.begin_process()


def begin_process(app: Flask) -> None:
    """Start counting in a process that was forked to serve *app*."""
    metrics = app.extensions[EXTENSION].metrics
    if metrics is not None:
        metrics.begin_process()


def is_shared() -> bool:
    """Return whether several processes count together. This one may then not serve requests."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


def exposition(metrics: Metrics) -> bytes:
    """Return all metrics in Prometheus's text format."""
    return generate_latest(metrics)


def family_of(event_type: str) -> str:
    """Return a label for *event_type*, from a small set that limits the number of time series."""
    family = event_type.partition(".")[0]
    return event_type if event_type in USER_EVENTS else family if family in FAMILIES else "other"


def _read_files() -> Iterable[Metric]:
    """Return the metrics of every process, retrying while a new process creates its files."""
    collector: Any = MultiProcessCollector(None)  # type: ignore[no-untyped-call]
    for _ in range(100):
        with suppress(struct.error):
            return list(collector.collect())
        time.sleep(0.005)
    return list(collector.collect())


def _age(family: Metric) -> Metric:
    ages = GaugeMetricFamily(
        "clerkhooks_signing_keys_age_seconds", "Age of the oldest key set in use."
    )
    for sample in family.samples:
        ages.add_metric([], max(0.0, time.time() - sample.value))
    return ages


def _from_database(store: Store) -> Iterator[Metric]:
    try:
        unfilled, last = activity.count_unfilled(store), activity.find_last_received(store)
    except SQLAlchemyError:
        yield GaugeMetricFamily("clerkhooks_database_up", "Whether the database answers.", 0)
        return
    yield GaugeMetricFamily("clerkhooks_database_up", "Whether the database answers.", 1)
    yield GaugeMetricFamily(
        "clerkhooks_users_unfilled",
        "Users without a profile: no webhook and no sync has filled in the row.",
        unfilled,
    )
    if last is not None:
        silence = (datetime.now(UTC) - last).total_seconds()
        yield GaugeMetricFamily(
            "clerkhooks_last_webhook_age_seconds",
            "Time since the last verified delivery of a new message.",
            silence,
        )

"""
The metrics of all workers of this host. Imported only if METRICS_TOKEN is set.

prometheus-client shares its figures in the files of PROMETHEUS_MULTIPROC_DIR, and looks for that
when it is imported.
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
    email invitation organization organizationDomain organizationInvitation organizationMembership paymentAttempt permission role session
    sms subscription subscriptionItem user waitlistEntry
    """.split()  # noqa: SIM905  # a list of them takes fifteen lines
)
USER_EVENTS = frozenset(("user.created", "user.updated", "user.deleted"))
DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds
LAGS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 21600, 86400)  # seconds
PREFIX = "clerkhooks_"
_IN_USE = "clerkhooks.in_use"


class Metrics:
    """The figures that this process counts; several processes with one directory count together."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.registry = CollectorRegistry()
        self.webhooks = self._counter(
            "webhooks", "Verified deliveries, by what became of them.", "type", "outcome"
        )
        self.webhook_refusals = self._counter(
            "webhook_refusals", "Deliveries that were not taken.", "reason"
        )
        self.webhook_duration = self._histogram(
            "webhook_duration_seconds", "How long a verified delivery took.", DURATIONS
        )
        self.webhook_lag = self._histogram(
            "webhook_lag_seconds", "From an event to the end of its processing.", LAGS
        )
        self.sessions_verified = self._counter("sessions_verified", "Calls of signed-in users.")
        self.sessions_refused = self._counter(
            "sessions_refused", "Calls that were refused.", "reason"
        )
        self.fetches = self._counter(
            "signing_keys_fetches", "Fetches of the signing keys.", "result"
        )
        # With a label, so that a worker that has not fetched any yet says nothing instead of 1970.
        self.fetched_at = self._gauge(
            "signing_keys_fetched_timestamp_seconds",
            "Of the oldest key set in use.",
            "livemin",
            "source",
        )
        self.fallback_users = self._counter("fallback_users", "Users whom a first call created.")
        self.connections = self._gauge(
            "database_connections_in_use", "Connections of the pool that are at work.", "livesum"
        )
        self.connections_limit = self._gauge(
            "database_connections_limit", "Connections that the pool may open.", "livesum"
        )

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, says, labels, registry=self.registry)

    def _histogram(self, name: str, says: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, says, buckets=buckets, registry=self.registry)

    def _gauge(
        self, name: str, says: str, over_workers: Literal["livemin", "livesum"], *labels: str
    ) -> Gauge:
        return Gauge(
            PREFIX + name, says, labels, registry=self.registry, multiprocess_mode=over_workers
        )

    def count_delivery(self, status: int, fields: dict[str, Any], seconds: float) -> None:
        """Count a delivery by what its log line says; *seconds* is how long it took."""
        event_type = fields.get("event_type")
        if event_type is None or (fields.get("outcome") is None and status < 500):
            self.webhook_refusals.labels(fields.get("reason") or "other").inc()
            return
        outcome = fields.get("outcome") or Outcome.FAILED
        self.webhooks.labels(family_of(event_type), outcome).inc()
        self.webhook_duration.observe(seconds)
        if fields.get("lag_s") is not None and outcome in (Outcome.APPLIED, Outcome.STALE):
            self.webhook_lag.observe(max(0.0, fields["lag_s"]))

    def count_fetch(self, well: bool) -> None:
        """Count a fetch of the signing keys."""
        self.fetches.labels("ok" if well else "failed").inc()
        if well:
            self.fetched_at.labels("jwks").set(time.time())

    def watch_pool(self) -> None:
        """Count the private pool's connections as they come and go."""
        event.listen(self._store.database.engine, "checkout", self._count_checkout)
        event.listen(self._store.database.engine, "checkin", self._count_checkin)

    def _count_checkout(self, _connection: object, record: Any, _proxy: object) -> None:
        record.record_info[_IN_USE] = True
        self.connections.inc()

    def _count_checkin(self, _connection: object, record: Any) -> None:
        # In an outage the pool also takes back what it could not connect, and so never gave out.
        if record.record_info.pop(_IN_USE, False):
            self.connections.dec()

    def begin_process(self) -> None:
        """Record how many connections this process may open."""
        pool: Any = self._store.database.engine.pool
        self.connections_limit.set(pool.size())

    def collect(self) -> Iterator[Metric]:
        """All figures of all processes, and those that only the database knows."""
        for family in _read_files() if is_shared() else self.registry.collect():
            yield (
                _age(family)
                if family.name == f"{PREFIX}signing_keys_fetched_timestamp_seconds"
                else family
            )
        yield from _from_database(self._store)


def init_metrics(state: State) -> None:
    """Count what the application of *state* does from now on."""
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
    """Whether several processes count together, so that this one, which loads the application, may not be one that serves it."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


def exposition(metrics: Metrics) -> bytes:
    """Return all figures in Prometheus's text format."""
    return generate_latest(metrics)


def family_of(event_type: str) -> str:
    """A label for *event_type*, of which there are few: whoever may sign must not make a series of each message."""
    family = event_type.partition(".")[0]
    return event_type if event_type in USER_EVENTS else family if family in FAMILIES else "other"


def _read_files() -> Iterable[Metric]:
    """What every process has counted. One that begins makes its files, which cannot be read until they have their size."""
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
        "Rows that no webhook and no sync has filled in.",
        unfilled.value,
    )
    if last is not None:
        silence = (datetime.now(UTC) - last).total_seconds()
        yield GaugeMetricFamily(
            "clerkhooks_last_webhook_age_seconds",
            "Since the last verified webhook that was new.",
            silence,
        )

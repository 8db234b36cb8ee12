"""
Prometheus metrics of all workers on this host. Imported only if METRICS_TOKEN is set.

prometheus-client reads PROMETHEUS_MULTIPROC_DIR when it is imported. If it is set, the workers
share their values through files in that directory.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from clerkhooks.clerk.signing_keys import FetchedKeys
from clerkhooks.events import Outcome
from clerkhooks.store import Store, activity
from clerkhooks.store.change_reader import ChangeReader
from clerkhooks.sync.change_handlers import find_handlers
from clerkhooks.sync.progress import FOLLOWER
from clerkhooks.web.state import State

FAMILIES = frozenset(
    """
    email invitation organization organizationDomain organizationInvitation organizationMembership
    paymentAttempt permission role session sms subscription subscriptionItem user waitlistEntry
    """.split()  # noqa: SIM905  # a list would take fifteen lines
)
USER_EVENTS = frozenset(("user.created", "user.updated", "user.deleted"))
BARRING = ("banned", "deprovisioned")
DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds
LAGS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 21600, 86400)  # seconds
NAMESPACE, FETCHED_AT = "clerkhooks", "signing_keys_fetched_timestamp_seconds"
_IN_USE = "clerkhooks.in_use"


class Metrics:
    """The metrics of this process, or of all processes that share a directory."""

    def __init__(self, store: Store, *, follows: bool) -> None:
        self._store, self._follows = store, follows
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace=NAMESPACE, registry=self.registry)
        histogram = partial(Histogram, namespace=NAMESPACE, registry=self.registry)
        gauge = partial(Gauge, namespace=NAMESPACE, registry=self.registry)
        self.webhooks = counter(
            "webhooks", "Verified deliveries, by event type and outcome.", ["type", "outcome"]
        )
        self.webhook_refusals = counter(
            "webhook_refusals", "Deliveries that were rejected.", ["reason"]
        )
        self.webhook_duration = histogram(
            "webhook_duration_seconds", "Processing time of verified deliveries.", buckets=DURATIONS
        )
        self.webhook_lag = histogram(
            "webhook_lag_seconds", "Time from an event to the end of its processing.", buckets=LAGS
        )
        self.sessions_verified = counter("sessions_verified", "Authenticated calls.")
        self.sessions_refused = counter("sessions_refused", "Rejected calls.", ["reason"])
        self.fetches = counter("signing_keys_fetches", "Fetches of the signing keys.", ["result"])
        # Without a label, a worker that has not fetched keys yet would export a value of 0.
        about = "When the oldest key set in use was fetched."
        self.fetched_at = gauge(FETCHED_AT, about, ["source"], multiprocess_mode="livemin")
        self.fallback_users = counter("fallback_users", "Users created by their first call.")
        about = "Connections of the pool that are in use."
        self.connections = gauge("database_connections_in_use", about, multiprocess_mode="livesum")
        about = "Connections that the pool may open."
        self.connections_limit = gauge(
            "database_connections_limit", about, multiprocess_mode="livesum"
        )
        event.listen(store.database.engine, "checkout", self._count_checkout)
        event.listen(store.database.engine, "checkin", self._count_checkin)

    def count_delivery(self, status: int, fields: dict[str, Any], seconds: float) -> None:
        """Count a delivery, given the *fields* of its log line and its duration in *seconds*."""
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

    def _count_checkout(self, _connection: object, record: Any, _proxy: object) -> None:
        record.record_info[_IN_USE] = True
        self.connections.inc()

    def _count_checkin(self, _connection: object, record: Any) -> None:
        # During an outage, the pool also checks in connections that were never checked out.
        if record.record_info.pop(_IN_USE, False):
            self.connections.dec()

    def begin_process(self) -> None:
        """Record how many database connections this process may open."""
        self.connections_limit.set(self._store.database.pool_size)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all processes, then the metrics that are read from the database."""
        for family in _read_files() if is_shared() else self.registry.collect():
            is_time = family.name == f"{NAMESPACE}_{FETCHED_AT}"
            yield _age(family) if is_time else family
        yield from _from_database(self._store, follows=self._follows)


def init_metrics(state: State) -> None:
    """Set up the metrics of the application that *state* belongs to."""
    metrics = state.metrics = Metrics(state.store, follows=state.settings.secret_key is not None)
    keys = state.authenticator.verifier.keys
    if isinstance(keys, FetchedKeys):
        keys.on_fetch = metrics.count_fetch
    if not is_shared():
        metrics.begin_process()


def is_shared() -> bool:
    """
    Return whether several processes share metrics.

    If they do, this process may be gunicorn's master, which serves no requests.
    """
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


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
    ages = _gauge("signing_keys_age_seconds", "Age of the oldest key set in use.")
    for sample in family.samples:
        ages.add_metric([], max(0.0, time.time() - sample.value))
    return ages


def _from_database(store: Store, *, follows: bool) -> Iterator[Metric]:
    up = "Whether the database answers."
    try:
        unfilled, last = activity.count_unfilled(store), activity.find_last_received(store)
        barred = {state: activity.count_barred(store, state) for state in BARRING}
        counts = activity.count_organizations(store), activity.count_memberships(store)
        following = list(_from_follower(store)) if follows else []
        failures = list(_from_handlers(store)) if store.changes is not None else []
        delay = ChangeReader(store).find_delay() if store.changes is not None else None
    except SQLAlchemyError:
        yield _gauge("database_up", up, 0)
        return
    yield _gauge("database_up", up, 1)
    yield _gauge(
        "users_unfilled",
        "Users without a profile: no webhook and no sync has filled in the row.",
        unfilled,
    )
    yield _barred(barred)
    for name, count in zip(("organizations", "memberships"), counts, strict=True):
        if count is not None:
            limit = activity.MAX_COUNT
            yield _gauge(name, f"The {name} that have not ended, at most {limit + 1}.", count)
    yield from following
    yield from failures
    if delay is not None:
        about = "Age of the oldest change that readers of the change feed cannot see yet."
        yield _gauge("changes_delay_seconds", about, delay)
    if last is not None:
        yield _gauge(
            "last_webhook_age_seconds",
            "Time since the last verified delivery of a new message.",
            (datetime.now(UTC) - last).total_seconds(),
        )


def _from_handlers(store: Store) -> Iterator[GaugeMetricFamily]:
    about = "Failed attempts of durable handlers at their next change."
    family = GaugeMetricFamily(f"{NAMESPACE}_change_handler_failures", about, labels=["handler"])
    for handler in find_handlers(store):
        family.add_metric([handler.name], handler.position.failures)
    yield family


def _from_follower(store: Store) -> Iterator[Metric]:
    yield _gauge(
        "deliveries_missed",
        "Changes of the last day that the follower found, and for which no webhook arrived.",
        store.awaited.count().missed,
    )
    held = store.leases.find(FOLLOWER)
    if held is not None and held.completed_at is not None:
        age = (held.now - held.completed_at) / 1000
        yield _gauge("follower_age_seconds", "Time since the follower's last round.", age)


def _barred(counts: dict[str, int]) -> GaugeMetricFamily:
    about = "Users whose calls are refused, by account state."
    family = GaugeMetricFamily(f"{NAMESPACE}_users_barred", about, labels=["state"])
    for state, count in counts.items():
        family.add_metric([state], count)
    return family


def _gauge(name: str, documentation: str, value: float | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{NAMESPACE}_{name}", documentation, value)

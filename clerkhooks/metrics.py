"""
What ``/metrics`` says, whole over all workers of this host. Imported only where METRICS_TOKEN is set.

prometheus-client shares its figures in the files of PROMETHEUS_MULTIPROC_DIR, and looks for that when it is imported.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal

from flask import Flask, Response, request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from clerkhooks import activity, auth, logs
from clerkhooks.clerk.signing_keys import FetchedKeys
from clerkhooks.models import Outcome, db
from clerkhooks.signals import user_first_seen

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
IN_USE = "clerkhooks.in_use"


class Metrics:
    """The figures that this process counts; several processes with one directory count together."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.webhooks = self._counter("webhooks", "Verified deliveries, by what became of them.", "type", "outcome")
        self.webhook_refusals = self._counter("webhook_refusals", "Deliveries that were not taken.", "reason")
        self.webhook_duration = self._histogram("webhook_duration_seconds", "How long a verified delivery took.", DURATIONS)
        self.webhook_lag = self._histogram("webhook_lag_seconds", "From an event to the end of its processing.", LAGS)
        self.sessions_verified = self._counter("sessions_verified", "Calls of signed-in users.")
        self.sessions_refused = self._counter("sessions_refused", "Calls that were refused.", "reason")
        self.fetches = self._counter("signing_keys_fetches", "Fetches of the signing keys.", "result")
        # With a label, so that a worker that has not fetched any yet says nothing instead of 1970.
        self.fetched_at = self._gauge("signing_keys_fetched_timestamp_seconds", "Of the oldest key set in use.", "livemin", "source")
        self.fallback_users = self._counter("fallback_users", "Users whom a first call created.")
        self.connections = self._gauge("database_connections_in_use", "Connections of the pool that are at work.", "livesum")
        self.connections_limit = self._gauge("database_connections_limit", "Connections that the pool may open.", "livesum")

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, says, labels, registry=self.registry)

    def _histogram(self, name: str, says: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, says, buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, says: str, over_workers: Literal["livemin", "livesum"], *labels: str) -> Gauge:
        return Gauge(PREFIX + name, says, labels, registry=self.registry, multiprocess_mode=over_workers)

    def count_request(self, response: Response) -> Response:
        """Count what the request's own log line says."""
        fields = logs.request_fields()
        if request.endpoint == "webhooks.receive_webhook":
            self._count_webhook(response.status_code, fields)
        elif (refused := request.environ.get(auth.REFUSED)) is not None:
            self.sessions_refused.labels(refused).inc()
        elif request.environ.get(auth.SIGNED_IN, (None,))[0] is not None:
            self.sessions_verified.inc()
        return response

    def _count_webhook(self, status: int, fields: dict[str, Any]) -> None:
        event_type = fields.get("event_type")
        if event_type is None or (fields.get("outcome") is None and status < 500):
            self.webhook_refusals.labels(fields.get("reason") or "other").inc()
            return
        self.webhooks.labels(family_of(event_type), fields.get("outcome") or Outcome.FAILED).inc()
        self.webhook_duration.observe(logs.seconds_so_far())
        if fields.get("lag_s") is not None and fields.get("outcome") in (Outcome.APPLIED, Outcome.STALE):
            self.webhook_lag.observe(max(0.0, fields["lag_s"]))

    def count_fetch(self, well: bool) -> None:
        """Count a fetch of the signing keys."""
        self.fetches.labels("ok" if well else "failed").inc()
        if well:
            self.fetched_at.labels("jwks").set(time.time())

    def count_fallback(self, _app: Flask, **_: object) -> None:
        """Count a user whom a first call created."""
        self.fallback_users.inc()

    def watch_pool(self) -> None:
        """Count connections of the current application's pool as they come and go."""
        event.listen(db.engine, "checkout", self._count_checkout)
        event.listen(db.engine, "checkin", self._count_checkin)

    def _count_checkout(self, _connection: object, record: Any, _proxy: object) -> None:
        record.record_info[IN_USE] = True
        self.connections.inc()

    def _count_checkin(self, _connection: object, record: Any) -> None:
        # In an outage the pool also takes back what it could not connect, and so never gave out.
        if record.record_info.pop(IN_USE, False):
            self.connections.dec()

    def begin_process(self, app: Flask) -> None:
        """Say how many connections this process, which serves *app*, may open."""
        pool = app.config["SQLALCHEMY_ENGINE_OPTIONS"]
        self.connections_limit.set(pool["pool_size"] + pool["max_overflow"])

    def collect(self) -> Iterator[Metric]:
        """All figures of all processes, and those that only the database knows."""
        for family in _read_files() if is_shared() else self.registry.collect():
            yield _age(family) if family.name == f"{PREFIX}signing_keys_fetched_timestamp_seconds" else family
        yield from _from_database()


def init_metrics(app: Flask) -> None:
    """Count what *app* does from now on."""
    metrics = app.extensions["clerkhooks.metrics"] = Metrics()
    app.after_request(metrics.count_request)
    user_first_seen.connect(metrics.count_fallback, app)
    keys = app.extensions["clerkhooks.auth"].verifier.keys
    if isinstance(keys, FetchedKeys):
        keys.on_fetch = metrics.count_fetch
    with app.app_context():
        metrics.watch_pool()
    if not is_shared():
        metrics.begin_process(app)


def is_shared() -> bool:
    """Whether several processes count together, so that this one, which loads the application, may not be one that serves it."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


def exposition(app: Flask) -> bytes:
    """All figures in Prometheus's text format."""
    return generate_latest(app.extensions["clerkhooks.metrics"])


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
    ages = GaugeMetricFamily("clerkhooks_signing_keys_age_seconds", "Age of the oldest key set in use.")
    for sample in family.samples:
        ages.add_metric([], max(0.0, time.time() - sample.value))
    return ages


def _from_database() -> Iterator[Metric]:
    try:
        unfilled, last = activity.count_unfilled(), activity.find_last_received()
    except SQLAlchemyError:
        yield GaugeMetricFamily("clerkhooks_database_up", "Whether the database answers.", 0)
        return
    yield GaugeMetricFamily("clerkhooks_database_up", "Whether the database answers.", 1)
    yield GaugeMetricFamily("clerkhooks_users_unfilled", "Rows that no webhook and no sync has filled in.", unfilled.value)
    if last is not None:
        silence = (datetime.now(UTC) - last).total_seconds()
        yield GaugeMetricFamily("clerkhooks_last_webhook_age_seconds", "Since the last verified webhook that was new.", silence)

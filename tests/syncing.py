"""Helpers that run a sync in this process."""

from __future__ import annotations

from collections.abc import Callable

from clerkhooks.clerk.backend_api import BackendApi
from clerkhooks.store import Store
from clerkhooks.sync import connections, reconcile
from clerkhooks.sync.comparison import Finding
from tests.backend import SECRET_KEY, Backend
from tests.support import Service

PACE = 0.001  # factor by which pauses are multiplied
PATIENCE = 20_000  # with PACE, a call ends within 20 s, so that a busy machine does not end it


def store_of(service: Service) -> Store:
    """Return the application's store."""
    store: Store = service.app.extensions["clerkhooks"].store
    return store


def begin_quietly(_label: str, _total: int | None) -> Callable[[int], None]:
    """Return a progress callback that shows nothing."""
    return lambda _count: None


def sync(
    service: Service,
    backend: Backend,
    run: Callable[[reconcile.Reconciliation], None] = reconcile.Reconciliation.sync_all,
    check: bool = False,
    force: bool = False,
) -> tuple[dict[str, int], list[Finding], reconcile.Reconciliation]:
    """Run a sync; return the nonzero counts of users, the findings and the run itself."""
    findings: list[Finding] = []
    store = store_of(service)
    handled = service.app.extensions["clerkhooks"].deliveries.handled
    with (
        service.app.app_context(),
        connections.sole_writer(store) as connection,
        BackendApi(backend.api_url, SECRET_KEY, pace=PACE, patience=PATIENCE) as api,
    ):
        reconciliation = reconcile.Reconciliation(
            api,
            store,
            connection,
            begin_quietly,
            findings.append,
            check=check,
            force=force,
            handled=handled,
        )
        run(reconciliation)
    summary = {name: count for name, count in reconciliation.users.summary().items() if count}
    return summary, findings, reconciliation


def make_old(service: Service) -> None:
    """Make every row old enough for a sync to check whether Clerk has deleted the user."""
    service.rows("UPDATE users SET created_at = '2020-01-01 00:00:00.000000'")

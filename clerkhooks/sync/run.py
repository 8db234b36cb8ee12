"""What the tables of one sync share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa
import stamina

from clerkhooks.clerk.backend_api import BackendApi
from clerkhooks.handled_writes import HandledWrites
from clerkhooks.store import Store
from clerkhooks.sync.comparison import Comparison, Finding
from clerkhooks.sync.connections import retry

Advance = Callable[[int], object]


@dataclass
class Run:
    """The parameters of a sync. ``Reconciliation`` describes them."""

    api: BackendApi
    store: Store
    connection: sa.Connection
    begin: Callable[[str, int | None], Advance]
    tell: Callable[[Finding], object]
    check: bool = False
    force: bool = False
    handled: HandledWrites | None = None
    written: list[Comparison] | None = None
    retry: stamina.BoundRetryingCaller = retry

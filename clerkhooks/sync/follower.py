"""The follower: it reads changes from Clerk, and writes those that no webhook delivered."""

from __future__ import annotations

from clerkhooks.clerk.backend_api import BackendApi
from clerkhooks.errors import BackendApiError
from clerkhooks.handled_writes import HandledWrites
from clerkhooks.settings import Settings
from clerkhooks.store import Store
from clerkhooks.store.leases import Held
from clerkhooks.sync.lease import LIFETIME, Lease, LeasedLoop, Tell
from clerkhooks.sync.leased import LeasedSync, TooManyRefused, WrongInstance
from clerkhooks.sync.progress import FOLLOWER
from clerkhooks.sync.rounds import Round

SHARE = 1 / 9  # of the client's rate limit: a tenth of what Clerk allows
TIMEOUT = 8.0  # seconds for a request; a lease of LIFETIME outlasts it
MIN_LIFETIME = 2.0  # seconds; with short intervals, the lease is shorter too
DEFAULT_INTERVAL = 60.0  # seconds between two rounds
MAX_PAUSE = 600.0  # seconds, even if Retry-After is longer


class Follower(LeasedLoop):
    """Follows Clerk in rounds. Of all processes that run a follower, one works."""

    def __init__(
        self, store: Store, settings: Settings, handled: HandledWrites, tell: Tell | None = None
    ) -> None:
        interval = settings.follow or DEFAULT_INTERVAL
        lifetime = min(LIFETIME, max(MIN_LIFETIME, 2 * interval))
        super().__init__(Lease(store, FOLLOWER, lifetime), interval, tell)
        self._store, self._settings, self._handled = store, settings, handled

    def begin(self) -> None:
        """Load the certificates, and check the instance again in the first round."""
        url, key = self._settings.api_url, self._settings.secret_key or ""
        self._api = BackendApi(url, key, patience=0, share=SHARE, timeout=TIMEOUT)
        leased = LeasedSync(self._api, self._store, self.lease, self._handled, self.tell)
        self._round = Round(leased, self.interval)

    def work(self, held: Held) -> None:
        """Do a round."""
        try:
            self._round.run(held)
        finally:
            self._api.close_idle()  # Clerk would close the connection before the next round

    def find_pause(self, error: Exception) -> float | None:
        """Store why the round is incomplete, and return the time that Clerk asks for."""
        if isinstance(error, BackendApiError | WrongInstance | TooManyRefused):
            self._round.fail(error.reason)
        retry_after = getattr(error, "retry_after", None)
        return min(MAX_PAUSE, retry_after) if retry_after else None

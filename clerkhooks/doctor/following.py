"""Checks of the follower, and of webhooks that did not arrive although users changed."""

from __future__ import annotations

from collections.abc import Iterator

from clerkhooks.doctor.findings import SERVICE, Finding, Level, Program, count
from clerkhooks.settings import Settings
from clerkhooks.store import Store
from clerkhooks.store.awaited import Missed
from clerkhooks.store.leases import Held
from clerkhooks.sync.progress import Progress, find_progress

MAX_AGE = 300.0  # seconds since the last round, or five times the interval
_ENDPOINT = (
    "See Clerk Dashboard → Webhooks → your endpoint. Is it enabled, and is its URL correct? Is it "
    "subscribed to user.created, user.updated and user.deleted, and to the events of organizations "
    "and memberships if CLERK_TABLES=organizations is set? Was its signing secret rotated? Then "
    "set CLERK_WEBHOOK_SECRET."
)
_FAULTS = {
    "wrong_instance": (
        "Clerk knows none of the newest and oldest users in the table, so the follower does "
        "nothing.",
        "CLERK_SECRET_KEY probably belongs to another instance: Clerk Dashboard → API keys. If all "
        "of these users were deleted, run: {command} sync --force",
    ),
    "users_refused": (
        "A handler or a constraint of the application refuses more than 100 users, so the follower "
        "does not continue.",
        "See object_not_followed in the log.",
    ),
    "deletions_withheld": (
        "The follower found more deletions than it may write within a day: more than 20 and more "
        "than a tenth of all users, organizations or memberships.",
        "Check that CLERK_SECRET_KEY is correct. To write the deletions, run: {command} sync, and "
        "if it asks for it, {command} sync --force",
    ),
}
_OTHER_FAULT = (
    "The follower cannot read Clerk's Backend API ({reason}).",
    "See what {command} sync reports.",
)


def judge_following(store: Store, settings: Settings, program: Program) -> Iterator[Finding]:
    """Check the follower, if there is a secret key."""
    if settings.secret_key is None:
        return
    found = find_progress(store)
    age = None if found is None else (found[0].now - (found[0].completed_at or 0)) / 1000
    max_age = max(MAX_AGE, 5 * settings.follow)
    if not settings.follow and (age is None or age > max_age):
        return  # it is switched off, here and elsewhere
    if found is None:
        what = "Changes are not read from Clerk's Backend API: no follower has run yet."
        start = "Start the service with gunicorn, or run" if program is SERVICE else "Run"
        remedy = f"{start}: {program.command} sync --follow"
        yield Finding("follower_never_ran", Level.WARNING, "follower", what, remedy)
        return
    yield _judge_progress(*found, max_age, program)
    yield _judge_missed(store.awaited.count())


def _judge_progress(held: Held, progress: Progress, max_age: float, program: Program) -> Finding:
    subject = "follower"
    if progress.fault is not None:
        what, remedy = _FAULTS.get(progress.fault, _OTHER_FAULT)
        texts = {"command": program.command, "reason": progress.fault}
        what, remedy = what.format(**texts), remedy.format(**texts)
        return Finding(f"follower_{progress.fault}", Level.ERROR, subject, what, remedy)
    if held.completed_at is None:
        what = "The follower is reading everything for the first time."
        return Finding("follower_begins", Level.OK, subject, what)
    age = (held.now - held.completed_at) / 1000
    if age > max_age:
        minutes = count(int(age // 60), "minute")
        what = f"The follower has not read the changes at Clerk for {minutes}."
        remedy = f"See round_failed in the log, or run: {program.command} sync --follow"
        return Finding("follower_stopped", Level.ERROR, subject, what, remedy)
    what = f"The follower last read the changes at Clerk {count(int(age), 'second')} ago."
    return Finding("follower_runs", Level.OK, subject, what)


def _judge_missed(found: Missed) -> Finding:
    if found.since is None or found.last is None:
        what = "In the last 24 hours, no webhook for a change at Clerk has become overdue."
        return Finding("deliveries_complete", Level.OK, "webhooks", what)
    what = (
        f"No webhook arrived for {count(found.missed, 'change')} at Clerk, the first at "
        f"{found.since:%Y-%m-%d %H:%M} and the last at {found.last:%Y-%m-%d %H:%M} UTC. The "
        "follower has updated the tables."
    )
    return Finding("deliveries_missed", Level.ERROR, "webhooks", what, _ENDPOINT)

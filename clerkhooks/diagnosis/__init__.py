"""What integrators get wrong: each check looks at one thing, says what it found and how to mend it, and prints nothing."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from clerkhooks.diagnosis import configuration, database, instance
from clerkhooks.diagnosis.configuration import SECRET_VARIABLES
from clerkhooks.diagnosis.findings import Case as Case
from clerkhooks.diagnosis.findings import Finding as Finding
from clerkhooks.diagnosis.findings import Level as Level
from clerkhooks.errors import Fault, SettingsError, describe
from clerkhooks.settings import PROJECT, Settings

Check = Callable[[Case], Iterator[Finding]]
PLACEHOLDER = "whsec_" + base64.b64encode(bytes(24)).decode()
OUTSIDE_CHECKS: tuple[Check, ...] = (
    configuration.check_settings,
    configuration.check_names,
    configuration.check_env_file,
    configuration.check_webhook_secrets,
    configuration.check_instance,
    configuration.check_authorized_parties,
    instance.check_keys,
    instance.check_clock,
    instance.check_secret_key,
    database.check_database_url,
)
"""Everything but the database itself, which a running service asks by its own connections."""


def diagnose(
    environ: Mapping[str, str],
    *,
    checks: Sequence[Check] = (*OUTSIDE_CHECKS, database.check_database),
    unread: Sequence[Fault] = (),
    project: Path = PROJECT,
) -> Iterator[Finding]:
    """
    Everything that *checks* find in *environ* and behind it, well or not, check by check.

    *unread*: faults that were met before, such as those of a .env file. Takes at most some seconds a check, changes nothing
    and raises nothing.
    """
    settings, faults = read_settings(environ)
    case = Case(environ, settings, (*unread, *faults), project)
    for check in checks:
        try:
            yield from check(case)
        except Exception as error:  # noqa: BLE001  # one check that breaks on odd settings must not hide the others
            yield Finding(
                "check_broken",
                Level.WRONG,
                check.__name__.removeprefix("check_"),
                f"This check broke: {describe(error)}.",
                "Look at the findings above first.",
            )


def read_settings(environ: Mapping[str, str]) -> tuple[Settings, tuple[Fault, ...]]:
    """What is good in *environ*, and what is not. Where no signing secret is good, a placeholder stands for it."""
    try:
        return Settings.from_environ(environ), ()
    except SettingsError as error:
        faults = error.faults
    wrong = {fault.variable for fault in faults}
    usable = {name: value for name, value in environ.items() if name not in wrong | {"DYNO"}}
    if wrong.intersection(SECRET_VARIABLES):
        usable[SECRET_VARIABLES[0]] = PLACEHOLDER
    return Settings.from_environ(usable), faults

"""Checks for common integration mistakes. A check yields findings and prints nothing."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clerkhooks.doctor import configuration, database, instance
from clerkhooks.doctor.findings import APPLICATION as APPLICATION
from clerkhooks.doctor.findings import SERVICE as SERVICE
from clerkhooks.doctor.findings import Case as Case
from clerkhooks.doctor.findings import Finding as Finding
from clerkhooks.doctor.findings import Level as Level
from clerkhooks.doctor.findings import Program as Program
from clerkhooks.errors import Fault, SettingsError, describe
from clerkhooks.settings import EPHEMERAL_PLATFORMS, PROJECT, SECRET_VARIABLES, Settings

Check = Callable[[Case], Iterator[Finding]]
PLACEHOLDER = "whsec_" + base64.b64encode(bytes(24)).decode()
OUTSIDE_CHECKS: tuple[Check, ...] = (
    configuration.check_settings,
    configuration.check_names,
    configuration.check_env_file,
    configuration.check_webhook_secrets,
    configuration.check_instance,
    configuration.check_authorized_parties,
    instance.check_proxies,
    instance.check_keys,
    instance.check_clock,
    instance.check_secret_key,
    instance.compare_instances,
    database.check_database_url,
)
"""All checks except ``check_database``: a running program uses its own pool for that check."""


def diagnose(
    values: Mapping[str, Any],
    *,
    checks: Sequence[Check] = (*OUTSIDE_CHECKS, database.check_database),
    program: Program = SERVICE,
    unread: Sequence[Fault] = (),
    project: Path = PROJECT,
) -> Iterator[Finding]:
    """
    Run *checks* on the variables in *values*, and yield all findings, including ok ones.

    *unread* lists faults that were found earlier, such as an unreadable ``.env``. Every request
    and query has a timeout. No check changes anything. If a check raises an exception, a finding
    reports it.
    """
    settings, faults = _read_settings(values, program.settings)
    case = Case(values, settings, (*unread, *faults), project, program)
    for check in checks:
        try:
            yield from check(case)
        except Exception as error:  # noqa: BLE001  # one failing check must not hide the others
            name = check.__name__.removeprefix("check_")
            what = f"This check failed: {describe(error)}."
            remedy = "Resolve the findings above first."
            yield Finding("check_broken", Level.ERROR, name, what, remedy)


def _read_settings(
    values: Mapping[str, Any], kind: type[Settings]
) -> tuple[Settings, tuple[Fault, ...]]:
    """
    Return the settings from the valid variables in *values*, and a fault for each problem.

    A placeholder replaces an invalid signing secret, so that the other settings can be checked.
    """
    try:
        return kind.from_mapping(values), ()
    except SettingsError as error:
        faults = error.faults
    invalid = {fault.variable for fault in faults}
    # Platform variables are left out too. Otherwise, a missing or invalid
    # DATABASE_URL would raise SettingsError again.
    left_out = invalid | EPHEMERAL_PLATFORMS.keys()
    usable = {name: values.get(name) for name in values if name not in left_out}
    if invalid.intersection(SECRET_VARIABLES):
        usable[SECRET_VARIABLES[0]] = PLACEHOLDER
    return kind.from_mapping(usable), faults

"""``clerkhooks doctor``: what is wrong here, and how to mend it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import click

from clerkhooks.cli.demonstration import mark
from clerkhooks.cli.options import json_option, printable
from clerkhooks.diagnosis import Finding, Level, diagnose
from clerkhooks.errors import Fault, SettingsError
from clerkhooks.settings import load_dotenv_file

_COLOURS = {Level.OK: "green", Level.WARNING: "yellow", Level.WRONG: "red", Level.SKIPPED: "bright_black"}


@click.command()
@json_option
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """
    Check everything that is easily set up wrong, and say how to mend it.

    Works where the service itself refuses to start. Reads the environment and .env, asks Clerk and the database a few
    questions, changes nothing, and shows no secret.

    Status: 0 if nothing is wrong, warnings or not; 1 if anything is.
    """
    findings = []
    for finding in diagnose(os.environ, unread=_load_dotenv()):
        findings.append(finding)
        if not as_json:
            _show(finding)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _sum_up(findings)
    context.exit(1 if any(finding.level is Level.WRONG for finding in findings) else 0)


def _load_dotenv() -> tuple[Fault, ...]:
    try:
        load_dotenv_file()
    except SettingsError as error:
        return error.faults
    return ()


def _show(finding: Finding) -> None:
    colour = _COLOURS[finding.level]
    click.echo(f"  {click.style(_sign(finding.level), fg=colour)} {printable(finding.subject):<24} {printable(finding.what)}")
    if finding.remedy:
        click.secho(f"      {printable(finding.remedy)}", fg=colour)


def _sign(level: Level) -> str:
    return {Level.WARNING: "!", Level.SKIPPED: "-"}.get(level) or mark(level is Level.OK)


def _sum_up(findings: list[Finding]) -> None:
    wrong, warnings, skipped = (
        sum(finding.level is level for finding in findings) for level in (Level.WRONG, Level.WARNING, Level.SKIPPED)
    )
    verdict = f"{mark(not wrong)} {f'{wrong} wrong' if wrong else 'Nothing is wrong'}"
    click.secho(f"\n{verdict}; {warnings} warning{'' if warnings == 1 else 's'}, {skipped} skipped.", bold=True)

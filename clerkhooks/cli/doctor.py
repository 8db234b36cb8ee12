"""``clerkhooks doctor``: find mistakes in the configuration and explain how to fix them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import click

from clerkhooks.cli.options import json_option, mark, printable
from clerkhooks.doctor import Finding, Level, diagnose
from clerkhooks.errors import Fault, SettingsError
from clerkhooks.settings import PROJECT, read_environ

_COLOURS = {
    Level.OK: "green",
    Level.WARNING: "yellow",
    Level.ERROR: "red",
    Level.SKIPPED: "bright_black",
}


@click.command()
@json_option
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """
    Check the configuration, the keys, the clock and the database.

    This command works even if the service does not start. It reads the environment and .env, and
    sends a few requests to Clerk and a few queries to the database. It changes nothing and prints
    no secrets.

    Exit status: 0 if there are no errors, 1 otherwise.
    """
    findings = []
    values, faults = _read_environ()
    for finding in diagnose(values, unread=faults, project=PROJECT):
        findings.append(finding)
        if not as_json:
            _show(finding)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _sum_up(findings)
    context.exit(1 if any(finding.level is Level.ERROR for finding in findings) else 0)


def _read_environ() -> tuple[dict[str, str], tuple[Fault, ...]]:
    try:
        return read_environ(PROJECT), ()
    except SettingsError as error:
        return dict(os.environ), error.faults


def _show(finding: Finding) -> None:
    colour = _COLOURS[finding.level]
    sign = click.style(_sign(finding.level), fg=colour)
    click.echo(f"  {sign} {printable(finding.subject):<24} {printable(finding.what)}")
    if finding.remedy:
        click.secho(f"      {printable(finding.remedy)}", fg=colour)


def _sign(level: Level) -> str:
    return {Level.WARNING: "!", Level.SKIPPED: "-"}.get(level) or mark(level is Level.OK)


def _sum_up(findings: list[Finding]) -> None:
    levels = [finding.level for finding in findings]
    errors, warnings = levels.count(Level.ERROR), levels.count(Level.WARNING)
    counts = f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"
    skipped = f"{levels.count(Level.SKIPPED)} skipped"
    click.secho(f"\n{mark(not errors)} {counts}, {skipped}.", bold=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

"""The ``clerkhooks`` command, with all of the service's subcommands."""

from __future__ import annotations

import os

import click
from flask import Flask
from flask.cli import ScriptInfo

from clerkhooks.cli.commands import clerk
from clerkhooks.cli.dev import dev
from clerkhooks.cli.doctor import doctor
from clerkhooks.cli.serve import serve


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def main(context: click.Context) -> None:
    """Keep a users table in sync with Clerk."""
    context.obj = ScriptInfo(create_app=_create_service)
    if os.environ.get("NO_COLOR"):
        context.color = False


def _create_service() -> Flask:
    from clerkhooks import create_app

    return create_app()


for command in (dev, doctor, serve, *clerk.commands.values()):
    main.add_command(command)

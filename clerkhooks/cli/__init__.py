"""The commands: ``clerkhooks``, also as ``python -m clerkhooks``."""

from __future__ import annotations

import os

import click

from clerkhooks.cli import dev, doctor


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def main(context: click.Context) -> None:
    """Keep a users table that is always what Clerk says."""
    if os.environ.get("NO_COLOR"):
        context.color = False


main.add_command(dev.dev)
main.add_command(doctor.doctor)

"""``flask users``: the table of users."""

from __future__ import annotations

from flask.cli import AppGroup

from clerkhooks.cli.sync import sync

users = AppGroup("users", help="The table of users.")
users.add_command(sync)

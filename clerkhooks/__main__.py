"""Run the commands with ``python -m clerkhooks``, even if the package is not installed."""

from __future__ import annotations

from clerkhooks.cli.main import main

if __name__ == "__main__":
    main()

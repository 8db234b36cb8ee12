"""The application that gunicorn and flask load."""

from clerkhooks import create_app

app = create_app()

"""What gunicorn and flask load. Register your own blueprints here."""

from clerkhooks import create_app

app = create_app()

"""An application that generates its own migrations in a database shared with others."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.settings import PROJECT
from clerkhooks.testing import ClerkService
from clerkhooks.web.state import disconnect
from tests.applications.support import check_users_stay_correct
from tests.backend import Backend
from tests.server import environ
from tests.support import rows

pytestmark = pytest.mark.slow
BOOKSHOP = Path(__file__).with_name("bookshop.py")
PLAN = '    plan: Mapped[str] = mapped_column(server_default="free")\n'
USERNAME = '    username: Mapped[str | None] = from_clerk("username")\n'
FOREIGN = (
    "CREATE TABLE invoices (number integer PRIMARY KEY, amount integer)",
    "CREATE INDEX ix_invoices_amount ON invoices (amount)",
    "INSERT INTO invoices VALUES (1, 12)",
)


@dataclass
class Checkout:
    """A copy of the bookshop's code in a separate folder, and its database."""

    folder: Path
    url: str
    variables: dict[str, str]

    @property
    def code(self) -> Path:
        """The application's module."""
        return self.folder / "bookshop.py"

    def flask(self, *command: str) -> str:
        """Run a flask command in the folder; return its output."""
        done = subprocess.run(
            [sys.executable, "-m", "flask", "--app", "bookshop", *command],
            cwd=self.folder,
            env=environ(**self.variables, PYTHONPATH=str(PROJECT)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def migrations(self) -> list[str]:
        """Return the text of every migration."""
        return [path.read_text() for path in (self.folder / "migrations" / "versions").glob("*.py")]

    def add_column(self) -> None:
        """Declare another column from Clerk."""
        text = self.code.read_text()
        assert PLAN in text
        self.code.write_text(text.replace(PLAN, PLAN + USERNAME))


@pytest.fixture
def checkout(
    url: str, clerk: FakeClerk, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Checkout]:
    """Copy the bookshop, and create a database with another program's table."""
    for statement in FOREIGN:
        rows(url, statement)
    uri = url.replace("postgresql://", "postgresql+psycopg://", 1)
    variables = clerk.environ | backend.environ | {"DATABASE_URL": uri}
    (tmp_path / "bookshop.py").write_text(BOOKSHOP.read_text())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield Checkout(tmp_path, url, variables)
    assert rows(url, "SELECT * FROM invoices") == [(1, 12)]


def load(checkout: Checkout) -> Any:
    """Import the current version of the bookshop's module."""
    spec = importlib.util.spec_from_file_location("bookshop", checkout.code)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bookshop"] = module  # SQLAlchemy resolves annotations there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["bookshop"]
    return module


def test_generates_migrations_that_run_unedited(
    checkout: Checkout, clerk: FakeClerk, backend: Backend
) -> None:
    """
    ``flask db init``, ``migrate`` and ``upgrade`` succeed without edits.

    Afterwards, ``migrate`` detects no changes. If a column is declared later, a migration adds it
    and a sync fills it.
    """
    checkout.flask("db", "init")
    checkout.flask("db", "migrate", "-m", "first")
    [first] = checkout.migrations()
    assert "invoices" not in first
    assert "clerkhooks" not in first
    for table in ("users", "webhook_messages", "orders"):
        assert f"op.create_table('{table}'" in first
    checkout.flask("db", "upgrade")
    assert "No changes in schema detected" in checkout.flask("db", "migrate")

    app = load(checkout).create_app()
    check_users_stay_correct(app, clerk)
    service = ClerkService(app, clerk)
    ada = backend.sign_up(clerk_id("user"), username="ada", public_metadata={"theme": "dark"})
    assert service.deliver("user.created", backend.users[ada]).get_json()["outcome"] == "applied"
    answer = service.client(ada).post("/orders")
    assert answer.get_json() == {"plan": "free", "orders": ["Notes by the Translator"]}
    disconnect(app)

    checkout.add_column()
    checkout.flask("db", "migrate", "-m", "second")
    [second] = [text for text in checkout.migrations() if text != first]
    assert second.count("add_column(") == 1
    assert "username" in second
    for other in ("invoices", "alter_column", "create_", "drop_table", "drop_index", "clerkhooks"):
        assert other not in second
    checkout.flask("db", "upgrade")
    assert "No changes in schema detected" in checkout.flask("db", "migrate")
    filled = f"SELECT username, plan, name FROM users WHERE id = '{ada}'"
    assert rows(checkout.url, filled) == [(None, "free", "Ada Lovelace")]
    checkout.flask("clerk", "sync", ada)
    assert rows(checkout.url, filled) == [("ada", "free", "Ada Lovelace")]

    app = load(checkout).create_app()
    check_users_stay_correct(app, clerk)
    disconnect(app)
    checkout.flask("db", "downgrade", "base")
    for table in ("users", "webhook_messages", "orders"):
        with pytest.raises(Exception, match=r"(?i)no such table|does not exist"):
            rows(checkout.url, f"SELECT 1 FROM {table}")

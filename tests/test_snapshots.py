"""``current_user``: a frozen copy of the row, with the model's properties and methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.hybrid import hybrid_method, hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, Mapper, mapped_column, relationship

from clerkhooks import ClerkUser, current_user, from_clerk, require_auth
from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.store.snapshots import make_snapshots, read_columns
from clerkhooks.web.state import disconnect
from tests.application import Application
from tests.conftest import KINDS, MakeDatabase
from tests.support import user_event

ADVICE = r"db\.session\.get\(User, current_user\.id\)"
USER_ID = "user_29w83sxmDNGwOuEthce5gg56FcC"


class Base(DeclarativeBase):
    """The base of the models below."""


class Note(Base):
    """A row that belongs to a user."""

    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(sa.ForeignKey("users.id"))


class User(ClerkUser, Base):
    """A model with each kind of attribute that an application may define."""

    username: Mapped[str | None] = from_clerk("username")
    plan: Mapped[str] = mapped_column("plan_name", server_default="free")
    biography: Mapped[str | None] = mapped_column(deferred=True)
    notes: Mapped[list[Note]] = relationship()

    limits = {"free": 3, "pro": 100}  # noqa: RUF012

    @property
    def greeting(self) -> str:
        """A property that reads a column."""
        return f"Hello {self.name}"

    @cached_property
    def initial(self) -> str:
        """A cached property."""
        return self.name[0]

    @property
    def note_count(self) -> int:
        """A property that reads a relationship."""
        return len(self.notes)

    def may_write(self, count: int) -> bool:
        """Read another property and a class attribute."""
        return self.is_paying or count < self.limits[self.plan]

    @hybrid_property
    def is_paying(self) -> bool:
        """A hybrid property."""
        return self.plan != "free"

    @hybrid_method
    def has_plan(self, plan: str) -> bool:
        """Compare a column in a hybrid method."""
        return self.plan == plan

    @classmethod
    def table_name(cls) -> str:
        """Return a class attribute from a class method."""
        return str(cls.__tablename__)

    @staticmethod
    def shout(text: str) -> str:
        """Return *text* in upper case from a static method."""
        return text.upper()

    def rename(self) -> None:
        """Write to a column."""
        self.name = "Eve"


MAPPER: Mapper[Any] = sa.inspect(User)
COLUMNS = read_columns(MAPPER)
make = make_snapshots(MAPPER, COLUMNS)


def snapshot(**values: Any) -> Any:
    """Return a snapshot of a row with these values, keyed by attribute name."""
    row = {"id": USER_ID, "name": "Ada", "plan": "free"} | values
    return make([row.get(MAPPER.get_property_by_column(column).key) for column in COLUMNS])


def test_has_the_columns_of_the_model() -> None:
    """The snapshot contains declared and application columns under their attribute names."""
    user = snapshot(username="ada", email="ada@example.org")
    assert (user.id, user.name, user.email, user.username, user.plan) == (
        USER_ID,
        "Ada",
        "ada@example.org",
        "ada",
        "free",
    )
    assert user.deleted_at is None


@pytest.mark.parametrize("name", ["version_updated_at", "version_timestamp", "version_message_id"])
def test_has_no_version_columns(name: str) -> None:
    """Version columns are internal and not part of the copy."""
    assert name not in {column.name for column in COLUMNS}
    with pytest.raises(AttributeError, match=name):
        getattr(snapshot(), name)


def test_does_not_load_deferred_columns() -> None:
    """A deferred column is never loaded for a snapshot, and reading it raises an error."""
    assert "biography" not in {column.name for column in COLUMNS}
    with pytest.raises(AttributeError, match=ADVICE):
        _ = snapshot().biography


@pytest.mark.parametrize("name", ["name", "plan", "email", "version_timestamp", "notes", "new"])
def test_cannot_be_written(name: str) -> None:
    """Writing to the copy raises an error that says how to change the row."""
    user = snapshot()
    with pytest.raises(AttributeError, match=f"read-only copy.*{name}.*{ADVICE}"):
        setattr(user, name, "x")
    with pytest.raises(AttributeError, match=f"read-only: {name} cannot be deleted"):
        delattr(user, name)
    assert (user.name, user.plan) == ("Ada", "free")


def test_cannot_be_written_by_the_models_own_methods() -> None:
    """A method of the model that assigns a column raises the read-only error."""
    user = snapshot()
    with pytest.raises(AttributeError, match=ADVICE):
        user.rename()
    assert user.name == "Ada"


def test_has_the_properties_and_methods_of_the_model() -> None:
    """Properties and methods work on the copy as they do on the row."""
    free, paying = snapshot(), snapshot(plan="pro")
    assert (free.greeting, free.initial) == ("Hello Ada", "A")
    assert [user.is_paying for user in (free, paying)] == [False, True]
    assert [user.has_plan("pro") for user in (free, paying)] == [False, True]
    assert [user.may_write(3) for user in (free, paying)] == [False, True]
    assert free.may_write(2)
    assert (free.table_name(), free.shout("ada"), free.limits) == ("users", "ADA", User.limits)


@pytest.mark.parametrize("read", [lambda user: user.notes, lambda user: user.note_count])
def test_refuses_relationships_with_advice(read: Callable[[Any], object]) -> None:
    """A copy has no database session; the error says how to load the row."""
    with pytest.raises(AttributeError, match=f"'notes'.*relationships.*{ADVICE}"):
        read(snapshot())


@pytest.mark.parametrize("name", ["nmae", "_private", "mro", "__html__", "__len__"])
def test_refuses_an_unknown_attribute(name: str) -> None:
    """An unknown attribute or special method raises AttributeError, so that ``hasattr`` works."""
    with pytest.raises(AttributeError):
        getattr(snapshot(), name)
    assert not hasattr(snapshot(), name)


def test_shows_its_id_only() -> None:
    """The representation contains no profile data, because it may reach a log."""
    user = snapshot(email="ada@example.org", username="ada")
    assert repr(user) == str(user) == f"{user}" == f"<User {USER_ID}>"


def test_compares_by_all_columns() -> None:
    """
    Copies with equal columns are equal and have the same hash.

    A copy is not equal to a row, or to a copy of another state or user.
    """
    user = snapshot()
    assert user == snapshot()
    assert len({user, snapshot()}) == 1
    for other in (snapshot(name="Eve"), snapshot(plan="pro"), snapshot(id="user_2"), USER_ID, None):
        assert user != other
    assert user != User(id=USER_ID, name="Ada", plan="free")


@pytest.fixture(params=KINDS)
def application(
    request: pytest.FixtureRequest, make_database: MakeDatabase, clerk: FakeClerk
) -> Iterator[Application]:
    """An application that declares a column, on a database of each kind."""
    columns = {"username": from_clerk("username", sa.Text)}
    application = Application(clerk, make_database(request.param), columns)
    application.create_all()
    yield application
    disconnect(application.app)


def test_is_current_user_behind_require_auth(application: Application) -> None:
    """Both ``clerkhooks.current_user`` and ``hooks.current_user`` give the snapshot."""
    user_id = clerk_id("user")
    seen: list[Any] = []

    @require_auth
    def view() -> dict[str, Any]:
        user = application.hooks.current_user
        assert current_user == user
        assert repr(current_user) == f"<User {user_id}>"
        with pytest.raises(AttributeError, match=ADVICE):
            current_user.name = "Eve"
        with pytest.raises(AttributeError, match=ADVICE):
            _ = current_user.version_timestamp
        seen.append(user)
        return {"name": user.name, "username": user.username}

    application.app.add_url_rule("/view", view_func=view)
    application.outcome(user_event(user_id, username="ada"))
    for _ in range(2):
        answer = application.call(user_id, path="/view").get_json()
        assert answer == {"name": "Ada Lovelace", "username": "ada"}
    first, second = seen
    assert first.id == second.id == user_id
    assert (first == second) is (first.last_seen == second.last_seen)
    assert stored_name(application, user_id) == "Ada Lovelace"


def stored_name(application: Application, user_id: str) -> Any:
    """Return the name in the user's row."""
    found = application.user(user_id, ["name"])
    assert found is not None
    return found[0]

"""The service refuses an unwritable SQLite file, and handles functions that are added to it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
from flask import Flask, Response, after_this_request
from sqlalchemy import make_url

from clerkhooks import SettingsError
from clerkhooks.service import _check_sqlite_folder
from clerkhooks.settings import DEFAULT_DATABASE_URL
from tests.support import Service


def make_app(instance: Path) -> Flask:
    """Create an application with the instance folder *instance*."""
    return Flask("clerkhooks", instance_path=str(instance))


def test_creates_the_instance_folder(tmp_path: Path) -> None:
    """The default SQLite file needs no preparation."""
    _check_sqlite_folder(make_app(tmp_path / "a" / "instance"), make_url(DEFAULT_DATABASE_URL))
    assert (tmp_path / "a" / "instance").is_dir()


@pytest.mark.parametrize(
    "url", ["postgresql://db.example.com/name", "sqlite:///file:x.db?uri=true"]
)
def test_does_not_check_other_databases(tmp_path: Path, url: str) -> None:
    """PostgreSQL has no folder to check, and the folder in a ``file:`` URI is not checked."""
    _check_sqlite_folder(make_app(tmp_path / "instance"), make_url(url))
    assert not (tmp_path / "instance").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (DEFAULT_DATABASE_URL, "is not set, and its default is a SQLite file"),
        ("sqlite:///other.db", "is a SQLite file"),
        ("sqlite:////proc/nowhere/x.db", "is a SQLite file in /proc/nowhere"),
    ],
)
def test_refuses_a_folder_that_cannot_be_written(tmp_path: Path, url: str, message: str) -> None:
    """The service does not start. The error names the variable and suggests PostgreSQL."""
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=f"DATABASE_URL {message}") as raised:
        _check_sqlite_folder(make_app(tmp_path / "file" / "instance"), make_url(url))
    assert "PostgreSQL" in str(raised.value)


def test_keeps_no_function_of_a_request(service: Service) -> None:
    """A function that a request registers is called once, may be unhashable, and is freed."""
    kept: list[weakref.ref[object]] = []

    class Marker(list[object]):  # a list is unhashable
        def __call__(self, response: Response) -> Response:
            response.headers["X-Marker"] = "set"
            return response

    @service.app.before_request
    def register() -> None:
        marker = Marker()
        kept.append(weakref.ref(marker))
        after_this_request(marker)
        after_this_request(lambda response: marker(response))

    answers = [service.http.get("/healthz") for _ in range(3)]
    gc.collect()
    assert [answer.headers.get("X-Marker") for answer in answers] == ["set"] * 3
    assert [ref() for ref in kept] == [None] * 3

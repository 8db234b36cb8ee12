"""
Parse ``DATABASE_URL``.

The syntaxes of libpq, SQLAlchemy, node-postgres and hosting providers are supported.
"""

from __future__ import annotations

import os.path
import re
from typing import Any
from urllib.parse import quote, unquote

from sqlalchemy.engine import URL, create_engine, make_url
from sqlalchemy.exc import ArgumentError

_POSTGRESQL = re.compile(r"^postgres(ql(\+psycopg)?)?://")
_SEVERAL_HOSTS = re.compile(
    r"(postgres[^:]*://)([^/?#]*@)?([^/?#@]*,[^/?#@]*)(/[^?#@]*)?(?:\?(.*))?", re.DOTALL
)


def parse_database_url(text: str) -> str:
    """
    Return a database URL in SQLAlchemy's syntax.

    Raises:
        ValueError: the database is unsupported, or the URL is invalid.
    """
    try:
        url = make_url(_POSTGRESQL.sub("postgresql+psycopg://", _name_hosts_apart(text)))
    except (ArgumentError, ValueError):
        raise ValueError("is not a database URL.") from None
    if url.drivername == "postgresql+psycopg":
        return _parse_postgresql(url)
    if url.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise ValueError("names an unsupported database. Use PostgreSQL or SQLite.")
    if not url.database or ":memory:" in text or "mode=memory" in text:
        raise ValueError(
            "is an in-memory SQLite database, which is separate for each worker. Use a file."
        )
    path = url.database.removeprefix("file:")
    # Path.is_dir() would raise an error if a parent folder is not readable.
    if path.startswith("/") and not os.path.isdir(os.path.dirname(path)):  # noqa: PTH112, PTH120
        raise ValueError("names a SQLite file in a folder that does not exist.")
    _check_with_sqlalchemy(text)
    return text


def _name_hosts_apart(text: str) -> str:
    """Translate a URL with several hosts, ``//a:1,b:2/name``, to SQLAlchemy's syntax."""
    found = _SEVERAL_HOSTS.fullmatch(text)
    if found is None:
        return text
    scheme, user, hosts, path, query = found.groups()
    named = [f"host={host}" for host in hosts.split(",")]
    return f"{scheme}{user or ''}{path or ''}?{'&'.join([*named, *([query] if query else [])])}"


def _parse_postgresql(url: URL) -> str:
    query: dict[str, Any] = dict(url.query)
    if isinstance(query.get("options"), tuple):  # SQLAlchemy allows a repeated parameter
        query["options"] = " ".join(query["options"])
    query |= _translate_tls(query.pop("ssl", None), query.get("sslmode"))
    if url.host and "%" in url.host:  # in libpq's syntax, the folder of a Unix socket
        query["host"], url = unquote(url.host), url.set(host="")
    url = url.set(query=query)
    text = url.render_as_string(hide_password=False)
    _check_with_sqlalchemy(text)
    quoted = url.set(drivername="postgresql", database=quote(url.database or ""))
    _check_with_libpq(quoted.render_as_string(hide_password=False))
    return text


def _translate_tls(ssl: object, sslmode: object) -> dict[str, str]:
    """Translate the TLS options of node-postgres and hosting providers to libpq's."""
    if sslmode == "no-verify":
        return {"sslmode": "require"}
    if ssl is None or sslmode is not None:
        return {}
    modes = {"true": "require", "1": "require", "false": "disable", "0": "disable"}
    if ssl not in modes:
        raise ValueError("has an unknown value for ssl. Use sslmode, such as sslmode=require.")
    return {"sslmode": modes[str(ssl)]}


def _check_with_sqlalchemy(url: str) -> None:
    try:
        create_engine(url)  # checks the URL without connecting
    except (ArgumentError, ValueError, TypeError):  # the error message may quote a password
        raise ValueError("is not a database URL that SQLAlchemy accepts.") from None


def _check_with_libpq(url: str) -> None:
    from psycopg import ProgrammingError  # imported late, because gevent must monkey-patch first
    from psycopg.conninfo import conninfo_to_dict

    try:
        conninfo_to_dict(url)
    except ProgrammingError as error:
        unknown = re.search(r'invalid URI query parameter: "(\w{1,40})"', str(error))
        if unknown:
            problem = f"has a parameter that PostgreSQL does not know: {unknown[1]}."
            if unknown[1] == "pgbouncer":
                problem += " Remove it, and set DATABASE_POOLER=transaction instead."
            raise ValueError(problem) from None
        raise ValueError("is not a database URL that PostgreSQL's libpq accepts.") from None

"""
Copy all rows from one database to another, for instance from SQLite to PostgreSQL.

Stop the service first, and migrate the new database. Both URLs are SQLAlchemy URLs::

    python copy_tables.py sqlite:////path/to/clerkhooks.db postgresql+psycopg://user:password@host/name
"""

import sys

import sqlalchemy as sa

from clerkhooks.service import db  # in an application, import your own db and its models


def copy_tables(source_url: str, target_url: str) -> None:
    """Copy the rows of every table in one transaction, parents before children."""
    source, target = sa.create_engine(source_url), sa.create_engine(target_url)
    with source.connect() as reader, target.begin() as writer:
        for table in db.metadata.sorted_tables:
            for rows in reader.execute(sa.select(table)).mappings().partitions(1000):
                writer.execute(sa.insert(table), [dict(row) for row in rows])
    source.dispose()
    target.dispose()


if __name__ == "__main__":
    copy_tables(*sys.argv[1:])

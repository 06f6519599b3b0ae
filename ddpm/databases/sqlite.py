"""Addresses of SQLite files, for MLflow and for Prefect, whatever characters the path holds."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from ddpm.errors import InputError, without_password


def address_of(file: Path, query: str = "", driver: str = "") -> str:
    """The address of a database file. driver: such as "aiosqlite"; without one, Python's own sqlite3.

    SQLAlchemy 2.1 decodes %XX in an address and 2.0 doesn't, Prefect cuts the path at a #, and MLflow makes the parent folder of
    what follows `sqlite:///` as it is written. So a path with one of these goes in a form that all of them read alike.
    """
    if not set("%?#") & set(str(file)):
        return f"sqlite{driver and f'+{driver}'}:///{file}" + (query and f"?{query}")
    from sqlalchemy.engine import URL

    options = {**dict(parse_qsl(query)), "uri": "true"}
    url = URL.create(f"sqlite+{driver or 'pysqlite'}", database=file.as_uri(), query=options)
    return url.render_as_string(hide_password=False)


def file_of(address: str) -> Path | None:
    """The file of an SQLite address, or None for any other address. Raises InputError."""
    if not address.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        name = make_url(address).database
    except ArgumentError as error:
        raise InputError(f"{without_password(address)}: {' '.join(str(error).split())}") from None
    if not name or name == ":memory:":
        return None
    return Path(unquote(urlsplit(name).path) if name.startswith("file:") else name).resolve()

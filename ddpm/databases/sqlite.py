"""Converts paths of SQLite files to addresses for MLflow and Prefect, and back, for any characters in the path."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from ddpm.errors import InputError, without_password


def address_of(file: Path, query: str = "", driver: str = "") -> str:
    """Returns the address of a database file.

    For paths with %, ? or #, returns an address of another form, because programs read the usual form differently:
    SQLAlchemy 2.1 decodes %XX and 2.0 doesn't, Prefect cuts the path at a #, and MLflow creates the parent folder of the
    text after `sqlite:///`.

    Args:
        file: the database file.
        query: the options of the address, such as "timeout=60".
        driver: for example "aiosqlite"; "" means Python's own sqlite3.
    """
    if not set("%?#") & set(str(file)):
        return f"sqlite{driver and f'+{driver}'}:///{file}" + (query and f"?{query}")
    from sqlalchemy.engine import URL

    options = {**dict(parse_qsl(query)), "uri": "true"}
    url = URL.create(f"sqlite+{driver or 'pysqlite'}", database=file.as_uri(), query=options)
    return url.render_as_string(hide_password=False)


def file_of(address: str) -> Path | None:
    """Returns the file of an SQLite address, or None for any other address. Raises InputError for a malformed address."""
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

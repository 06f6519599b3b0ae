"""Completes the addresses of databases."""


def with_driver(uri: str) -> str:
    """Adds the installed driver, psycopg 3, to a PostgreSQL address that names no driver.

    SQLAlchemy 2.0 would load psycopg2 instead. Returns other addresses unchanged.
    """
    scheme, separator, rest = uri.partition("://")
    return f"postgresql+psycopg{separator}{rest}" if scheme == "postgresql" else uri

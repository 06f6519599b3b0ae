"""The addresses of databases."""


def with_driver(uri: str) -> str:
    """Adds the installed driver, psycopg 3, to the address of a PostgreSQL database that names none.

    SQLAlchemy 2.0 would look for psycopg2. Other addresses come back unchanged.
    """
    scheme, separator, rest = uri.partition("://")
    return f"postgresql+psycopg{separator}{rest}" if scheme == "postgresql" else uri

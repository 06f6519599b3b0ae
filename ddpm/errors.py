"""Defines InputError, the error for wrong input, and hides passwords in messages."""

import re

LONGEST = 750  # characters


class InputError(Exception):
    """Wrong input. The message says in one line what is wrong, where, and what to do.

    `ddpm` prints the message and exits with 2. The constructor escapes unprintable characters, such as a line break in a file's
    name. The constructor also cuts the middle out of a message of more than LONGEST characters, since a message may quote long
    input.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST:
            message = f"{message[: 2 * LONGEST // 3]} ... {message[-LONGEST // 3 :]}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def without_password(uri: str) -> str:
    """Removes the user and password before the host from a URI, and hides the values of password options.

    The password before the host may contain slashes, except in an http URI.
    """
    before = r"://[^/]*@" if uri.lower().startswith("http") else r"://[^/].*@"
    return re.sub(r"(?i)([?&]\w*password=)[^&]*", r"\1***", re.sub(before, "://", uri))

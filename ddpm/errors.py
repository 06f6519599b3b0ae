"""The one error a user can cause, and what its line must not show."""

import re

LONGEST = 750  # characters


class InputError(Exception):
    """Wrong input: what is wrong, where, and what to do, in one line. `ddpm` prints it and exits with code 2.

    What cannot be printed, such as a line break in a file's name, is shown escaped. Of a line that would fill the screen,
    since it quotes the input, the middle is left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST:
            message = f"{message[: 2 * LONGEST // 3]} ... {message[-LONGEST // 3 :]}"
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def without_password(uri: str) -> str:
    """What stands before the host goes: a database's password may hold slashes. So does one that is given as an option."""
    before = r"://[^/]*@" if uri.lower().startswith("http") else r"://[^/].*@"
    return re.sub(r"(?i)([?&]\w*password=)[^&]*", r"\1***", re.sub(before, "://", uri))

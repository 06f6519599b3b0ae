"""The one error a user can cause."""


class InputError(Exception):
    """Wrong input: what is wrong, where, and what to do, in one line. `ddpm` prints it and exits with code 2.

    What cannot be printed, such as a line break in a file's name, is shown escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))

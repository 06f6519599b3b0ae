"""The one error a user can cause."""


class InputError(Exception):
    """Wrong input: what is wrong, where, and what to do, in one line. `ddpm` prints it and exits with code 2."""

"""What a user can mend: it ends a program as a message and not as a traceback."""


class UserError(ValueError):
    """The text says what is wrong, where, and what mends it."""

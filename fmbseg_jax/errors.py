"""The error that a program shows as one message, without a traceback."""


class UserError(ValueError):
    """Something the user can mend: the message says what was expected, what came, what to do."""

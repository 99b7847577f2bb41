"""What programs show as a message: an error, without a traceback; a notice, once."""


class UserError(ValueError):
    """Something the user can mend: the message says what was expected, what came, what to do."""


class Notice(UserWarning):
    """Something odd in what the user gave, and what was made of it; nothing has failed."""

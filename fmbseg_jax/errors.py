"""What programs show as a message: an error, without a traceback; a notice, once."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: the message says what was expected, what came, what to do."""


class Notice(UserWarning):
    """Something odd in what the user gave, and what was made of it; nothing has failed."""


class UnsupportedSystem(ImportError):
    """This is Windows, which lacks what a module needs."""


class NotFiniteError(UserError):
    """A model gives numbers that are NaN or infinite; the message says what to change."""

    @classmethod
    def of(cls, model: str, compute: str, field: str = "") -> NotFiniteError:
        """The error of a model that multiplied in `compute`, which `field` of the config sets."""
        found = f"{model} gives numbers that are NaN or infinite, computing in {compute}."
        if compute == "float16" and field:
            return cls(f"{found} Set {field} to bfloat16 or float32, whose range is wider.")
        return cls(f"{found} Its files are damaged: fetch them again, or give another model.")

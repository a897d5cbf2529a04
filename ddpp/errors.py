"""The one exception that reaches a person: it names what is wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input or an unusable file. Command lines print its text alone, without a traceback."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence: ``"; did you mean 'cifar10'?"`` for the closest of the known names, or a full stop."""
    plain = {option.lstrip("-"): option for option in known}  # dashes would make all options alike
    close = difflib.get_close_matches(name.lstrip("-"), plain, n=1)
    return f"; did you mean {plain[close[0]]!r}?" if close else "."

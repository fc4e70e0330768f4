"""Reading an architecture's text from left to right, with errors that name the position."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NoReturn

# At most six digits: a typing error must not become a body of a billion blocks.
_NUMBER = re.compile(r"[1-9][0-9]{0,5}(?![0-9])")


class TextError(ValueError):
    """The text does not continue as expected."""


class TextReader:
    """A position in a text. Every reading method advances it, or raises TextError and says what was expected there."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def skip(self, literal: str) -> bool:
        """Read ``literal`` if it comes next."""
        found = self.text.startswith(literal, self.position)
        self.position += len(literal) if found else 0
        return found

    def expect(self, literal: str, what: str) -> None:
        """Read ``literal``, which must come next; ``what`` names it in the error."""
        if not self.skip(literal):
            self.fail(what)

    def word(self, words: Sequence[str], what: str) -> str:
        """Read one of ``words``."""
        for word in words:
            if self.skip(word):
                return word
        self.fail(f"{what} ({', '.join(words)})")

    def number(self, what: str) -> int:
        """Read an integer from 1 to 999999 without leading zeros."""
        match = _NUMBER.match(self.text, self.position)
        if match is None:
            self.fail(f"{what} (1 to 999999)")
        self.position = match.end()
        return int(match.group())

    def end(self, what: str) -> None:
        """The text must end here."""
        if self.position != len(self.text):
            self.fail(what)

    def fail(self, expected: str, found: str | None = None, position: int | None = None) -> NoReturn:
        """Raise TextError. By default ``position`` is the current one and ``found`` is the text that follows it."""
        position = self.position if position is None else position
        rest = self.text[position : position + 12]
        found = found or (repr(rest) if rest else "the end")
        raise TextError(f"{self.text!r}, position {position}: expected {expected}, found {found}")

"""Text of the formula language → a tree of words with their positions. What the words mean is ``formula``'s concern.

formula    = "none" | term { ";" term }
term       = input ":" [ [ operation { ">" operation } ] "|" ] operation [ "*" number ]
operation  = name [ "(" argument { "," argument } ")" ]
argument   = [ name "=" ] ( number | name )
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from autodet.distill.values import ParamValue

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_TOKEN = re.compile(rf"(?P<space>\s+)|(?P<number>{_NUMBER})|(?P<name>[A-Za-z_][\w.]*)|(?P<sign>[:>|*;(),=])")


class FormulaError(ValueError):
    """A formula that cannot be read, or whose parts do not fit; the message says which term, why, and what would."""


@dataclass(frozen=True)
class Token:
    kind: str  # number, name, sign, end
    text: str
    position: int  # characters from the start of the text, from 1


@dataclass(frozen=True)
class Argument:
    name: str | None
    value: ParamValue
    position: int


@dataclass(frozen=True)
class OperationText:
    name: str
    arguments: tuple[Argument, ...]
    position: int


@dataclass(frozen=True)
class TermText:
    input: str
    transforms: tuple[OperationText, ...]
    distance: OperationText
    weight: float
    position: int


def read_terms(text: str) -> tuple[TermText, ...]:
    """The terms of a formula's text; none for ``none``. FormulaError names position and expectation."""
    tokens = _tokens(text)
    if [token.text for token in tokens] == ["none", ""]:
        return ()
    if len(tokens) == 1:
        raise FormulaError("The formula is empty: expected a term such as 'global: norm(c) | l2 * 1', or 'none'.")
    reader = _Reader(tokens)
    terms = [reader.term()]
    while not reader.at_end():
        reader.sign(";", "'*' and a weight, ';' and another term, or the end")
        if not reader.at_end():  # a ';' at the end is harmless
            terms.append(reader.term())
    return tuple(terms)


def read_operation(text: str) -> OperationText:
    """One operation, such as ``pool(2)``, with positions in this text."""
    reader = _Reader(_tokens(text))
    operation = reader.operation()
    if not reader.at_end():
        raise FormulaError(f"Expected one operation, found {text!r}.")
    return operation


def is_number(text: str) -> bool:
    """Whether a text is one number of the language."""
    return re.fullmatch(_NUMBER, text) is not None


def _tokens(text: str) -> list[Token]:
    tokens, start = [], 0
    while start < len(text):
        found = _TOKEN.match(text, start)
        if found is None:
            raise FormulaError(f"Character {start + 1} of the formula, {text[start]!r}, is not part of the language.")
        if found.lastgroup not in (None, "space"):
            tokens.append(Token(str(found.lastgroup), found.group(), start + 1))
        start = found.end()
    return [*tokens, Token("end", "", len(text) + 1)]


class _Reader:
    """Reads tokens from left to right."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._next = 0
        self._term = 0

    def at_end(self) -> bool:
        return self._peek().kind == "end"

    def term(self) -> TermText:
        self._term += 1
        name = self._take("name", "an input such as 'global'")
        self.sign(":", f"':' after the input {name.text!r}")
        if self._skip("|"):  # 'global: | l2' reads as 'global: l2'
            return TermText(name.text, (), self.operation(), self._weight(), name.position)
        operations = [self.operation()]
        while self._skip(">"):
            operations.append(self.operation())
        if self._skip("|"):
            transforms, distance = operations, self.operation()
        elif len(operations) == 1:
            transforms, distance = [], operations[0]
        else:
            self._fail("'|' and a distance after the transforms")
        return TermText(name.text, tuple(transforms), distance, self._weight(), name.position)

    def sign(self, sign: str, expected: str) -> None:
        if not self._skip(sign):
            self._fail(expected)

    def _weight(self) -> float:
        return float(self._take("number", "a weight, a number such as 0.5").text) if self._skip("*") else 1.0

    def operation(self) -> OperationText:
        name = self._take("name", "the name of a transform or distance")
        arguments: list[Argument] = []
        if self._skip("("):
            while not self._is(")"):
                arguments.append(self._argument())
                if not self._skip(","):
                    break
            self.sign(")", "',' or ')'")
        return OperationText(name.text, tuple(arguments), name.position)

    def _argument(self) -> Argument:
        first = self._peek()
        if first.kind == "name" and self._tokens[self._next + 1].text == "=":
            self._next += 2
            return Argument(first.text, self._value(), first.position)
        return Argument(None, self._value(), first.position)

    def _value(self) -> ParamValue:
        token = self._peek()
        if token.kind not in ("number", "name"):
            self._fail("a number or an axis")
        self._next += 1
        if token.kind == "name":
            return token.text
        return int(token.text) if re.fullmatch(r"[-+]?\d+", token.text) else float(token.text)

    def _peek(self) -> Token:
        return self._tokens[self._next]

    def _is(self, sign: str) -> bool:
        return self._peek().kind == "sign" and self._peek().text == sign

    def _skip(self, sign: str) -> bool:
        if not self._is(sign):
            return False
        self._next += 1
        return True

    def _take(self, kind: str, expected: str) -> Token:
        token = self._peek()
        if token.kind != kind:
            self._fail(expected)
        self._next += 1
        return token

    def _fail(self, expected: str) -> NoReturn:
        token = self._peek()
        found = repr(token.text) if token.text else "the end of the formula"
        raise FormulaError(f"Term {self._term}, character {token.position}: expected {expected}, found {found}.")

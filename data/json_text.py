"""JSON as rows are written in it: read strictly, in a stream, and with a remedy for what is broken.

Stricter than the `json` module: a key stands once in an object, a number is finite. What went wrong is told without a
traceback, however deep or long the text is.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from align_pipeline.data.address import number_of

MAX_ROW_BYTES = 64 * 2**20
"""A row of more bytes is refused, and never held in memory whole."""
MIB = f"{MAX_ROW_BYTES >> 20} MiB"


KEPT = 200
"""Characters that are kept of what cannot be read."""


class Bad(ValueError):
    """One row cannot be used; `problem` begins with the field, `cause` is the label that rows are counted under.

    `text` is the beginning of what stood there, where it could not be read as a row.
    """

    def __init__(self, problem: str, cause: str, text: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.cause = cause
        self.text = text

    def at(self, text: str) -> Bad:
        """Keep the beginning of what stands there."""
        self.text = text[:KEPT] or None
        return self


def not_utf8(byte: int, column: int) -> Bad:
    """Say which byte cannot be read; columns count characters from 1."""
    what = f"byte 0x{byte:02x} at column {column}"
    return Bad(f"not UTF-8 ({what}), rows are read as UTF-8; save the file as UTF-8", "encoding")


# One value.


class Strict:
    """A decoder for many values; the hooks only take notes, so that the common row costs no more than a dict."""

    def __init__(self) -> None:
        decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )
        self._decode, self._raw_decode = decoder.decode, decoder.raw_decode
        self._doubtful = False

    def line(self, text: str) -> Any:
        """Return the one value that a line holds, or the Bad that says why there is none."""
        rule = "each line must be one JSON object"
        self._doubtful = False
        try:
            value = self._decode(text)
            return _trouble(text).at(text) if self._doubtful else value
        except json.JSONDecodeError as error:
            what, remedy = _explain(error, "line")
            what = f"broken JSON ({what} at column {error.colno}), {rule}"
            return Bad(f"{what}; {remedy or 'fix the line or drop it'}", "broken JSON").at(text)
        except (ValueError, RecursionError) as error:
            return Bad(f"unusable JSON ({_unusable(error)}), {rule}; fix the line or drop it", "broken JSON").at(text)

    def value(self, text: str, at: int) -> tuple[Any, int]:
        """Return the value that begins at a place (or the Bad that it is) and where it ends; raise as `json` does."""
        self._doubtful = False
        value, end = self._raw_decode(text, at)
        return (_trouble(text[at:end]).at(text[at:end]) if self._doubtful else value), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            self._doubtful = True
        return record

    def _constant(self, name: str) -> None:
        self._doubtful = True

    def _float(self, digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            self._doubtful = True
        return number


class _Pairs(list[tuple[str, Any]]):
    """An object with all its keys."""


class _NoNumber(str):
    """What stands where a number should."""


def _float_or_not(digits: str) -> float | _NoNumber:
    number = float(digits)
    return _NoNumber(digits) if math.isinf(number) else number


_TELLING = json.JSONDecoder(object_pairs_hook=_Pairs, parse_constant=_NoNumber, parse_float=_float_or_not)


def _trouble(text: str) -> Bad:
    """Return the first double key, or the first number that is none, of a value that has one; with its path."""
    waiting: list[tuple[str, Any]] = [("", _TELLING.decode(text))]
    while waiting:  # no recursion: a value may be as deep as the parser can go
        path, value = waiting.pop()
        if isinstance(value, _NoNumber):
            what = f"{path or 'row'}: {value[:40]}, a number must be finite; write null or leave it out"
            return Bad(what, "not a number")
        if isinstance(value, _Pairs):
            seen = set()
            for key, _ in value:
                if key in seen:
                    rule = "a key may stand once; rename or remove one"
                    return Bad(f"{_path(path, key)}: stands twice in one object, {rule}", "duplicate key")
                seen.add(key)
            waiting.extend((_path(path, key), inner) for key, inner in reversed(value))
        elif isinstance(value, list):
            waiting.extend((f"{path}[{index}]", value[index]) for index in reversed(range(len(value))))
    raise AssertionError("the hooks took a note of nothing")


def _path(path: str, key: str) -> str:
    name = key[:60] if key.isprintable() and key else repr(key[:60])
    return f"{path}.{name}" if path else name


def _unusable(error: Exception) -> str:
    """Say in a user's words why a text that may be JSON cannot be read."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number of thousands of digits" if "digits" in str(error) else str(error)


_WHITE = " \t\r\n"
_FROM_PYTHON = "was it written by str() of Python? write it with json.dumps"
_HINTS = (
    (re.compile(r"'"), "a single quote", _FROM_PYTHON),
    (re.compile(r"(None|True|False|nan|inf)\b"), "a word of Python", _FROM_PYTHON),
    (re.compile(r"(//|/\*|#)"), "a comment", "JSON has no comments, remove it"),
    (re.compile("[\u201c\u201d\u201e]"), "a typographic quote", 'write straight double quotes (")'),
    (re.compile("\0"), "a NUL byte", "the copy or the disk lost what stood there, write it again or drop it"),
    (re.compile(r'(?<=")\w'), "text after a closing quote", 'write quotes inside a text as \\"'),
)
"""What may stand where JSON does not go on, what to call it, and what to do."""


def _explain(error: json.JSONDecodeError, unit: str) -> tuple[str, str]:
    """Return what is wrong, and the remedy where there is one; `unit` is what the text fills."""
    what, text, at = error.msg.rstrip(": "), error.doc, error.pos
    rest = text[at : at + 20].strip(_WHITE)
    if "control character" in what:
        return "a line break, tab or other control character in a text", r"write it as \n, \t or \u0000"
    if what.startswith("Invalid \\"):
        return what, r"write a backslash as \\"
    if what.startswith("Unterminated string"):
        return f"the {unit} ends inside a text", r"write the row again if it was cut off, a line break in a text as \n"
    if at >= len(text.rstrip(_WHITE)):
        remedy = "write the row again, it was cut off"
        if unit == "line" and text.strip(_WHITE) in ("{", "["):
            remedy = "write each row on one line, or name the file .json if it is an array"
        return f"the {unit} ends inside a row", remedy
    comma_before = rest.startswith(("]", "}")) and text[:at].rstrip(_WHITE).endswith(",")
    if comma_before or what.startswith("Illegal trailing comma"):
        return f"a comma before {rest.lstrip(',' + _WHITE)[:1]}", "remove the comma"
    if what == "Extra data" and rest == ",":
        return "a comma after the object", "remove the comma"
    if what == "Extra data" and rest.startswith(("{", ",")):
        return "a second object", "put each object on a line of its own, without commas"
    for pattern, name, remedy in _HINTS:
        if pattern.match(text, at):
            return name, remedy
    return what, ""


# An array, which need not fit in memory.

_SPACES = re.compile(f"[{_WHITE}]*")
_ESCAPED = re.compile("[\udc80-\udcff]")
"""Bytes that are not UTF-8: decoded to these, they spoil the row that holds them and no other."""
_NEAR_END = 16
"""An error so near to the end of what was read may come from what was not read yet: a number, a word or an escape."""
_WINDOW_BYTES = 2**16
"""How much is read on at least; the window grows with the row in it."""
_PEEK_BYTES = 8 * 2**20
"""How large an object may be that a .json file holds instead of an array, for its keys to be looked at."""


class _Window:
    """The part of a long text that is being looked at, and a place in it."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.text, self.at = "", 0
        self.damage: Bad | None = None
        """What ended the file before its end."""
        self._chunks, self._ended, self._spoiled = chunks, False, False
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._bytes = 0  # of self.text
        self._seen, self._line = 0, 1  # a place in self.text and its line
        self._column = 0  # characters that stand before self.text in its first line

    def line(self, at: int | None = None) -> int:
        """Return the line of the place, or of one behind it."""
        self._line += self.text.count("\n", self._seen, self.at)
        self._seen = self.at
        return self._line + (self.text.count("\n", self.at, at) if at else 0)

    def column(self, at: int) -> int:
        """Return the column of a place in the window."""
        newline = self.text.rfind("\n", 0, at)
        return at - newline if newline >= 0 else at + self._column + 1

    def peek(self) -> str:
        """Step over white space and return the character that stands there, or nothing at the end."""
        while True:
            found = _SPACES.match(self.text, self.at)
            assert found
            self.at = found.end()
            if self.at < len(self.text) or not self._grow():
                return self.text[self.at : self.at + 1]

    def value(self, strict: Strict, limit: int = MAX_ROW_BYTES) -> tuple[int, Any]:
        """Step over one value; return its line and what it is, or the Bad that says why it cannot be used.

        Raises JSONDecodeError, ValueError or RecursionError for what cannot be stepped over.
        """
        while True:
            try:
                value, end = strict.value(self.text, self.at)
            except json.JSONDecodeError as error:
                may_go_on = error.pos > len(self.text) - _NEAR_END or error.msg.startswith("Unterminated string")
                if not may_go_on:
                    raise
                if not self._grow(limit):
                    if self.damage:
                        raise self.damage from error
                    raise
                continue
            if end < len(self.text) or not self._grow(limit):
                break
        bad_byte = _ESCAPED.search(self.text, self.at, end) if self._spoiled else None
        line = self.line(bad_byte.start() if bad_byte else None)
        if bad_byte:
            value = self.not_utf8(bad_byte.start()).at(self.rest())
        self.at = end
        return line, value

    def rest(self) -> str:
        """Return the beginning of what stands at the place, without bytes that are not UTF-8."""
        return _ESCAPED.sub("\ufffd", self.text[self.at : self.at + KEPT])

    def not_utf8(self, at: int) -> Bad:
        return not_utf8(ord(self.text[at]) - 0xDC00, self.column(at))

    def _grow(self, limit: int = MAX_ROW_BYTES) -> bool:
        """Read on from the place until the window is twice as long; return False when the file has ended before."""
        if self._ended:
            return False
        self._forget()
        if self._bytes > limit:
            rule = "a row must be smaller; split it, and fix the file from here on"
            raise Bad(f"a row of more than {MIB}, {rule}", "too large")
        pieces, wanted = [self.text], max(2 * self._bytes, _WINDOW_BYTES)
        while not self._ended and self._bytes <= min(wanted, limit):
            pieces.append(self._next())
        self.text = "".join(pieces)
        return True

    def _next(self) -> str:
        try:
            chunk = next(self._chunks, b"")
        except Bad as damage:
            self.damage, chunk = damage, b""
        self._ended = not chunk
        self._bytes += len(chunk)
        text = self._decode(chunk, self._ended)
        self._spoiled = self._spoiled or (not text.isascii() and _ESCAPED.search(text) is not None)
        return text

    def _forget(self) -> None:
        """Drop what stands before the place."""
        if self.at:
            self.line()
            self._column = self.column(self.at) - 1
            self.text = self.text[self.at :]
            self._bytes = len(self.text.encode("utf-8", "surrogateescape"))
            self.at = self._seen = 0


def array_rows(chunks: Iterator[bytes], under: str | None = None) -> Iterator[tuple[int, Any]]:
    """Yield the place and the value of each element of an array; a Bad that cannot be stepped over is the last one.

    `under` names the key of an object that holds the array; what else the object holds is stepped over.

    A place is a line, with the number of the element where another one begins on that line before it (`address.py`).

    What is stepped over: double keys, numbers that are none, bytes that are not UTF-8. After a syntax error nobody can
    tell where the next row begins, so the reading ends there.
    """
    window, strict = _Window(chunks), Strict()
    try:
        if under is not None:
            yield from _placed(_member(window, strict, under))
        elif window.peek() in ("[", ""):
            yield from _placed(_elements(window, strict))
        else:
            begins = window.rest()
            yield 1, _no_array(window, strict).at(begins)
    except json.JSONDecodeError as error:
        line, broken = _broken(window, error)
        yield line, broken.at(window.rest())
    except Bad as bad:
        yield window.line(), bad.at(window.rest())
    except (ValueError, RecursionError) as error:
        what = f"unusable JSON ({_unusable(error)}); fix the file from here on"
        yield window.line(), Bad(what, "broken JSON").at(window.rest())


def _placed(rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Tell rows that begin on one line apart: all but its first get their place in the array too."""
    before = 0
    for index, (line, value) in enumerate(rows):
        yield number_of(line, index if line == before else None), value
        before = line


def _member(window: _Window, strict: Strict, under: str) -> Iterator[tuple[int, Any]]:
    """Yield the elements of the array that an object holds under a key, and read the object to its end."""
    expected, keys, rows = "{", list[str](), False
    while (found := window.peek()) == expected:
        window.at += 1
        if window.peek() == "}" and expected == "{":
            found = "}"
            break
        _, key = window.value(strict)
        if window.peek() != ":" or not isinstance(key, str):
            raise Bad(
                "broken JSON (the object does not go on with a key and :); fix the file from here on", "broken JSON"
            )
        window.at += 1
        begins = window.peek()
        if key == under and begins == "[":
            if rows:
                raise Bad(f"a second {under}, a key stands once in an object; join the lists", "broken JSON")
            rows = True
            yield from _elements(window, strict, last=False)
        else:
            window.value(strict)
            keys.append(key)
        expected = ","
    if window.damage:
        raise window.damage
    if found != "}":
        what = f"an object with the key {under}" if expected == "{" else "an object that goes on with , or }"
        raise Bad(f"not {what}, columns name the list under {under}; mend the file or the columns", "broken JSON")
    if not rows:
        known = ", ".join(keys[:10]) or "none"
        raise Bad(f"no list under {under}, columns name it; its other keys: {known}", "broken JSON")
    window.at += 1
    if window.peek():
        raise Bad("something stands after the object's }, a .json file holds one; join them", "broken JSON")


def _elements(window: _Window, strict: Strict, last: bool = True) -> Iterator[tuple[int, Any]]:
    expected = "["
    while (found := window.peek()) == expected:
        window.at += 1
        if window.peek() == "]" and expected == "[":
            found = "]"
            break
        yield window.value(strict)
        expected = ","
    if window.damage:
        raise window.damage
    if found == "]":
        window.at += 1
        if last and window.peek():
            what = "something stands after the array's ], a .json file holds one array; join them or use .jsonl"
            raise Bad(what, "broken JSON")
    elif expected == ",":
        raise Bad("broken JSON (the array does not go on with , or ]); fix the file from here on", "broken JSON")


def _broken(window: _Window, error: json.JSONDecodeError) -> tuple[int, Bad]:
    line, column = window.line(error.pos), window.column(error.pos)
    if _ESCAPED.match(window.text, error.pos):
        return line, window.not_utf8(error.pos)
    what, remedy = _explain(error, "file")
    what = f"broken JSON ({what} at column {column})"
    rule = f", nothing is read after it; {remedy}" if remedy else "; fix the file from here on"
    return line, Bad(what + rule, "broken JSON")


def _no_array(window: _Window, strict: Strict) -> Bad:
    """Say what a .json file holds that is no array, without guessing which part of it is meant."""
    remedy = "name it .jsonl when each line is a row"
    if window.peek() == "{":
        try:
            _, whole = window.value(strict, _PEEK_BYTES)
        except (ValueError, RecursionError):
            if window.damage:
                return window.damage
            remedy = f"write the list of rows alone, or {remedy}"
        else:
            if not window.peek() and isinstance(whole, dict):
                remedy = _list_in(whole) or f"{remedy}, or put [ ] around it"
    return Bad(f"not a JSON array, a .json file holds [row, row, ...]; {remedy}", "broken JSON")


def _list_in(whole: dict[str, Any]) -> str:
    lists = [key for key, value in whole.items() if isinstance(value, list) and any(type(one) is dict for one in value)]
    if lists:
        one = f"the list under {_path('', lists[0])}" if len(lists) == 1 else "one of its lists"
        return f"write {one} alone if it holds the rows, or name it .jsonl when each line is a row"
    if whole and all(isinstance(value, dict) and "0" in value for value in whole.values()):
        return 'it holds columns: write rows, as with to_json(orient="records") of pandas'
    return ""

"""Rows of JSON: a row on each line, or a list of rows that is read piece by piece.

What is no JSON is an error with line and column. So is a key that stands twice in one object, as one of the two would be lost.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from pipeline.errors import DataError
from pipeline.pairs.reading.misnamed import not_utf8
from pipeline.pairs.reading.remote import File

Row = dict[str, Any]

_PIECE = 1 << 20
# so near the end of what was read, an error may be the end's own
_NEAR_END = 16


class _KeyTwice(ValueError):
    """A key that stands twice in one object."""


def jsonl_rows(lines: Iterable[bytes], path: File, first: int = 1) -> Iterator[Row]:
    """A row for each line that is not blank; `first` is the number of the first line."""
    for number, line in enumerate(lines, start=first):
        if line.strip(b" \t\r\n\xef\xbb\xbf" if number == 1 else b" \t\r\n"):
            yield _must_be_object(_decoded(path, line, number), f"{path}, line {number}")


def jsonl_rows_between(file: BinaryIO, path: File, begin: int, end: int) -> Iterator[Row]:
    """A row for each line that is not blank and that begins at one of the bytes `begin` to `end`."""
    if begin:
        file.seek(begin - 1)
        file.readline()
    start = file.tell()
    try:
        # whatever its number is, it is not the first of the file
        yield from jsonl_rows(_lines(file, end), path, first=2 if begin else 1)
    except DataError:
        # lines are counted when somebody wants to know, as all before would have to be read
        file.seek(0)
        before = sum(file.read(min(_PIECE, start - at)).count(b"\n") for at in range(0, start, _PIECE))
        for _ in jsonl_rows(_lines(file, end), path, before + 1):
            pass
        raise


def _lines(file: BinaryIO, end: int) -> Iterator[bytes]:
    """The lines from here on that begin before byte `end`."""
    at = file.tell()
    while at < end and (line := file.readline()):
        at += len(line)
        yield line


def json_rows(content: BinaryIO, path: File) -> Iterator[Row]:
    """The rows of a list, of an object that holds one list, or of objects one after the other."""
    text = _Text(content, path)
    opening = text.peek()
    if opening == "[":
        yield from _list(text, path)
    elif opening == "{":
        first = text.value()
        if not text.peek():
            yield from _object(first, path)
            return
        yield _must_be_object(first, f"{path}, row 0")
        number = 1
        while text.peek():
            yield _must_be_object(text.value(), f"{path}, row {number}")
            number += 1
    elif opening:
        raise DataError(f"{path}: a JSON file must hold a list of rows, got {type(text.value()).__name__}")


def _list(text: _Text, path: File) -> Iterator[Row]:
    text.skip(1)
    number = 0
    while text.peek() != "]":
        if number:
            text.must_be(",")
        yield _must_be_object(text.value(), f"{path}, row {number}")
        number += 1
    text.skip(1)
    if text.peek():
        text.fail("something follows the list of rows")


def _object(content: Any, path: File) -> Iterator[Row]:
    """The rows of a file that is one object: it is a row itself, or one of its fields is the list of rows."""
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    sides = [content.get(side) for side in ("chosen", "rejected")]
    if all(isinstance(side, list) and side and not isinstance(side[0], dict) for side in sides) or all(
        isinstance(side, dict) and "0" in side for side in sides
    ):
        raise DataError(
            f"{path} holds columns, not rows: write it with a row on each line, "
            "in pandas df.to_json('data.jsonl', orient='records', lines=True)"
        )
    if "chosen" in content or "rejected" in content:
        yield content
    elif len(lists) == 1:
        for number, row in enumerate(next(iter(lists.values()))):
            yield _must_be_object(row, f"{path}, row {number}")
    elif lists:
        raise DataError(
            f"{path} holds several lists ({', '.join(lists)}): write the one that is meant to a file of its own"
        )
    else:
        yield content


def _must_be_object(row: Any, place: str) -> Row:
    if isinstance(row, dict):
        return row
    hint = ": a list of rows is read from a file that ends in .json" if isinstance(row, list) else ""
    raise DataError(f"{place}: a row must be a JSON object, got {type(row).__name__}{hint}")


def _decoded(path: File, line: bytes, number: int) -> Any:
    try:
        return _DECODER.decode(line.rstrip(b"\r\n").decode("utf-8-sig" if number == 1 else "utf-8"))
    except json.JSONDecodeError as error:
        several = " after the row's object; a line holds one row" if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {number}, column {error.colno}: not valid JSON ({error.msg}{several})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}, byte {error.start + 1}: {not_utf8(path)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: {_said(error)}") from None


def _said(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error) if isinstance(error, _KeyTwice) else "a number of more than 4300 digits"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _KeyTwice(f"the key {twice[:40]!r} stands twice in one object, and one of them would be lost")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


class _Text:
    """The text of a file from a place on, of which more is read as it is needed."""

    def __init__(self, content: BinaryIO, path: File) -> None:
        self._content, self._path = content, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._bytes = "", 0, 0
        self._lines = self._left_of_line = 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, characters: int) -> None:
        """Go on behind so many characters."""
        self._at += characters

    def must_be(self, wanted: str) -> None:
        """Go on behind this character. Raises DataError if another is next."""
        if self.peek() != wanted:
            self.fail(f"Expecting {wanted!r}" if self.peek() else "the file ends before its list does")
        self._at += 1

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, self._at = _DECODER.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR_END
                inside = error.pos - self._at
                if not (cut and self._more()):
                    self._at += inside
                    self.fail(error.msg)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self._path}, line {self._line()}: {_said(error)}") from None

    def fail(self, message: str) -> None:
        """Raise DataError for this place."""
        line_began = self._text.rfind("\n", 0, self._at)
        column = self._at - line_began + (self._left_of_line if line_began < 0 else 0)
        raise DataError(f"{self._path}, line {self._line()}, column {column}: not valid JSON ({message})")

    def _line(self) -> int:
        return self._lines + self._text.count("\n", 0, self._at) + 1

    def _more(self) -> bool:
        """Read on: as much as waits to be understood, so that a long value is not begun too often; False at the end."""
        if self._ended:
            return False
        piece = self._content.read(max(_PIECE, len(self._text) - self._at))
        self._ended = not piece
        try:
            added = self._decoder.decode(piece, final=self._ended)
        except UnicodeDecodeError as error:
            byte = self._bytes + error.start + 1
            raise DataError(f"{self._path}, about byte {byte}: {not_utf8(self._path)}") from None
        self._bytes += len(piece)
        # what was understood goes; where it was stays known
        line_began = self._text.rfind("\n", 0, self._at)
        self._left_of_line = self._at - line_began - 1 + (self._left_of_line if line_began < 0 else 0)
        self._lines += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + added, 0
        return not self._ended or bool(added)

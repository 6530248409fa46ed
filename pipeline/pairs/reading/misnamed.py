"""What a file is that its name does not say: compressed, in another character encoding, a web page; and what to run then."""

from __future__ import annotations

import codecs
import shlex
from pathlib import Path

from pipeline.errors import DataError
from pipeline.pairs.reading.remote import File

_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip -c", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc", ".zst"),
    b"BZh": ("bzip2", "bunzip2 -c", None),
    b"\xfd7zXZ": ("xz", "unxz -c", None),
    b"PK\x03\x04": ("zip", "unzip -p", None),
}
_UNICODE = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))
HEAD = 4096
# what messages call standard input
STDIN = Path("standard input")


def must_be_text(head: bytes, path: File, *, unpacked: bool) -> None:
    """Raise DataError if a text file begins as none does, with what to run; `unpacked`: it was decompressed on the way here."""
    for magic, (kind, command, suffix) in _PACKED.items():
        if head.startswith(magic):
            rename = f", or name it {path.name}{suffix}" if suffix and not unpacked else ""
            twice = "compressed twice: " if unpacked else ""
            raise DataError(f"{path} is {twice}{kind}-compressed data: {_run(command, path, 'unpacked')}{rename}")
    if head.startswith(b"PAR1"):
        raise DataError(f"{path} is a Parquet file: name it {path.with_suffix('.parquet').name}")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a pointer of Git LFS, not the data: run git lfs pull in its checkout")
    if head and not head.strip(b"\0"):
        raise DataError(f"{path} begins with zero bytes alone: it was not written to its end, copy it again")
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{path} is a web page or XML, not data: download the file itself")
    for mark, encoding in _UNICODE:
        if head.startswith(mark):
            raise DataError(f"{path} is {encoding} text, UTF-8 is read: {_convert(path, encoding, unpacked=unpacked)}")
    if len(head) >= 4 and (head[1:4:2] == b"\0\0" or head[0:4:2] == b"\0\0"):
        encoding = "UTF-16LE" if head[1:2] == b"\0" else "UTF-16BE"
        raise DataError(f"{path} is {encoding} text, UTF-8 is read: {_convert(path, encoding, unpacked=unpacked)}")


def printable(text: str) -> str:
    """The text with what is no character of Unicode written out, as in a file's name of other bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def not_utf8(path: File) -> str:
    """What is said of bytes that are no UTF-8."""
    unpacked = path.suffix.lower() in (".gz", ".zst")
    return f"not valid UTF-8. If it is Latin-1 or Windows-1252, {_convert(path, 'WINDOWS-1252', unpacked=unpacked)}"


def _convert(path: File, encoding: str, *, unpacked: bool) -> str:
    command = f"iconv -f {encoding} -t UTF-8"
    if not unpacked or path == STDIN:
        return _run(command, path, "utf8")
    unpack = "zstd -dc" if path.suffix.lower() == ".zst" else "gunzip -c"
    return f"run {unpack} {shlex.quote(str(path))} | {command} > utf8{_plain_suffix(path)}"


def _run(command: str, path: File, to: str) -> str:
    if path == STDIN:
        return f"pipe it through {command}"
    return f"run {command} {shlex.quote(str(path))} > {to}{_plain_suffix(path)}"


def _plain_suffix(path: File) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix.lower() not in (".gz", ".zst")]
    return suffixes[-1] if suffixes else ".jsonl"

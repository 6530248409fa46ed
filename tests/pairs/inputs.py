"""Inputs as people have them, made on disk, and what the real reader says of each: kept and dropped rows, or an error."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.experiment import DataConfig
from pipeline.errors import RefscoreError
from pipeline.pairs.preferences import Dropped
from pipeline.pairs.splits import PairStream

GOOD = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go away."}
WHO = {"prompt": "Who?", "chosen": "I am.", "rejected": "Nobody."}
USER, ANSWER, OTHER = (
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "assistant", "content": "Go away."},
)
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}
# a chat template that shows tools and their calls
TOOL_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}@{{ call.function | tojson }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Input:
    """One kind of input: what lies on disk, how it is asked for, and what must come of it.

    `files` maps names to bytes; `path` is data.path, by default the first file. Either `kept` and `dropped` (reason to number of
    rows, `detail` a part of the first one's detail), or `error` (class name) with `says`, a part of its message.
    """

    files: dict[str, bytes]
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    detail: str = ""
    error: str = ""
    says: str = ""
    path: str | list[str] | None = None
    data: dict = field(default_factory=dict)
    before: Callable[[Path], None] | None = None

    def lay_out(self, where: Path) -> str | list[str]:
        """Write the files below `where`; returns data.path, relative to there."""
        for name, content in self.files.items():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_bytes(content)
        if self.before:
            self.before(where)
        return self.path if self.path is not None else next(iter(self.files))


@dataclass(frozen=True)
class Outcome:
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    details: list[str] = field(default_factory=list)
    error: str = ""
    says: str = ""
    unread: dict[str, list[str]] = field(default_factory=dict)


def outcome(path, tokenizer, **data) -> Outcome:
    """What the real reader and the real encoder make of a source."""
    try:
        stream = PairStream(DataConfig(path=path, **{"eval_fraction": 0, **data}), tokenizer)
        items = list(stream)
    except RefscoreError as error:
        return Outcome(error=type(error).__name__, says=str(error))
    dropped = [item for item in items if isinstance(item, Dropped)]
    reasons = {}
    for item in dropped:
        reasons[item.reason] = reasons.get(item.reason, 0) + 1
    assert sum(stream.read.values()) == len(items)
    return Outcome(len(items) - len(dropped), reasons, [item.detail for item in dropped], unread=dict(stream.unread))


def lines(*rows, end="\n", encoding="utf-8") -> bytes:
    """Rows as JSON lines; a text is a line as it is."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + end for row in rows).encode(encoding)


def parquet(rows, **how) -> bytes:
    content = io.BytesIO()
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), content, **how)
    return content.getvalue()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def zipped(content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("d.jsonl", content)
    return packed.getvalue()


# the time in a header would make another test of it in each process that collects them
gz, bz, xz = partial(gzip.compress, mtime=0), bz2.compress, lzma.compress

"""What a model that judges has said so far, in a file, by content: a killed evaluation asks nothing twice.

One line of JSON per verdict, appended when it comes. The key is a digest of all that decides a verdict: the
judge's settings, its template, the prompt and both responses in their order. A torn last line is asked again.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.artifacts.durable import explaining_disk

Item = TypeVar("Item")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Verdict:
    """`value`: how sure the judge is that the first is better, or a reward; None: a reply without a verdict.

    `reply` is what a model wrote, for people; `tokens_in` and `tokens_out` are what the server counted.
    """

    value: float | None
    reply: str = ""
    tokens_in: int = 0
    tokens_out: int = 0


class Verdicts:
    """The file of one judge. Safe for the threads of one process; two processes at once may ask the same twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Verdict] = {}
        self._failed: dict[str, str] = {}
        self._lock = threading.Lock()
        torn = False
        if path.is_file():
            text = path.read_bytes().decode("utf-8", "replace")
            torn = bool(text) and not text.endswith("\n")
            # other signs that end lines elsewhere, such as U+2028, may stand in a reply
            for line in text.split("\n"):
                try:
                    fields = json.loads(line)
                    key = fields.pop("key")
                    if "failed" in fields:
                        self._failed[key] = str(fields["failed"])
                    else:
                        self._known[key] = Verdict(**fields)
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # torn by a kill
        path.parent.mkdir(parents=True, exist_ok=True)
        with explaining_disk(path), path.open("a", encoding="utf-8") as file:
            file.write("\n" if torn else "")

    def get(self, key: str) -> Verdict | None:
        """What was said under this key before."""
        return self._known.get(key)

    def values(
        self,
        keys: Sequence[str],
        items: Sequence[Item],
        ask: Callable[[dict[str, Item]], None],
        read: Callable[[str], float | None] | None = None,
    ) -> list[float | None]:
        """The values of `items` under their `keys`, in order: what was said before is read, the rest is asked once.

        `ask` gets what is missing by key and adds verdicts; an item that it adds none for has the value None. `read`: the value is
        what it finds in the reply that was kept, so that a reply is not asked for again to be read better.
        """
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in self._known}
        if missing:
            ask(missing)
        verdicts = [self._known.get(key) for key in keys]
        return [None if one is None else read(one.reply) if read else one.value for one in verdicts]

    def words(self, keys: Sequence[str]) -> list[str | None]:
        """For each key the reply, or else why there is none; None if it was not asked."""
        found = []
        for key in keys:
            verdict, reason = self._known.get(key), self._failed.get(key)
            said = verdict.reply if verdict else f"failed: {reason}" if reason else None
            # half a character cannot stand in a table
            found.append(said and said.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return found

    def add(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict, in memory and in the file."""
        self._known[key] = verdict
        self._write({"key": key, **asdict(verdict)})

    def add_failure(self, key: str, reason: str) -> None:
        """Write down, for people, why there is no verdict. It is none: the next evaluation asks again."""
        self._failed[key] = reason
        self._write({"key": key, "failed": reason})

    def __len__(self) -> int:
        return len(self._known)

    def _write(self, fields: dict[str, Any]) -> None:
        line = json.dumps(fields, ensure_ascii=False)
        if not line.isascii() and _SURROGATE.search(line):
            line = json.dumps(fields)  # half a character cannot be written as UTF-8
        with self._lock, explaining_disk(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def verdict_key(judge: str, parts: Sequence[str]) -> str:
    """Digest of a judge's identity and of the texts it is shown, each with its length."""
    state = hashlib.sha256(judge.encode())
    for part in parts:
        content = part.encode("utf-8", errors="surrogatepass")
        state.update(len(content).to_bytes(8, "little") + content)
    return state.hexdigest()

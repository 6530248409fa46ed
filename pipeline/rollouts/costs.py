"""What a run's rollouts took: a line for every shard that was made here, so that work before a kill counts too."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from pipeline.artifacts.durable import explaining_disk

Part = Literal["generate", "reward", "score", "value"]


class Costs:
    """Seconds and tokens by part and shard, in a file of JSON lines; a torn last line is left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[tuple[str, str, float, int]] = []
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.split("\n"):
            try:
                row = json.loads(line)
                self._lines.append((str(row["part"]), str(row["shard"]), float(row["seconds"]), int(row["tokens"])))
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, part: Part, shard: str, seconds: float, tokens: int = 0) -> None:
        """A part of a shard was done."""
        seconds = round(seconds, 3)  # as it will be read again
        self._lines.append((part, shard, seconds, tokens))
        line = json.dumps({"part": part, "shard": shard, "seconds": seconds, "tokens": tokens})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with explaining_disk(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._torn + line + "\n")
        self._torn = False

    def of(self, part: Part, shards: Collection[str]) -> dict[str, float]:
        """Seconds and tokens of a part of these shards, all times together."""
        lines = [line for line in self._lines if line[0] == part and line[1] in shards]
        return {"seconds": round(sum(line[2] for line in lines), 2), "tokens": sum(line[3] for line in lines)}

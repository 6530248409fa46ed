"""`refscore show PATH`: any artifact, readable."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from pipeline.artifacts.tables import read_about
from pipeline.errors import DataError
from stages import console


def main(path: Path) -> None:
    """Print a table, a document, or a directory's artifacts. Raises DataError for what is none of these."""
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_dir():
        _directory(path)
    elif path.suffix == ".parquet":
        _parquet(path)
    elif path.suffix in (".json", ".yaml", ".yml", ".md", ".jinja", ".txt", ".jsonl"):
        console.say(_text(path))
    else:
        raise DataError(f"{path}: directories, Parquet, JSON, YAML and text files can be shown")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").rstrip()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from None


def _directory(path: Path) -> None:
    rows = []
    for entry in sorted(path.iterdir()):
        if entry.name.startswith("."):
            continue
        rows.append([entry.name, _extent(entry), _size(entry)])
    console.table(str(path), ["artifact", "rows", "bytes"], rows)


def _parquet(path: Path) -> None:
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]})") from None
    about = read_about(path)
    console.say(f"{path}: {len(frame)} rows, {path.stat().st_size:,} bytes")
    if about:
        console.say(", ".join(f"{name}: {value}" for name, value in about.items()))
    console.table(
        "schema", ["column", "type", "null"], [[n, str(t), str(frame[n].null_count())] for n, t in frame.schema.items()]
    )
    with pl.Config(
        tbl_rows=8, tbl_cols=-1, tbl_width_chars=console.out.width, fmt_str_lengths=40, fmt_table_cell_list_len=3
    ):
        console.say(str(frame.head(5).select(pl.col(pl.Binary).bin.encode("hex"), pl.exclude(pl.Binary))))
    summary = _summary(frame)
    if summary:
        console.table("summary", ["column", "min", "mean", "max"], summary)


def _summary(frame: pl.DataFrame) -> list[list[str]]:
    rows = []
    for name, kind in frame.schema.items():
        values, label = frame[name], name
        if isinstance(kind, pl.List):
            values, label = values.list.len(), f"{name} (length)"
        elif not kind.is_numeric():
            if kind == pl.String and 0 < (distinct := values.n_unique()) <= 12:
                counts = values.value_counts(sort=True).rows()
                rows.append([name, "", f"{distinct} values", ", ".join(f"{value}: {count}" for value, count in counts)])
            continue
        low, mean, high = values.min(), values.mean(), values.max()
        rows.append([label, *("-" if value is None else f"{value:.6g}" for value in (low, mean, high))])  # type: ignore[str-bytes-safe]  # numeric columns only
    return rows


def _extent(path: Path) -> str:
    if path.is_dir():
        return f"{sum(1 for _ in path.iterdir())} entries"
    if path.suffix == ".parquet":
        try:
            return str(pl.scan_parquet(path).select(pl.len()).collect().item())
        except (pl.exceptions.PolarsError, OSError):
            return "unreadable"  # shown itself, it says why
    return ""


def _size(path: Path) -> str:
    if path.is_dir():
        return f"{sum(file.stat().st_size for file in path.rglob('*') if file.is_file()):,}"
    return f"{path.stat().st_size:,}"

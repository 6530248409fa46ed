"""Scores that others computed, read from the forms that `pipeline.exchange.scored_pairs` writes: pairs of claims, row by row.

A claim is what a file says of one response: token ids, the sum of its log-probabilities, their values if the form has them. A
row of which a claim cannot be true is given with its reason instead. What speaks against a whole file raises DataError: a form
that is not known, token ids of another vocabulary, a cache of other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.errors import ConfigError, DataError, first_line
from pipeline.exchange.claims import Claim, Claimed, ClaimedPair, Unusable, claim_of
from pipeline.exchange.scored_pairs import SIDES
from pipeline.pairs.reading.files import file_rows, suffix_of
from pipeline.pairs.reading.folders import is_saved
from pipeline.pairs.reading.json_rows import Row

FORMS = ("trl", "jsonl", "open_instruct", "fairseq2")
# columns by which a form is known
_OF_IDS = {"prompt_ids", "chosen_ids", "rejected_ids"}
_OF_OPEN_INSTRUCT = {"chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"}
_OF_FAIRSEQ2 = {"src", "tgt_chosen", "tgt_rejected"}
_CACHES = ("_reference_logprobs.pt", "_reference_logprobs_average.pt")
# files beside the data that hold none
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_DOCUMENTS = {".md", ".py", ".txt", ".lock"}
# rows that the tokenizer gets at once
_AT_ONCE = 1000


def form_of(path: Path) -> str:
    """The form that a file or directory has. Raises DataError if it is none that is read."""
    if path.is_dir() and any(list(path.glob(f"*{suffix}")) for suffix in _CACHES):
        return "open_instruct"
    parts = _parts(path)
    name, rows = parts[0]
    first = next(iter(rows()), None)
    if first is None:
        raise DataError(f"{name} holds no row")
    columns = first.keys()
    if columns >= _OF_IDS:
        return "jsonl" if suffix_of(Path(name)) in (".jsonl", ".ndjson", ".json") else "trl"
    if columns >= _OF_OPEN_INSTRUCT:
        return "open_instruct"
    if columns >= _OF_FAIRSEQ2:
        return "fairseq2"
    listed = "; ".join(", ".join(sorted(names)) for names in (_OF_IDS, _OF_OPEN_INSTRUCT, _OF_FAIRSEQ2))
    raise DataError(
        f"{name}: its columns ({', '.join(map(str, list(columns)[:12]))}) are those of no form that is read. They would be "
        f"{listed}, each with the scores, as 'refscore export' writes them"
    )


def claimed_pairs(path: Path, form: str, claimed: Claimed) -> Iterator[ClaimedPair]:
    """Every row of `path`, which has this form, in order."""
    if form not in FORMS:
        raise ConfigError(f"--format {form!r} is unknown; there are: {', '.join(FORMS)}")
    if form == "open_instruct":
        for table in _tables(path):
            yield from _of_open_instruct(table, claimed)
        return
    for name, rows in _parts(path):
        if form == "fairseq2":
            yield from _of_fairseq2(name, rows(), claimed)
        else:
            _must_have(name, rows(), _OF_IDS, form)
            for number, row in enumerate(rows()):
                yield _pair(name, number, partial(_of_ids, row, claimed))


def _parts(path: Path) -> list[tuple[str, Callable[[], Iterator[Row]]]]:
    """Files of rows by their names, each with what reads it from the start."""
    if not path.exists():
        raise DataError(f"{path}: no such file or directory (what lies on the Hub is fetched first)")
    if path.is_dir() and is_saved(path):
        return _saved_by_datasets(path)
    files = [path] if path.is_file() else _files(path)
    return [(str(file), partial(file_rows, file)) for file in files]


def _files(directory: Path) -> list[Path]:
    shown = [
        file
        for file in sorted(directory.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(directory).parts)
    ]
    found = [file for file in shown if suffix_of(file) is not None and file.name not in _ABOUT]
    strange = [
        file.name
        for file in shown
        if file not in found and file.name not in _ABOUT and file.suffix.lower() not in _DOCUMENTS
    ]
    if strange:
        raise DataError(
            f"{directory} also holds {', '.join(strange[:5])}, which is not read: name the file that is meant"
        )
    if not found:
        raise DataError(f"{directory} holds no file of scored pairs (.parquet, .jsonl)")
    return found


def _saved_by_datasets(directory: Path) -> list[tuple[str, Callable[[], Iterator[Row]]]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        held = datasets.load_from_disk(str(directory))
    except Exception as error:  # noqa: BLE001  # what damaged files make it raise knows no bounds
        raise DataError(f"{directory} cannot be read as a saved data set ({first_line(error)})") from None
    named = held if isinstance(held, datasets.DatasetDict) else {"": held}
    return [(str(directory / split), partial(iter, table)) for split, table in named.items()]


def _must_have(name: str, rows: Iterator[Row], columns: set[str], form: str) -> None:
    first = next(rows, None)
    if first is not None and not first.keys() >= columns:
        lacking = ", ".join(sorted(columns - first.keys()))
        raise DataError(f"{name} has no column {lacking}, which the form {form} has: give another --format")


def _pair(source: str, number: int, claims: Callable[[], tuple[Claim, ...]]) -> ClaimedPair:
    try:
        return ClaimedPair(source, number, claims())
    except Unusable as unusable:
        return ClaimedPair(source, number, (), str(unusable))
    except DataError as error:
        raise DataError(f"{source} row {number}: {error}") from None


def _of_ids(row: Row, claimed: Claimed) -> tuple[Claim, ...]:
    """TRL's columns, and those of JSONL, which may have values per token beside them."""
    return tuple(
        claim_of(
            row.get("prompt_ids"),
            row.get(f"{side}_ids"),
            row.get(f"ref_{side}_logps"),
            claimed,
            row.get(f"ref_{side}_token_logps"),
        )
        for side in SIDES
    )


def _of_fairseq2(name: str, rows: Iterator[Row], claimed: Claimed) -> Iterator[ClaimedPair]:
    """Texts, which its loader encodes, and ends after every response."""
    number = 0
    while part := list(islice(rows, _AT_ONCE)):
        texts = [row[column] for row in part if _are_texts(row) for column in ("src", "tgt_chosen", "tgt_rejected")]
        encoded = iter(claimed.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        for row in part:
            ids = [next(encoded) for _ in range(3)] if _are_texts(row) else None
            yield _pair(name, number, partial(_of_texts, row, ids, claimed))
            number += 1


def _are_texts(row: Row) -> bool:
    return all(isinstance(row.get(column), str) for column in _OF_FAIRSEQ2)


def _of_texts(row: Row, ids: list[list[int]] | None, claimed: Claimed) -> tuple[Claim, ...]:
    if ids is None:
        raise Unusable("without the texts src, tgt_chosen and tgt_rejected")
    scores = [row.get(f"reference_score_{side}") for side in SIDES]
    if any(score == 0 for score in scores):
        raise Unusable("with a score of exactly 0, which fairseq2 takes for none")
    begin = [claimed.tokenizer.bos_token_id] if claimed.begins else []
    end = claimed.tokenizer.eos_token_id
    return tuple(
        claim_of(begin + ids[0], [*response, end], score, claimed)
        for response, score in zip(ids[1:], scores, strict=True)
    )


def _tables(path: Path) -> list[Path]:
    """open-instruct's tables of rows, each of which has its cache beside it."""
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    tables = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    for table in tables:
        if not any(table.with_name(table.stem + suffix).is_file() for suffix in _CACHES):
            raise DataError(
                f"{table} has no cache beside it: open-instruct's, for these rows, must lie there as "
                f"{table.stem}{_CACHES[0]} (sums) or {table.stem}{_CACHES[1]} (means)"
            )
    if not tables:
        raise DataError(f"{path} holds no table of open-instruct's rows (.parquet)")
    return tables


def _of_open_instruct(table: Path, claimed: Claimed) -> Iterator[ClaimedPair]:
    import pyarrow.parquet as pq

    caches = [table.with_name(table.stem + suffix) for suffix in _CACHES]
    cache = next(file for file in caches if file.is_file())
    values, means = _cached(cache), cache == caches[1]
    _must_have(str(table), file_rows(table), _OF_OPEN_INSTRUCT | {"index"}, "open_instruct")
    rows, entries = pq.read_metadata(table).num_rows, len(values[SIDES[0]])
    if rows != entries:
        raise DataError(f"{cache} has {entries} entries and {table} {rows} rows: it is the cache of other rows")
    seen = np.zeros(rows, dtype=bool)
    for number, row in enumerate(file_rows(table)):
        yield _pair(str(table), number, partial(_of_cache, row, values, seen, claimed, means=means))


def _cached(cache: Path) -> dict[str, np.ndarray]:
    """The cache's numbers by side; nothing but tensors is loaded."""
    import torch

    try:
        held = torch.load(cache, map_location="cpu", weights_only=True, mmap=True)
        values = {side: held[f"{side}_logps"].double().numpy() for side in SIDES}
    except Exception as error:  # noqa: BLE001  # what bytes of somebody else make it raise knows no bounds
        raise DataError(
            f"{cache} is no cache of open-instruct's (tensors chosen_logps and rejected_logps): {first_line(error)}"
        ) from None
    if any(array.ndim != 1 for array in values.values()) or len({len(array) for array in values.values()}) > 1:
        raise DataError(f"{cache}: chosen_logps and rejected_logps must be two lists of the same length")
    return values


def _of_cache(
    row: Row, values: dict[str, np.ndarray], seen: np.ndarray, claimed: Claimed, *, means: bool
) -> tuple[Claim, ...]:
    index = row["index"]
    if type(index) is not int or not 0 <= index < len(seen):
        raise Unusable("with an index that is none of the cache's")
    if seen[index]:
        raise Unusable("with the index of another row")
    seen[index] = True
    claims = []
    for side in SIDES:
        prompt, response = _split(row, side)
        logp = float(values[side][index]) * (len(response) if means else 1)
        claims.append(claim_of(prompt, response, logp, claimed))
    return tuple(claims)


def _split(row: Row, side: str) -> tuple[list[int], list[int]]:
    """Prompt and response: the labels of the prompt are -100, those of the response are its ids."""
    ids, labels, mask = (row.get(f"{side}_{what}") for what in ("input_ids", "labels", "attention_mask"))
    if not isinstance(ids, list) or not isinstance(labels, list) or len(ids) != len(labels):
        raise Unusable("with other labels than token ids")
    if mask is not None and not all(mask):
        raise Unusable("that are padded")
    prompt = next((place for place, label in enumerate(labels) if label != -100), len(labels))
    if labels[prompt:] != ids[prompt:]:
        raise Unusable("of which a part of the response was not scored")
    return ids[:prompt], ids[prompt:]

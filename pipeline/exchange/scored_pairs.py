"""Scored pairs in the files of other trainers: TRL, open-instruct, fairseq2, and plain JSONL.

Each writer streams pairs.parquet, says how many pairs of which split it wrote, and leaves out none without counting it. Its
files take their places together at the end; if it fails, none is left, nor a directory that it made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.artifacts import durable
from pipeline.artifacts.schemas import PAIRS
from pipeline.artifacts.tables import read_about, read_groups
from pipeline.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# names of the splits in Hugging Face's data sets
SPLITS = {"train": "train", "eval": "test"}
SIDES = ("chosen", "rejected")
_TRL = ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")


@dataclass
class Exported:
    """What a writer wrote: files, pairs by split, and why others were left out."""

    files: list[Path] = field(default_factory=list)
    pairs: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    longest: int = 0

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


def write_trl(pairs: Path, to: Path) -> Exported:
    """A data set that `datasets.load_dataset(to)` reads, with one reference log-probability per response, and the trainer
    that uses them (`stored_reference.py`).
    """
    exported = Exported()
    schema = pa.schema([PAIRS.field(name) for name in _TRL])
    with _all_or_none(to, exported) as place:
        with _by_split(place, lambda path: _parquet(path, schema), "parquet") as writer_of:
            for split, table in _scored(pairs, list(_TRL), exported):
                writer_of(split).write_table(table.select(_TRL).cast(schema))
        module = Path(__file__).with_name("stored_reference.py")
        place(module.name).write_text(module.read_text(encoding="utf-8"), encoding="utf-8")
    return exported


def write_jsonl(pairs: Path, to: Path) -> Exported:
    """One JSON object per pair: texts, token ids, and the reference's log-probabilities per token and per response."""
    columns = [name for name in PAIRS.names if name != "split"]
    exported = Exported()
    with _all_or_none(to, exported) as place, _by_split(place, _text, "jsonl") as file_of:
        for split, table in _scored(pairs, columns, exported):
            _write_lines(file_of(split), table.select(columns).to_pylist())
    return exported


def write_open_instruct(pairs: Path, to: Path) -> Exported:
    """Tokenised rows under open-instruct's names, and its TensorCache of the same rows in the same order: one of sums, which
    its losses dpo and wpo read, one of means per token, which dpo_norm reads. Plain tensors, read with `weights_only`.

    Form of the cache: `TensorCache.from_disk` in open_instruct/model_utils.py, and `build_reference_logprobs_cache` in
    open_instruct/dpo_utils.py, read at commit e6c3044.
    """
    import torch

    exported = Exported()
    ids, labels, mask = pa.list_(pa.int32()), pa.list_(pa.int32()), pa.list_(pa.int8())
    names = {
        f"{side}_{what}": kind
        for side in SIDES
        for what, kind in (("input_ids", ids), ("labels", labels), ("attention_mask", mask))
    }
    schema = pa.schema([*names.items(), ("index", pa.int64())])
    columns = [name for name in _TRL if name != "pair_id"]
    sums: dict[str, list[np.ndarray]] = {}
    means: dict[str, list[np.ndarray]] = {}
    with _all_or_none(to, exported) as place:
        with _by_split(place, lambda path: _parquet(path, schema), "parquet") as writer_of:
            first = dict.fromkeys(SPLITS, 0)
            for split, table in _scored(pairs, columns, exported):
                rows = [
                    _open_instruct_row(pair, first[split] + number) for number, pair in enumerate(table.to_pylist())
                ]
                writer_of(split).write_table(pa.Table.from_pylist(rows, schema=schema))
                first[split] += len(rows)
                for side in SIDES:
                    of_responses = table[f"ref_{side}_logps"].to_numpy()
                    tokens = pc.list_value_length(table[f"{side}_ids"]).to_numpy()
                    sums.setdefault(f"{split} {side}", []).append(of_responses)
                    means.setdefault(f"{split} {side}", []).append(of_responses / tokens)
        for split in exported.pairs:
            for name, values in (("reference_logprobs", sums), ("reference_logprobs_average", means)):
                cache = {
                    f"{side}_logps": torch.from_numpy(np.concatenate(values[f"{split} {side}"])).float()
                    for side in SIDES
                }
                torch.save(cache, place(f"{SPLITS[split]}_{name}.pt"))
    return exported


def write_fairseq2(pairs: Path, to: Path, tokenizer: PreTrainedTokenizerBase) -> Exported:
    """JSONL of fairseq2's preference recipe: `src`, `tgt_chosen`, `tgt_rejected` as texts and `reference_score_*`.

    fairseq2 tokenises the texts itself and puts an end after every response, so a pair is written only if its texts give back
    the ids that were scored, and its responses end; a score of exactly 0, which its loader takes for none, is left out too
    (fairseq2/datasets/preference.py, `cat_source_and_target` and `to_batch`).
    """
    exported = Exported()
    with _all_or_none(to, exported) as place, _by_split(place, _text, "jsonl") as file_of:
        for split, table in _scored(pairs, list(_TRL), exported, count=False):
            rows = []
            for pair in table.to_pylist():
                row = _fairseq2_row(pair, tokenizer)
                if isinstance(row, str):
                    exported.leave_out(row)
                else:
                    rows.append(row)
            if rows:
                _write_lines(file_of(split), rows)
                exported.pairs[split] = exported.pairs.get(split, 0) + len(rows)
    if not sum(exported.pairs.values()):
        reasons = "; ".join(f"{count} {reason}" for reason, count in exported.left_out.items())
        raise DataError(f"no pair can be written for fairseq2: {reasons}")
    return exported


def _open_instruct_row(pair: dict[str, Any], index: int) -> dict[str, Any]:
    row: dict[str, Any] = {"index": index}
    for side in SIDES:
        prompt, response = pair["prompt_ids"], pair[f"{side}_ids"]
        row[f"{side}_input_ids"] = prompt + response
        # -100: what their loss does not read
        row[f"{side}_labels"] = [-100] * len(prompt) + response
        row[f"{side}_attention_mask"] = [1] * len(prompt + response)
    return row


def _fairseq2_row(pair: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | str:
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt = pair["prompt_ids"][1:] if pair["prompt_ids"][:1] == [begin] else pair["prompt_ids"]
    row = {"id": pair["pair_id"], "src": tokenizer.decode(prompt)}
    if _encoded(tokenizer, row["src"]) != prompt:
        return "prompts whose text gives other tokens"
    for side in SIDES:
        ids, score = pair[f"{side}_ids"], pair[f"ref_{side}_logps"]
        if ids[-1:] != [end]:
            return "pairs with a response that its end token does not end"
        text = tokenizer.decode(ids[:-1])
        if _encoded(tokenizer, text) != ids[:-1]:
            return "responses whose text gives other tokens"
        if score == 0:
            return "pairs with a score of exactly 0, which is read as none"
        row |= {f"tgt_{side}": text, f"reference_score_{side}": score}
    return row


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _scored(
    pairs: Path, columns: list[str], exported: Exported, *, count: bool = True
) -> Iterator[tuple[str, pa.Table]]:
    """The pairs of each split part by part, `split` aside; counts them in `exported`."""
    about = read_about(pairs)
    if about and not about.get("scored", True):
        raise ConfigError(
            f"{pairs} holds no scores, as its loss compares nothing with the reference: prepare a run whose loss does"
        )
    ids = ["prompt_ids", *(f"{side}_ids" for side in SIDES)]
    for part in read_groups(pairs, PAIRS, list(dict.fromkeys(["split", *ids, *columns]))):
        prompts, *responses = [pc.list_value_length(part[name]).to_numpy() for name in ids]
        exported.longest = max([exported.longest, *(int((prompts + lengths).max(initial=0)) for lengths in responses)])
        for split in SPLITS:
            table = part.filter(pc.equal(part["split"], split))
            if len(table):
                if count:
                    exported.pairs[split] = exported.pairs.get(split, 0) + len(table)
                yield split, table.drop_columns(["split"])


@contextmanager
def _all_or_none(to: Path, exported: Exported) -> Iterator[Callable[[str], Path]]:
    """Yields what gives, for a file's name, a path to write it at: all files take their places durably at the end, or none is
    left, nor `to` if it was made here.
    """
    there, temporaries = to.exists(), []
    try:
        with ExitStack() as places:

            def place(name: str) -> Path:
                exported.files.append(to / name)
                temporaries.append(places.enter_context(durable.replacing(to / name)))
                return temporaries[-1]

            yield place
            # before any of them is renamed: what a disk refuses, it refuses here
            with durable.explaining_disk(to):
                for temporary in temporaries:
                    durable.flush(temporary)
    except BaseException:
        if not there:
            with suppress(OSError):
                to.rmdir()
        raise


@contextmanager
def _by_split(
    place: Callable[[str], Path], opened: Callable[[Path], Any], suffix: str
) -> Iterator[Callable[[str], Any]]:
    """Opens the file of a split as it is first asked for; closes all."""
    files: dict[str, Any] = {}
    with ExitStack() as stack:

        def file_of(split: str) -> Any:
            if split not in files:
                files[split] = stack.enter_context(opened(place(f"{SPLITS[split]}.{suffix}")))
            return files[split]

        yield file_of


def _parquet(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, schema, compression="zstd")


def _text(path: Path) -> IO[str]:
    return path.open("w", encoding="utf-8")


def _write_lines(file: IO[str], rows: list[dict[str, Any]]) -> None:
    file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)

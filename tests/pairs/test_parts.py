"""Parts of a table: made once for the same rows and settings, anew for others, and never used when they are damaged."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.normalizers import Lowercase

from pipeline.artifacts import durable
from pipeline.config.experiment import DataConfig
from pipeline.errors import ConfigError, DataError, RefscoreError
from pipeline.pairs.reading import ranges
from pipeline.pairs.reading.content import Content
from pipeline.pairs.tokenised import assembly, making
from pipeline.pairs.tokenised.assembly import Assembly
from pipeline.pairs.tokenised.making import How, tokenizer_digest
from pipeline.store.identity import keys_of
from tests.conftest import ROOT, make_tiny_tokenizer, preference_rows, write_rows

REFERENCE = "ab" * 32


@pytest.fixture
def made(monkeypatch):
    """Names of the files that are made, as they are made."""
    names = []
    monkeypatch.setattr(making, "write_part", noted(names, making.write_part))
    monkeypatch.setattr(making, "_write_keys", noted(names, making._write_keys))
    return names


def noted(names, write):
    def noting(path, *given):
        names.append(path.name.rpartition("-")[2])
        write(path, *given)

    return noting


def assembled(path="d.jsonl", *, wanted="pairs", reference=REFERENCE, tokenizer=None, positions=None, **data):
    tokenizer = tokenizer or make_tiny_tokenizer()
    how = How(make_tiny_tokenizer, positions, reference, partial(keys_of, reference))
    return Assembly(DataConfig(path=path, **{"eval_fraction": 0.25, **data}), wanted, how, tokenizer)


def table_of(*given, **how):
    found = assembled(*given, **how)
    list(found.windows())
    return found.table


def rows_of(table):
    return [row for _, group in table.groups() for row in group.to_pylist()]


def test_a_second_table_of_the_same_rows_makes_nothing(made):
    write_rows(Path("d.jsonl"), preference_rows(12))
    first = rows_of(table_of())
    assert [Path(name).suffix for name in made] == [".parquet", ".keys"]
    assert rows_of(table_of()) == first
    assert len(made) == 2
    # for another reference its keys alone
    assert rows_of(table_of(reference="cd" * 32)) == first
    assert [Path(name).suffix for name in made[2:]] == [".keys"]


def test_a_file_beside_others_leaves_their_parts(made):
    for name in "abc":
        write_rows(Path(f"many/{name}.jsonl"), preference_rows(12)[ord(name) - 97 :: 4])
    assert len(table_of("many")) == 9
    assert len(made) == 6
    write_rows(Path("many/aa.jsonl"), preference_rows(12)[3::4])
    found = table_of("many")
    assert len(made) == 8
    assert [row["source_row"] for row in rows_of(found)] == [0, 1, 2] * 4
    # another name is no other content
    Path("many/aa.jsonl").rename("many/z.jsonl")
    assert [row["source"] for row in rows_of(table_of("many"))][-1] == "many/z.jsonl"
    assert len(made) == 8


OTHERS = {
    "rows": {"rows": preference_rows(13)},
    "ending": {"path": "d.ndjson"},
    "template": {"template": "none"},
    "columns": {"columns": {"prompt": "chosen", "chosen": "prompt"}},
    "special tokens": {"special_tokens": "parse"},
    "length": {"max_length": 100},
    "too long": {"too_long": "truncate_response"},
    "number of rows": {"max_rows": 12},
    "rule of the split": {"eval_fraction": 0.5},
    "positions": {"positions": 512},
    "wanted": {"wanted": "responses"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_decides_a_part_makes_another(made, other):
    rows, settings = preference_rows(12), dict(OTHERS[other])
    write_rows(Path("d.jsonl"), rows)
    table_of()
    write_rows(Path("d.jsonl"), settings.pop("rows", rows))
    shutil.copy("d.jsonl", "d.ndjson")
    table_of(settings.pop("path", "d.jsonl"), **settings)
    assert len(made) == 4
    assert len(set(made)) == 4


def test_another_tokenizer_or_template_makes_another_part():
    one, others = make_tiny_tokenizer(), [make_tiny_tokenizer() for _ in range(6)]
    others[0].chat_template += " "
    others[1].add_tokens(["more"])
    others[2].backend_tokenizer.normalizer = Lowercase()
    others[3].bos_token = "<|system|>"
    others[4].split_special_tokens = True
    others[5].bos_token, others[5].add_bos_token = "<|system|>", True
    digests = [tokenizer_digest(tokenizer) for tokenizer in (one, *others)]
    assert len(set(digests)) == 7
    assert tokenizer_digest(make_tiny_tokenizer()) == digests[0]


def test_a_template_that_writes_the_day_makes_another_part_each_day(monkeypatch):
    of_days, of_none = make_tiny_tokenizer(), make_tiny_tokenizer()
    of_days.chat_template += "{{ strftime_now('%d %b %Y') }}"
    today = [tokenizer_digest(of_days), tokenizer_digest(of_none)]
    monkeypatch.setattr(making, "strftime", lambda _: "2100-01-01")
    assert tokenizer_digest(of_days) != today[0]
    assert tokenizer_digest(of_none) == today[1]


@pytest.mark.parametrize(("kind", "said"), [("parquet", "said"), ("keys", "22 keys of 12 rows")])
def test_a_kept_file_that_lacks_something_is_said(kind, said):
    write_rows(Path("d.jsonl"), preference_rows(12))
    table_of()
    (kept,) = (durable.CACHE / "tokenised").glob(f"*.{kind}")
    rows = pq.read_table(kept).replace_schema_metadata(None)
    kept.unlink()
    pq.write_table(rows.slice(0, 22), kept, store_schema=False)
    with pytest.raises(DataError, match=f"is damaged .*{said}.*remove data/cache/tokenised"):
        table_of()


def test_a_tokenizer_that_is_a_program_of_its_own_is_asked_each_time(made):
    from transformers import PreTrainedTokenizerFast

    class Own(PreTrainedTokenizerFast):
        pass

    write_rows(Path("d.jsonl"), preference_rows(6))
    tiny = make_tiny_tokenizer()
    own = Own(tokenizer_object=tiny.backend_tokenizer, eos_token="<|end|>")
    own.chat_template = tiny.chat_template
    assert tokenizer_digest(own) is None
    assert rows_of(table_of(tokenizer=own)) == rows_of(table_of(tokenizer=own)) == rows_of(table_of())
    assert len(made) == 6


@pytest.mark.parametrize("kind", ["parquet", "keys"])
def test_a_kept_file_that_was_cut_off_is_made_again(made, kind):
    write_rows(Path("d.jsonl"), preference_rows(12))
    first = rows_of(table_of())
    (kept,) = (durable.CACHE / "tokenised").glob(f"*.{kind}")
    content = kept.read_bytes()
    kept.unlink()
    kept.write_bytes(content[: len(content) // 2])
    assert rows_of(table_of()) == first
    assert [Path(name).suffix for name in made[2:]] == [f".{kind}"]
    assert kept.read_bytes() == content


@pytest.mark.parametrize(("kind", "name"), [("parquet", "rejected"), ("parquet", "row_id"), ("keys", "key")])
def test_a_kept_file_with_another_bit_gives_no_number(kind, name):
    write_rows(Path("d.jsonl"), preference_rows(12))
    table_of()
    (kept,) = (durable.CACHE / "tokenised").glob(f"*.{kind}")
    content, said = kept.read_bytes(), pq.ParquetFile(kept).metadata.row_group(0)
    (column,) = (one for one in map(said.column, range(said.num_columns)) if one.path_in_schema == name)
    # digests are different and stand in a dictionary, before the page of their numbers
    at = column.data_page_offset - 3 + (0 if name == "row_id" else column.total_compressed_size)
    kept.unlink()
    kept.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(DataError, match=r"is damaged .*: remove data/cache/tokenised, and run the same command again"):
        rows_of(table_of())
    shutil.rmtree("data/cache/tokenised")
    assert len(rows_of(table_of())) == 12


def test_without_a_cache_that_can_be_written_tables_are_made_all_the_same(made, monkeypatch):
    write_rows(Path("d.jsonl"), preference_rows(12))
    first = rows_of(table_of())
    monkeypatch.setattr(making, "CACHED", "elsewhere")
    Path("data/cache/elsewhere").write_text("a file")
    assert rows_of(table_of()) == first
    assert len(made) == 4


@pytest.mark.parametrize("broken", ["", "{broken\n"])
@pytest.mark.parametrize("url", ["", "file://{}/"])
def test_a_source_that_changes_before_it_is_read_is_not_kept_as_what_it_was(made, broken, url):
    path = write_rows(Path("d.jsonl"), preference_rows(12))
    content, found = path.read_bytes(), assembled(f"{url.format(Path.cwd())}d.jsonl")
    assert found._sources.opened
    path.write_text(path.read_text().replace("rice", "beans") + broken)
    with pytest.raises(DataError, match=r"d\.jsonl changed while it was read: run the same command again"):
        list(found.windows())
    path.write_bytes(content)
    assert len(rows_of(table_of())) == 12
    assert len(made) == 3
    # also by the rows that are read no further
    found = assembled(max_rows=2)
    assert found._sources.opened
    path.unlink()
    write_rows(path, preference_rows(11))
    with pytest.raises(DataError, match="changed"):
        list(found.windows())


def test_a_source_that_is_only_touched_is_what_it_was():
    path = write_rows(Path("d.jsonl"), preference_rows(12))
    found = assembled()
    assert found._sources.opened
    os.utime(path)
    assert len(list(found.windows())) == 1


def test_a_source_that_nobody_touched_is_not_read_again_for_its_digest(monkeypatch):
    write_rows(Path("d.jsonl"), preference_rows(12))
    found = assembled()
    assert found._sources.opened
    monkeypatch.setattr(Content, "of", lambda *_: pytest.fail("read"))
    assert len(list(found.windows())) == 1


def test_a_table_outlives_the_cache():
    write_rows(Path("d.jsonl"), preference_rows(12))
    found = table_of()
    shutil.rmtree("data/cache/tokenised")
    assert len(rows_of(found)) == 12


def test_a_range_says_the_line_that_is_broken_in_the_file(monkeypatch):
    rows = preference_rows(40)
    write_rows(Path("d.jsonl"), rows)
    lines = Path("d.jsonl").read_text().splitlines(keepends=True)
    lines[29] = "{broken\n"
    Path("d.jsonl").write_text("\n\n" + "".join(lines))
    with pytest.raises(DataError) as whole:
        table_of()
    monkeypatch.setattr(ranges, "RANGE_BYTES", 500)
    with pytest.raises(DataError) as in_ranges:
        table_of()
    assert "line 32" in str(whole.value)
    assert str(in_ranges.value) == str(whole.value)


@pytest.mark.parametrize("size", [1, 7, 50, 100, 1000])
def test_ranges_have_each_line_once(monkeypatch, size):
    monkeypatch.setattr(ranges, "RANGE_BYTES", size)
    rows = [{"at": at, "text": "é" * (at * 7 % 40)} for at in range(30)]
    write_rows(Path("d.jsonl"), rows)
    for end in ("", "\n\n  \n"):
        Path("d.jsonl").write_bytes(b"\xef\xbb\xbf" + Path("d.jsonl").read_bytes().rstrip() + end.encode())
        found = ranges.ranges_of(*[Path("d.jsonl")] * 2, Content.of(Path("d.jsonl")))
        assert [row for one in found for row in one.rows()] == rows
        assert sum(one.bytes for one in found) == pytest.approx(Path("d.jsonl").stat().st_size, abs=len(found))
        assert len(found) == 1 or all(one.part for one in found)
        Path("d.jsonl").write_bytes(Path("d.jsonl").read_bytes().removeprefix(b"\xef\xbb\xbf"))


def test_a_line_longer_than_a_range_leaves_ranges_without_a_row(monkeypatch):
    rows = preference_rows(12)
    rows[5]["chosen"] += "x" * 5000
    path = write_rows(Path("d.jsonl"), rows)
    path.write_text(path.read_text() + "\n" * 3000)
    whole = rows_of(table_of())
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1000)
    monkeypatch.setattr(assembly, "WINDOW", 4)
    found = assembled()
    bounds = [(first, end) for first, end, _ in found.windows()]
    assert rows_of(found.table) == whole
    assert [first for first, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
    assert len(found.table.parts) > 9


def test_ranges_of_a_table_are_its_row_groups(monkeypatch):
    rows = preference_rows(50)
    pq.write_table(pa.Table.from_pylist(rows), "d.parquet", row_group_size=6)
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1000)
    found = ranges.ranges_of(*[Path("d.parquet")] * 2, Content.of(Path("d.parquet")))
    assert len(found) > 2
    assert [row for one in found for row in one.rows()] == rows


class Elsewhere:
    """A tokenizer's maker that does something else in another process than this one."""

    def __init__(self, does):
        self.here, self.does = os.getpid(), does

    def __call__(self):
        if os.getpid() != self.here:
            self.does()
        return make_tiny_tokenizer()


def refuses():
    raise ConfigError("no such tokenizer")


def in_two_processes(does):
    how = How(Elsewhere(does), None, REFERENCE, partial(keys_of, REFERENCE))
    return Assembly(DataConfig(path="d.jsonl", workers=2), "pairs", how, make_tiny_tokenizer()).windows()


def test_a_process_that_is_killed_is_said():
    write_rows(Path("d.jsonl"), preference_rows(6))
    with pytest.raises(RefscoreError, match=r"was killed.*data\.workers=1"):
        list(in_two_processes(partial(os._exit, 9)))


def test_a_process_that_is_killed_while_others_look_at_a_window_is_said(monkeypatch):
    write_rows(Path("d.jsonl"), preference_rows(60))
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1000)
    monkeypatch.setattr(assembly, "WINDOW", 4)
    windows = in_two_processes(make_tiny_tokenizer)
    next(windows)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    with pytest.raises(RefscoreError, match=r"was killed.*data\.workers=1"):
        list(windows)


def test_processes_read_no_further_than_one_would(monkeypatch):
    write_rows(Path("d.jsonl"), preference_rows(60))
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1000)
    one, two = (table_of(max_rows=20, workers=workers) for workers in (1, 2))
    assert one.read == two.read == 20
    assert rows_of(one) == rows_of(two)


def test_what_a_process_meets_as_it_begins_is_said():
    write_rows(Path("d.jsonl"), preference_rows(6))
    with pytest.raises(ConfigError, match="no such tokenizer"):
        list(in_two_processes(refuses))


PARENT = """
import multiprocessing, os, signal
from concurrent.futures import ProcessPoolExecutor
from pipeline.pairs.tokenised.making import _begin_process, _without_main
pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin_process, (None,))
with _without_main():
    print(pool.submit(os.getpid).result(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_outlives_one_that_is_killed():
    # the pipe is at its end once nobody has it any more
    ended = subprocess.run([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, timeout=60, cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL


def test_processes_are_as_many_as_there_are_ranges_and_processors(monkeypatch):
    asked = []
    real = assembly.Maker
    monkeypatch.setattr(assembly, "Maker", lambda *given: asked.append(given[-1]) or real(*given[:-1], 1))
    monkeypatch.setattr(assembly, "processors", lambda: [0, 1, 2])
    write_rows(Path("d.jsonl"), preference_rows(20))
    size = Path("d.jsonl").stat().st_size
    for bytes_of_a_range in (size + 1, size // 2, size // 9):
        monkeypatch.setattr(assembly, "RANGE_BYTES", bytes_of_a_range)
        table_of()
    assert asked == [1, 2, 3]
    table_of(workers=5)
    assert asked[-1] == 5

"""Where rows come from: digests that say whether they are the same, pipes, folders, memory, and that none is lost."""

import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from functools import partial
from pathlib import Path

import datasets
import pytest

from pipeline.config.experiment import DataConfig
from pipeline.errors import CheckError, DataError
from pipeline.pairs import preferences
from pipeline.pairs.preferences import open_source
from pipeline.pairs.reading.files import file_rows
from pipeline.pairs.reading.json_rows import json_rows
from pipeline.pairs.rows import open_parts, open_rows, source_digest
from pipeline.pairs.splits import PairStream, source_digests
from pipeline.pairs.tokenised import part
from pipeline.pairs.tokenised.assembly import Assembly
from pipeline.pairs.tokenised.making import How
from pipeline.store.identity import keys_of
from tests.conftest import ROOT, make_tiny_tokenizer, write_rows
from tests.pairs.inputs import GOOD, WHO, gz, lines, parquet, zstd


def named(name, **data):
    return [part.name for part in open_parts(name, DataConfig(path=name, **data))[0]]


def test_parts_are_in_the_order_of_their_names_and_rows_say_their_file():
    for name in ("p/b.jsonl", "p/a.jsonl", "p/c/a.jsonl"):
        write_rows(Path(name), [GOOD, WHO])
    assert named("p/*.jsonl") == ["p/a.jsonl", "p/b.jsonl"]
    assert named("p/**/*.jsonl") == ["p/a.jsonl", "p/b.jsonl", "p/c/a.jsonl"]
    assert named("p") == ["p/a.jsonl", "p/b.jsonl", "p/c/a.jsonl"]
    assert named("p/a.jsonl") == ["p/a.jsonl"]
    found = list(open_source("p", DataConfig(path="p")).preferences())
    assert [(one.source, one.row) for one in found] == [
        (f"p/{name}.jsonl", row) for name in ("a", "b", "c/a") for row in (0, 1)
    ]
    rows, _ = open_rows("p", DataConfig(path="p"))
    assert len(list(rows())) == len(list(rows())) == 6


@pytest.mark.parametrize("name", ["p", "p/*.jsonl"])
def test_the_digest_of_several_files_is_that_of_their_bytes_and_names(name):
    data = DataConfig(path=name)
    first, second = write_rows(Path("p/a.jsonl"), [GOOD]), write_rows(Path("p/b.jsonl"), [WHO])
    before = source_digests(data)
    assert before == {name: open_parts(name, data)[1]}
    os.utime(first)
    (Path("p/.hidden")).write_text("x")
    assert source_digests(data) == before
    second.write_bytes(lines({**WHO, "rejected": "x"}))
    changed = source_digests(data)
    second.rename("p/c.jsonl")
    moved = source_digests(data)
    write_rows(Path("p/d.jsonl"), [WHO])
    more = source_digests(data)
    assert len({one[name] for one in (before, changed, moved, more)}) == 4
    assert None not in more.values()
    # only the split that is read counts
    for path in ("p/a.jsonl", "p/c.jsonl", "p/d.jsonl"):
        Path(path).unlink()
    assert source_digest("gone/*.jsonl", "train") is source_digest("gone", "train") is None


def test_a_folder_elsewhere_with_the_same_files_is_the_same():
    for place in ("one", "two"):
        write_rows(Path(place, "train.jsonl"), [GOOD])
        write_rows(Path(place, "test.jsonl"), [{**GOOD, "chosen": place}])
    assert source_digest("one", "train") == source_digest("two", "train")
    assert source_digest("one", "test") != source_digest("two", "test")


def test_a_folder_that_says_how_it_is_read_is_read_so():
    rows = [{**GOOD, "prompt": f"{n}?"} for n in range(4)]
    datasets.Dataset.from_list(rows).save_to_disk("saved")
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(rows[:3])}).save_to_disk("splits")
    write_rows(Path("card/some.jsonl"), rows[:2])
    Path("card/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: some.jsonl\n---\n")
    write_rows(Path("sliced/train.jsonl"), rows)
    for name, split, count in (
        ("saved", "train", 4),
        ("splits", "dev", 3),
        ("card", "train", 2),
        ("sliced", "train[:1]", 1),
    ):
        found = list(open_source(name, DataConfig(path=name, split=split)).preferences())
        assert len(found) == count, name
        assert source_digest(name, split) is None
    with pytest.raises(DataError, match="other"):
        open_source("splits", DataConfig(path="splits", split="other"))


def test_a_folder_that_leads_back_to_itself_is_read_once():
    write_rows(Path("p/a.jsonl"), [GOOD])
    Path("p/again").symlink_to(Path("p").absolute())
    write_rows(Path("elsewhere/b.jsonl"), [WHO])
    Path("p/linked").symlink_to(Path("elsewhere").absolute())
    assert named("p") == ["p/a.jsonl", "p/linked/b.jsonl"]


def test_what_cannot_be_read_is_said(monkeypatch):
    path = write_rows(Path("p/d.jsonl"), [GOOD])

    def refuse(error):
        def opened(self, *how, **more):
            raise error

        return opened

    for name in ("p/d.jsonl", "p/*.jsonl", "p"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", refuse(PermissionError(13, "Permission denied")))
            with pytest.raises(DataError, match=r"p/d\.jsonl cannot be read \(Permission denied\)"):
                open_source(name, DataConfig(path=name))
            with pytest.raises(DataError, match="Permission denied"):
                list(file_rows(path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse(PermissionError(13, "Permission denied", "p")))
        with pytest.raises(DataError, match=r"p cannot be read \(Permission denied\)"):
            open_source("p", DataConfig(path="p"))


def big(count):
    return [{**GOOD, "prompt": f"{n}?", "chosen": "x" * 900} for n in range(count)]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.jsonl.gz", "d.jsonl.zst", "d.parquet"])
def test_memory_does_not_grow_with_rows(name):
    def peak(count):
        write(Path(name), big(count))
        tracemalloc.start()
        assert sum(1 for _ in file_rows(Path(name))) == count
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    few, many = peak(4000), peak(24000)
    assert many < 1.2 * few + 200_000


def write(path, rows):
    text = lines(*rows)
    delimiter = {".csv": ",", ".tsv": "\t"}.get(path.suffix)
    if delimiter:
        text = "\n".join(delimiter.join(row) for row in [GOOD, *(row.values() for row in rows)]).encode()
    contents = {
        ".json": lambda: json.dumps(rows).encode(),
        ".gz": lambda: gz(text),
        ".zst": lambda: zstd(text),
        ".parquet": lambda: parquet(rows, row_group_size=1000),
    }
    path.write_bytes(contents.get(path.suffix, lambda: text)())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_json_is_read_alike_however_it_arrives(size, monkeypatch):
    """In pieces of any size: within names, numbers, characters of several bytes and escapes."""
    rows = [
        {"a": "ä€𝄞", "b": [1.5e-3, -20, True, None], "c": {"d": 'e "f" \\ \u20ac'}, "long": "x" * 99},
        {},
        {"é": [[], {}, ""], "n": 12345678901234567890},
    ]

    class Trickle(io.BytesIO):
        def read(self, wanted=-1):
            return super().read(size)

    for text in (
        json.dumps(rows),
        json.dumps(rows, indent=2, ensure_ascii=False),
        "\ufeff" + json.dumps(rows),
        "\n\n".join(map(json.dumps, rows)),
    ):
        assert list(json_rows(Trickle(text.encode()), Path("d.json"))) == rows
    for broken, where in (
        ('[{"a": 1},\n {"b": 2,}]', "line 2, column 10"),
        ('[{"a": 1}, {"b" 2}]', "line 1, column 17"),
        ('[{"a": 1},\n\n {"b" 2}]', "line 3, column 7"),
        ('[{"a":\n "b', "line 2, column 2"),
    ):
        with pytest.raises(DataError, match=where):
            list(json_rows(Trickle(broken.encode()), Path("d.json")))


def test_rows_that_are_lost_on_the_way_are_noticed(monkeypatch):
    tokenizer = make_tiny_tokenizer()
    path = str(write_rows(Path("d.jsonl"), [{**GOOD, "prompt": f"{n}?"} for n in range(5)]))

    def stream():
        return PairStream(DataConfig(path=path, eval_fraction=0), tokenizer)

    def but_the_third(items):
        return (item for number, item in enumerate(items) if number != 2)

    assert len(list(stream())) == 5
    with monkeypatch.context() as patch:
        loses = stream()
        both = loses._encoder.both
        patch.setattr(loses._encoder, "both", lambda items: but_the_third(both(items)))
        with pytest.raises(CheckError, match="5 rows were read, and 4 are pairs or dropped"):
            list(loses)
    with monkeypatch.context() as patch:
        patch.setattr(part, "_rows", lambda *given, rows=part._rows: but_the_third(rows(*given)))
        how = How(lambda: tokenizer, None, "0" * 64, partial(keys_of, "0" * 64))
        with pytest.raises(CheckError, match="5 rows were read, and 4 are pairs or dropped"):
            list(Assembly(DataConfig(path=path), "pairs", how, tokenizer).windows())
    with monkeypatch.context() as patch:
        real = preferences.Source._unit
        patch.setattr(
            preferences.Source,
            "_rows",
            lambda self, part, rows=preferences.Source._rows: but_the_third(rows(self, part)),
        )
        assert real is preferences.Source._unit
        with pytest.raises(CheckError, match="rows were lost"):
            list(open_source(path, DataConfig(path=path)).preferences())


def test_a_parquet_file_that_gives_fewer_rows_than_it_says_is_refused(monkeypatch):
    import pyarrow.parquet as pq

    Path("d.parquet").write_bytes(parquet(big(10), row_group_size=4))
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, size, groups: real(self, size, groups) if groups != [1] else iter(()),
    )
    with pytest.raises(DataError, match="gave 6 rows and says that it holds 10"):
        list(file_rows(Path("d.parquet")))


def test_a_named_pipe_is_read_once_and_kept():
    os.mkfifo("rows")
    content = lines(GOOD, WHO)
    threading.Thread(target=lambda: Path("rows").write_bytes(content), daemon=True).start()
    source = open_source("rows", DataConfig(path="rows"))
    assert [len(list(source.preferences())) for _ in range(2)] == [2, 2]
    write_rows(Path("same.jsonl"), [GOOD, WHO])
    assert source.digest == source_digest("same.jsonl", "train")
    # asked whether it is current, a pipe says nothing: it may have no writer any more
    assert source_digest("rows", "train") is None


READER = """
import sys
from pipeline.config.experiment import DataConfig
from pipeline.errors import RefscoreError
from pipeline.pairs.preferences import open_source
try:
    for _ in range(2):
        source = open_source("-", DataConfig(path="-", eval_path="-"))
        print(source.format, len(list(source.preferences())), source.digest[:8])
except RefscoreError as error:
    print(type(error).__name__, error)
"""


def through_stdin(content, **how):
    done = subprocess.run(
        [sys.executable, "-c", READER], **({"input": content} if content is not None else {}), **how,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.stdout.decode().strip()


CSV = b"prompt,chosen,rejected\nHi?,a,b\nWho?,c,d\n"
PIPED = {
    "lines": lines(GOOD, WHO),
    "gzip": gz(lines(GOOD, WHO)),
    "zstd": zstd(lines(GOOD, WHO)),
    "a list": b"\n" + json.dumps([GOOD, WHO], indent=2).encode(),
    "objects over many lines": json.dumps(GOOD, indent=2).encode() + json.dumps(WHO, indent=2).encode(),
    "Parquet": parquet([GOOD, WHO]),
    "CSV": CSV,
    "CSV from Excel": b"\xef\xbb\xbf" + CSV,
    "TSV": CSV.replace(b",", b"\t"),
}


@pytest.mark.parametrize("kind", PIPED)
def test_standard_input_is_read_as_what_it_is(kind):
    first, second = through_stdin(PIPED[kind]).splitlines()
    assert first.startswith("TRL explicit, strings 2 ")
    assert first == second
    assert not list(Path().glob("data/cache/stdin-*"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "standard input holds no rows. It can be read once"),
        (b"\n\n", "holds no rows"),
        (lines(GOOD, "{"), "standard input, line 2, column 2: not valid JSON"),
        (
            lines(GOOD).decode().encode("utf-16"),
            "standard input is UTF-16 text, UTF-8 is read: pipe it through iconv -f UTF-16 -t UTF-8",
        ),
        (lines({**GOOD, "chosen": "x"}).replace(b"x", b"\xe4"), "pipe it through iconv -f WINDOWS-1252"),
        (gz(lines(GOOD) * 99)[:-20], "standard input: its compressed data is broken"),
        (b"hello", "holds no rows"),
    ],
)
def test_what_is_wrong_with_standard_input_is_said(content, says):
    said = through_stdin(content)
    assert said.startswith("DataError")
    assert says in said


def test_a_person_is_not_asked_to_type_rows():
    master, terminal = os.openpty()
    try:
        assert "that is the terminal: pipe the rows in" in through_stdin(None, stdin=terminal)
    finally:
        os.close(master)
        os.close(terminal)


def test_a_data_set_out_of_reach_is_a_message_whatever_the_http_library_raises(monkeypatch):
    class FromBelow(Exception):
        """An error that is none of datasets' and none of huggingface_hub's."""

    def load(*_, **__):
        raise FromBelow("timed out")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"cannot be loaded \(timed out\).*local file"):
        open_rows("lab/data", DataConfig(path="lab/data"))

"""The table of inputs: files as people have them, broken ones too, and what becomes of each. Nothing is lost without a word."""

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from tests.conftest import make_tiny_tokenizer
from tests.pairs.inputs import (
    ANSWER,
    CALL,
    GOOD,
    OTHER,
    TOOL,
    USER,
    WHO,
    Input,
    bz,
    gz,
    lines,
    outcome,
    parquet,
    xz,
    zipped,
    zstd,
)  # fmt: skip

TWO = lines(GOOD, WHO)
CSV = b"prompt,chosen,rejected\nHi?,Hello.,Go away.\nWho?,I am.,Nobody.\n"


def one(row, **expected):
    """A file of this row behind a good one."""
    return Input({"d.jsonl": lines(GOOD, row)}, kept=expected.pop("kept", 1), **expected)


def only(*rows, **expected):
    return Input({"d.jsonl": lines(*rows)}, **expected)


def data_error(files, says, **more):
    return Input(files if isinstance(files, dict) else {"d.jsonl": files}, error="DataError", says=says, **more)


def hi(text):
    return {**GOOD, "prompt": text}


FILES = {
    "JSON lines": Input({"d.jsonl": TWO}, kept=2),
    "JSON lines without a last line end": Input({"d.jsonl": TWO.rstrip()}, kept=2),
    "JSON lines under the other name": Input({"d.ndjson": TWO}, kept=2),
    "an ending in capitals": Input({"D.JSONL": TWO}, kept=2),
    "lines that end as Windows ends them": Input({"d.jsonl": lines(GOOD, WHO, end="\r\n")}, kept=2),
    "blank lines between": Input({"d.jsonl": lines(GOOD, "", "   ", WHO, "")}, kept=2),
    "a byte order mark": Input({"d.jsonl": b"\xef\xbb\xbf" + TWO}, kept=2),
    "a byte order mark alone on its line": Input({"d.jsonl": b"\xef\xbb\xbf\n" + TWO}, kept=2),
    "gzip": Input({"d.jsonl.gz": gz(TWO)}, kept=2),
    "gzip in two members": Input({"d.jsonl.gz": gz(lines(GOOD)) + gz(lines(WHO))}, kept=2),
    "gzip of the other name": Input({"d.ndjson.gz": gz(TWO)}, kept=2),
    "gzip of a list": Input({"d.json.gz": gz(json.dumps([GOOD, WHO]).encode())}, kept=2),
    "gzip of CSV": Input({"d.csv.gz": gz(CSV)}, kept=2),
    "zstd": Input({"d.jsonl.zst": zstd(TWO)}, kept=2),
    "zstd in two frames": Input({"d.jsonl.zst": zstd(lines(GOOD)) + zstd(lines(WHO))}, kept=2),
    "a list": Input({"d.json": json.dumps([GOOD, WHO]).encode()}, kept=2),
    "a list with a byte order mark": Input({"d.json": b"\xef\xbb\xbf" + json.dumps([GOOD, WHO]).encode()}, kept=2),
    "a list over many lines": Input({"d.json": json.dumps([GOOD, WHO], indent=4).encode()}, kept=2),
    "an empty list": data_error({"d.json": b" [ ] "}, "holds no rows"),
    "a list within an object": Input({"d.json": json.dumps({"version": 1, "data": [GOOD, WHO]}).encode()}, kept=2),
    "several lists within an object": data_error(
        {"d.json": json.dumps({"train": [GOOD], "test": [WHO]}).encode()}, "several lists (train, test)"
    ),
    "one row as an object": Input({"d.json": json.dumps(GOOD).encode()}, kept=1),
    "one row of messages as an object": Input(
        {"d.json": json.dumps({"prompt": [USER], "chosen": "y", "rejected": "n"}).encode()}, kept=1
    ),
    "JSON lines that are called JSON": Input({"d.json": TWO}, kept=2),
    "columns as JSON": data_error(
        {"d.json": json.dumps({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}).encode()}, "columns, not rows"
    ),
    "columns as pandas writes them": data_error(
        {"d.json": json.dumps({name: {"0": value} for name, value in GOOD.items()}).encode()}, "orient='records'"
    ),
    "a text as JSON": data_error({"d.json": b'"hello"'}, "must hold a list of rows, got str"),
    "a list that is cut off": data_error({"d.json": json.dumps([GOOD, WHO]).encode()[:-9]}, "d.json, line 1, column"),
    "a list whose end is missing": data_error({"d.json": json.dumps([GOOD, WHO]).encode()[:-1]}, "ends before its list does"),
    "a list with something behind it": data_error({"d.json": json.dumps([GOOD]).encode() + b" x"}, "something follows"),
    "a list with a comma missing": data_error(
        {"d.json": f"[{json.dumps(GOOD)}\n {json.dumps(WHO)}]".encode()}, "line 2, column 2: not valid JSON (Expecting ',')"
    ),
    "a list of lists": data_error({"d.json": b"[[1]]"}, "row 0: a row must be a JSON object, got list"),
    "CSV": Input({"d.csv": CSV}, kept=2),
    "CSV as Excel saves it": Input({"d.csv": b"\xef\xbb\xbf" + CSV.replace(b"\n", b"\r\n")}, kept=2),
    "CSV with quotes, commas and line breaks in a field": Input(
        {"d.csv": b'prompt,chosen,rejected\n"Hi, you?","He said ""yes"".\nThen left.",No\n\nWho?,I,Me\n'}, kept=2
    ),
    "CSV with a field of a megabyte": Input({"d.csv": b"prompt,chosen,rejected\nHi?,%b,no\n" % (b"x" * 2**20)}, kept=1),
    "CSV without a line of names": data_error({"d.csv": CSV.partition(b"\n")[2]}, "columns Go away., Hello., Hi? fit no known"),
    "CSV with names alone": data_error({"d.csv": b"prompt,chosen,rejected\n"}, "holds no rows"),
    "CSV with a name twice": data_error({"d.csv": b"prompt,chosen,chosen\na,b,c\n"}, "'chosen' stands twice"),
    "CSV with a field too many": data_error({"d.csv": CSV + b"a,b,c,d\n"}, "line 4: 4 fields, and the first line names 3"),
    "CSV with a field too few": data_error({"d.csv": CSV + b"a,b\n"}, "line 4: 2 fields"),
    "CSV with semicolons": data_error({"d.csv": CSV.replace(b",", b";")}, "separated by ';'"),
    "CSV that is TSV": data_error({"d.csv": CSV.replace(b",", b"\t")}, "name it .tsv"),
    "CSV with a quote that is not closed": data_error({"d.csv": CSV + b'a,"b,c\nd,e,f\n'}, "broken quotes"),
    "CSV with text behind a quote": data_error({"d.csv": CSV + b'a,"b" b,c\n'}, "line 4: broken quotes"),
    "CSV in Latin-1": data_error({"d.csv": CSV + "a,ü,c\n".encode("latin-1")}, "iconv -f WINDOWS-1252"),
    "CSV with an empty field": Input({"d.csv": CSV + b"a,,c\n"}, kept=2, dropped={"empty_response": 1}),
    "CSV with messages as JSON": Input(
        {"d.csv": b'chosen,rejected\n"%b","%b"\n' % tuple(
            json.dumps([USER, side]).replace('"', '""').encode() for side in (ANSWER, OTHER)
        )},
        kept=1,
    ),
    "CSV with messages as Python writes them": Input(
        {"d.csv": CSV + b"\"[{'role': 'user', 'content': 'Hi?'}]\",b,c\n"}, kept=2, dropped={"messages_as_text": 1}
    ),
    "CSV that says which response was cut off": Input(
        {"d.csv": b"prompt,chosen,rejected,chosen_cut_off\na,b,c,True\nd,e,f,\ng,h,i,maybe\n"}, kept=2, dropped={"wrong_type": 1}
    ),
    "TSV": Input({"d.tsv": CSV.replace(b",", b"\t")}, kept=2),
    "Parquet": Input({"d.parquet": parquet([GOOD, WHO])}, kept=2),
    "Parquet in row groups": Input({"d.parquet": parquet([hi(f"{n}?") for n in range(9)], row_group_size=2)}, kept=9),
    "Parquet of messages": Input({"d.parquet": parquet([{"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}])}, kept=1),
    "Parquet with a field of messages that most lack": Input(
        {"d.parquet": parquet([{"chosen": [USER, {**ANSWER, "name": None}], "rejected": [USER, {**OTHER, "name": "x"}]}])}, kept=1
    ),
    "Parquet with nested columns besides": Input(
        {"d.parquet": parquet([{**GOOD, "scores": [{"helpful": [1, 2]}], "meta": {"a": {"b": None}}}])}, kept=1
    ),
    "Parquet with large strings and a dictionary": Input(
        {"d.parquet": parquet(pa.table({
            "prompt": pa.array(["Hi?"], pa.large_string()), "chosen": pa.array(["y"]).dictionary_encode(), "rejected": ["n"],
        }))},
        kept=1,
    ),
    "Parquet with bytes for a text": Input(
        {"d.parquet": parquet([{**GOOD, "chosen": b"y"}, {**WHO, "chosen": b"z"}])}, dropped={"wrong_type": 2}
    ),
    "Parquet with no rows": data_error({"d.parquet": parquet(pa.table({"prompt": pa.array([], pa.string())}))}, "holds no rows"),
    "Parquet that is cut off": data_error({"d.parquet": parquet([GOOD])[:-9]}, "cannot be read as Parquet"),
    "Parquet with a byte changed": data_error(
        {"d.parquet": parquet([GOOD] * 50, compression="zstd").replace(b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfc", 1)},
        "cannot be read as Parquet",
    ),
    "Parquet with a column twice": data_error(
        {"d.parquet": parquet(pa.Table.from_arrays([pa.array(["a"])] * 3, ["prompt", "chosen", "chosen"]))}, "'chosen' stands twice"
    ),
    "Parquet with a time that Python has no word for": data_error(
        {"d.parquet": parquet(pa.table({**{k: [v] for k, v in GOOD.items()}, "when": pa.array([2**62], pa.timestamp("ms"))}))},
        "cannot be read as Parquet",
    ),
    "an empty file": data_error({"d.jsonl": b""}, "d.jsonl holds no rows"),
    "an empty list of a file": data_error({"d.json": b""}, "holds no rows"),
    "an empty CSV": data_error({"d.csv": b""}, "holds no rows"),
    "an empty Parquet file": data_error({"d.parquet": b""}, "cannot be read as Parquet"),
    "an empty gzip file": data_error({"d.jsonl.gz": b""}, "is empty, not even compressed"),
    "gzip of nothing": data_error({"d.jsonl.gz": gz(b"")}, "holds no rows"),
    "blank lines alone": data_error({"d.jsonl": b"\n \n\r\n"}, "holds no rows"),
    "gzip that is cut off": data_error({"d.jsonl.gz": gz(lines(*[hi(f"{os.urandom(9)}?") for _ in range(99)]))[:-200]}, "cut off"),
    "zstd that is cut off": data_error({"d.jsonl.zst": zstd(lines(*[hi(f"{os.urandom(9)}?") for _ in range(99)]))[:-200]}, "cut off"),
    "gzip with a byte changed": data_error({"d.jsonl.gz": gz(TWO)[:-6] + b"zzzzzz"}, "copy it again"),
    "what is called gzip and is none": data_error({"d.jsonl.gz": TWO}, "no gzip data"),
    "what is called zstd and is none": data_error({"d.jsonl.zst": TWO}, "no zstd data"),
    "gzip without its ending": data_error({"d.jsonl": gz(TWO)}, "run gunzip -c d.jsonl > unpacked.jsonl, or name it d.jsonl.gz"),
    "gzip in gzip": data_error({"d.jsonl.gz": gz(gz(TWO))}, "compressed twice"),
    "zstd without its ending": data_error({"d.jsonl": zstd(TWO)}, "run zstd -dc d.jsonl"),
    "bzip2 without its ending": data_error({"d.jsonl": bz(TWO)}, "run bunzip2 -c d.jsonl"),
    "xz without its ending": data_error({"d.csv": xz(CSV)}, "run unxz -c d.csv > unpacked.csv"),
    "zip without its ending": data_error({"d.jsonl": zipped(TWO)}, "run unzip -p d.jsonl"),
    "bzip2": data_error({"d.jsonl.bz2": bz(TWO)}, "got '.jsonl.bz2'"),
    "Parquet within gzip": data_error({"d.parquet.gz": gz(parquet([GOOD]))}, "all but Parquet also behind .gz"),
    "Parquet under another name": data_error({"d.jsonl": parquet([GOOD])}, "is a Parquet file: name it d.parquet"),
    "JSON lines that are called Parquet": data_error({"d.parquet": TWO}, "cannot be read as Parquet"),
    "a spreadsheet": data_error({"d.xlsx": b"PK\x03\x04"}, "got '.xlsx'"),
    "no ending": data_error({"data": TWO}, "got 'no ending'"),
    "a text file": data_error({"d.txt": TWO}, "got '.txt'"),
    "a web page": data_error({"d.jsonl": b"\n<!DOCTYPE html><html>"}, "web page"),
    "CSV with a name in brackets": Input({"d.csv": b"<id>," + CSV.replace(b"\n", b"\n1,").rstrip(b"1,")}, kept=2),
    "XML": data_error({"d.json": b'<?xml version="1.0"?><a/>'}, "web page or XML"),
    "a pointer of Git LFS": data_error({"d.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"}, "git lfs pull"),
    "UTF-16 with its mark": data_error(TWO.decode().encode("utf-16"), "run iconv -f UTF-16 -t UTF-8 d.jsonl > utf8.jsonl"),
    "UTF-16 without a mark": data_error(TWO.decode().encode("utf-16-le"), "iconv -f UTF-16LE"),
    "UTF-16 of the other order": data_error(TWO.decode().encode("utf-16-be"), "iconv -f UTF-16BE"),
    "UTF-32": data_error(TWO.decode().encode("utf-32"), "iconv -f UTF-32"),
    "UTF-16 within gzip": data_error(
        {"d.jsonl.gz": gz(TWO.decode().encode("utf-16"))}, "gunzip -c d.jsonl.gz | iconv -f UTF-16 -t UTF-8 > utf8.jsonl"
    ),
    "Latin-1": data_error(TWO + '{"prompt": "ä"}\n'.encode("latin-1"), "d.jsonl, line 3, byte 13: not valid UTF-8. If it is Latin-1"),
    "a list in Latin-1": data_error({"d.json": '[{"prompt": "ä"}]'.encode("latin-1")}, "iconv -f WINDOWS-1252"),
    "zeros alone": data_error(b"\0" * 5000, "zero bytes"),
    "zeros in a line": data_error(TWO + b'{"prompt": "a\0b"}\n', "line 3, column 14: not valid JSON (Invalid control"),
    "zeros behind the rows": data_error(TWO + b"\0" * 99, "line 3, column 1"),
    "lines that end as old Macs ended them": data_error(lines(GOOD, WHO, end="\r"), "a line holds one row"),
    "objects one after the other": data_error(lines(GOOD, WHO, end=""), "a line holds one row"),
    "a list in a file of lines": data_error(json.dumps([GOOD]).encode(), "ends in .json"),
    "an object over many lines": data_error(json.dumps(GOOD, indent=2).encode(), "line 1, column 2: not valid JSON"),
    "a line that is cut off": data_error(TWO[:-9], "d.jsonl, line 2, column"),
    "a comment": data_error(b"# pairs\n" + TWO, "line 1, column 1"),
    "single quotes": data_error(b"{'prompt': 'a'}\n", "line 1, column 2"),
    "a comma at the end": data_error(b'{"prompt": "a",}\n', "line 1, column"),
    "a text for a row": data_error(TWO + b'"hello"\n', "line 3: a row must be a JSON object, got str"),
    "null for a row": data_error(TWO + b"null\n", "line 3: a row must be a JSON object, got NoneType"),
    "a number of many digits": data_error(TWO + b'{"n": %b}\n' % (b"9" * 5000), "line 3: a number of more than 4300 digits"),
    "a number of many digits in a list": data_error({"d.json": b'[{"n": %b}]' % (b"9" * 5000)}, "more than 4300 digits"),
    "a number beyond all integers": one({**WHO, "n": 10**400}, kept=2),
    "lists in lists in lists": data_error(TWO + b"[" * 100000, "line 3: nested too deeply"),
    "a row with lists in lists in lists": data_error(
        TWO + b'{"a": %b%b}\n' % (b"[" * 100000, b"]" * 100000), "line 3: nested too deeply"
    ),
    "a key twice": data_error(TWO + b'{"prompt": "a", "chosen": "b", "chosen": "c"}\n', "line 3: the key 'chosen' stands twice"),
    "a key twice in a list": data_error({"d.json": b'[{"a": 1, "a": 2}]'}, "'a' stands twice"),
    "NaN and infinity": Input({"d.jsonl": TWO + b'{"prompt": "x", "chosen": "b", "rejected": "c", "s": NaN, "t": -Infinity}\n'}, kept=3),
    "a line of a megabyte": one(hi("x" * 2**20), kept=2),
}  # fmt: skip


def folder(files, **how):
    return Input({f"set/{name}": content for name, content in files.items()}, path="set", **how)


def pipe(where):
    os.mkfifo(where / "set/pipe.jsonl")


def dangling(where):
    (where / "set/b.jsonl").symlink_to(where / "gone.jsonl")


def link(where):
    (where / "d.jsonl").symlink_to(where / "gone.jsonl")


SOURCES = {
    "a list of paths": Input({"a.jsonl": lines(GOOD), "b.csv": CSV.replace(b"Hi?", b"Ho?")}, path=["a.jsonl", "b.csv"], kept=3),
    "a path twice": Input({"a.jsonl": TWO}, path=["a.jsonl", "a.jsonl"], kept=2, dropped={"duplicate": 2}),
    "a pattern": Input({"p/b.jsonl": lines(GOOD), "p/a.jsonl": lines(WHO), "p/c.txt": b"x"}, path="p/*.jsonl", kept=2),
    "a pattern over folders": Input({"p/x/b.jsonl": lines(GOOD), "p/a.jsonl": lines(WHO)}, path="p/**/*.jsonl", kept=2),
    "a pattern of kinds": Input({"p/a.jsonl": lines(GOOD), "p/b.csv": CSV}, path="p/[ab].*", kept=2, dropped={"duplicate": 1}),
    "a pattern of forms": Input(
        {"p/a.jsonl": lines(GOOD), "p/b.jsonl": lines({"chosen": [USER, OTHER], "rejected": [USER, ANSWER]})}, path="p/?.jsonl", kept=2
    ),
    "a pattern that fits nothing": data_error({"a.jsonl": TWO}, "no file is of this pattern", path="b*.jsonl"),
    "a pattern that fits a folder": data_error({"p/x/a.jsonl": TWO}, "also fits the folder p/x", path="p/*"),
    "a pattern that fits other files": data_error({"p/a.jsonl": TWO, "p/b.txt": b""}, "also fits p/b.txt", path="p/*"),
    "a name with signs of a pattern": Input({"a[1].jsonl": TWO}, kept=2),
    "a pattern with a broken file": data_error({"p/a.jsonl": TWO, "p/b.jsonl": b"{\n"}, "p/b.jsonl, line 1", path="p/*.jsonl"),
    "a pattern with an empty file": Input({"p/a.jsonl": TWO, "p/b.jsonl": b""}, path="p/*.jsonl", kept=2),
    "a name with spaces": Input({"my own data.jsonl": TWO}, kept=2),
    "a folder": folder({"a.jsonl": lines(GOOD), "b.jsonl": lines(WHO)}, kept=2),
    "a folder of several kinds": folder({"a.jsonl": lines(GOOD), "b.parquet": parquet([WHO]), "c.csv.gz": gz(CSV)}, kept=2, dropped={"duplicate": 2}),
    "a folder with what is no data": folder(
        {"a.jsonl": TWO, "README.md": b"# x", "LICENSE": b"", ".gitattributes": b"", "dataset_infos.json": b"{}"}, kept=2
    ),
    "a folder with a file of another kind": data_error({"set/a.jsonl": TWO, "set/b.xlsx": b""}, "also holds b.xlsx, which is not read", path="set"),
    "a folder with an archive": data_error({"set/a.jsonl": TWO, "set/more/b.zip": b""}, "also holds more/b.zip", path="set"),
    "a folder with a broken file": data_error({"set/a.jsonl": TWO, "set/b.parquet": b"PAR1"}, "set/b.parquet cannot be read", path="set"),
    "a folder with a side file": data_error({"set/a.jsonl": TWO, "set/info.json": b'{"a": 1}'}, "set/info.json: columns a", path="set"),
    "a folder of splits": folder({"train.jsonl": TWO, "test.jsonl": lines(hi("T?"))}, kept=2),
    "a folder of splits, another asked for": folder({"train.jsonl": TWO, "test.jsonl": lines(hi("T?"))}, kept=1, data={"split": "test"}),
    "a folder of shards": folder(
        {f"data/{split}-0000{n}-of-00002.parquet": parquet([hi(f"{split}{n}?")]) for split in ("train", "test") for n in (0, 1)}, kept=2
    ),
    "a folder of folders of splits": folder({"train/a.jsonl": TWO, "validation/a.jsonl": lines(hi("V?"))}, kept=1, data={"split": "validation"}),
    "a folder where a file has no split": data_error({"set/train.jsonl": TWO, "set/more.jsonl": TWO}, "more.jsonl belongs to no split", path="set"),
    "a folder without the split": data_error({"set/train.jsonl": TWO}, "no split 'dev': its files give train", path="set", data={"split": "dev"}),
    "a folder with a pipe": data_error({"set/a.jsonl": TWO}, "also holds pipe.jsonl, which is not read", path="set", before=pipe),
    "a pattern with a pipe": data_error({"set/a.jsonl": TWO}, "also fits set/pipe.jsonl", path="set/*", before=pipe),
    "a folder with a link to nowhere": data_error(
        {"set/a.jsonl": TWO}, "set/b.jsonl cannot be read (No such file or directory)", path="set", before=dangling
    ),
    "an empty folder": data_error({}, "holds no file of preference data", path="set", before=lambda where: (where / "set").mkdir()),
    "a folder without data": data_error({"set/README.md": b""}, "holds no file of preference data", path="set"),
    "a missing file": data_error({}, "no such file or folder", path="gone.jsonl"),
    "a missing file in gzip": data_error({}, "no such file or folder", path="x/gone.jsonl.gz"),
    "a link to nowhere": data_error({}, "is a link to", path="d.jsonl", before=link),
    "a device": data_error({}, "is no file, folder or pipe", path="/dev/null"),
    "no name": Input({}, path="", error="ConfigError", says="data.path is empty"),
    "a name that is too long": data_error({}, "no path", path="x" * 5000 + ".jsonl"),
    "the home of nobody": data_error({}, "no path", path="~nobodyofthatname/x.jsonl"),
    "an embedded file that there is not": data_error({}, "no such file comes with refscore", path="embedded:demo/x.jsonl"),
    "a split of a file": Input({"d.jsonl": TWO}, error="ConfigError", says="names files only", data={"split": "test"}),
    "a split of a pattern": Input({"d.jsonl": TWO}, path="*.jsonl", error="ConfigError", says="names files only", data={"split": "test"}),
    "a revision of a pattern": Input({"d.jsonl": TWO}, path="*.jsonl", error="ConfigError", says="names none", data={"revision": "x"}),
    "a limit of rows over files": Input({"p/a.jsonl": TWO, "p/b.jsonl": lines(hi("B?"), hi("C?"))}, path="p/*.jsonl", kept=3, data={"max_rows": 3}),
}  # fmt: skip


def hh(*turns):
    return "".join(f"\n\n{speaker}: {text}" for speaker, text in turns)


HH = hh(("Human", "A"), ("Assistant", "B"), ("Human", "C"))
ASKED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "content": "12:00", "tool_call_id": "1"}


def nested(depth):
    tool = {}
    for _ in range(depth):
        tool = {"a": tool}
    return tool


ROWS = {
    "prompt, chosen, rejected": only(GOOD, kept=1),
    "only null": one({"prompt": None, "chosen": None, "rejected": None}, dropped={"missing_field": 1}),
    "a null": one({**WHO, "rejected": None}, dropped={"missing_field": 1}, detail="rejected"),
    "a field missing": one({"prompt": "a", "chosen": "b"}, dropped={"missing_field": 1}, detail="rejected"),
    "an empty row": one({}, dropped={"missing_field": 1}),
    "a number for a text": one({**WHO, "chosen": 3}, dropped={"wrong_type": 1}, detail="chosen is int, expected a list"),
    "a truth for a text": one({**WHO, "prompt": True}, dropped={"wrong_type": 1}, detail="prompt is bool"),
    "NaN for a text": one({**WHO, "chosen": float("nan")}, dropped={"wrong_type": 1}),
    "an object for a prompt": one({**WHO, "prompt": {"a": 1}}, dropped={"wrong_type": 1}),
    "an empty list for a response": one({**WHO, "chosen": []}, dropped={"wrong_type": 1}),
    "a list of texts for a response": one({**WHO, "chosen": ["a", "b"]}, dropped={"wrong_type": 1}),
    "numbers as text": one({"prompt": "1+1?", "chosen": "2", "rejected": "3"}, kept=2),
    "an empty response": one({**WHO, "chosen": "\n"}, dropped={"empty_response": 1}),
    "an empty prompt": one(hi("  "), dropped={"empty_prompt": 1}),
    "equal responses": one({**WHO, "rejected": WHO["chosen"]}, dropped={"identical_responses": 1}),
    "a row twice": only(GOOD, GOOD, kept=1, dropped={"duplicate": 1}),
    "half a character": one({**WHO, "chosen": "a \ud83d"}, dropped={"half_a_character": 1}, detail="chosen, at character 2"),
    "half a character in the topic": one({**WHO, "topic": "\ud83d"}, dropped={"half_a_character": 1}, detail="topic"),
    "half a character in a name of a column": one({**WHO, "\ud83d": 1}, kept=2),
    "half a character in all names": data_error(lines({"\ud83d": "a"}), r"columns \ud83d fit no known"),
    "a long name of a column": data_error(lines({"x" * 500: "a"}), "x" * 39 + "… fit"),
    "many columns": data_error(lines({f"c{n:03}": 1 for n in range(99)}), "and 79 more"),
    "unread columns": one({**WHO, "score": 1, "id": "x"}, kept=2),
    "a zero byte as JSON writes it": one(hi("a\u0000b"), kept=2),
    "messages as text": one(hi(json.dumps([USER])), dropped={"messages_as_text": 1}),
    "all messages as text": only({"chosen": json.dumps([USER, ANSWER]), "rejected": json.dumps([USER, OTHER])}, dropped={"messages_as_text": 1}),
    "messages": only({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, kept=1),
    "messages, the responses as objects": only({"prompt": [USER], "chosen": ANSWER, "rejected": OTHER}, kept=1),
    "messages, the responses as texts": only({"prompt": [USER], "chosen": "y", "rejected": "n"}, kept=1),
    "messages, all of them in the responses again": only({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, kept=1),
    "messages, others in the responses": only(
        {"prompt": [USER], "chosen": [{**USER, "content": "Ho"}, ANSWER], "rejected": [USER, OTHER]}, dropped={"response_of_many_messages": 1}
    ),
    "an unknown role": only({"prompt": [{**USER, "role": "wizard"}], "chosen": "a", "rejected": "b"}, dropped={"unknown_role": 1}),
    "no role": only({"prompt": [{"content": "a"}], "chosen": "a", "rejected": "b"}, dropped={"unknown_role": 1}),
    "a role that is a list": only({"prompt": [{"role": [1], "content": "a"}], "chosen": "a", "rejected": "b"}, dropped={"unknown_role": 1}),
    "a message without content": only({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, dropped={"wrong_type": 1}),
    "a response by the user": only({"prompt": [USER], "chosen": [USER], "rejected": [OTHER]}, dropped={"last_turn_not_assistant": 1}),
    "the assistant's turn as the prompt's last": only(
        {"prompt": [USER, ANSWER], "chosen": "a", "rejected": "b"}, dropped={"assistant_after_assistant": 1}, detail="the assistant's own turn"
    ),
    "the assistant twice within": only(
        {"prompt": [USER, ANSWER, ANSWER, USER], "chosen": "a", "rejected": "b"}, dropped={"assistant_after_assistant": 1}, detail="messages 1 and 2"
    ),
    "the assistant's turn as the last, as plain text": only(
        {"prompt": [USER, ANSWER], "chosen": " a", "rejected": " b"}, kept=1, data={"template": "none"}
    ),
    "text in parts": only(
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}]}], "chosen": "a", "rejected": "b"}, kept=1
    ),
    "a response in parts": only({"prompt": [USER], "chosen": [{"type": "text", "text": "a"}], "rejected": "b"}, kept=1),
    "a picture in parts": only(
        {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}, {"type": "text", "text": "?"}]}], "chosen": "a", "rejected": "b"},
        dropped={"content_not_text": 1}, detail="'image'",
    ),
    "a picture with a text": only(
        {"prompt": [{"role": "user", "content": [{"type": "image", "text": "a cat"}]}], "chosen": "a", "rejected": "b"}, dropped={"content_not_text": 1}
    ),
    "a part without text": only(
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": None}]}], "chosen": "a", "rejected": "b"}, dropped={"content_not_text": 1}
    ),
    "a list of texts as content": only({"prompt": [{"role": "user", "content": ["a"]}], "chosen": "a", "rejected": "b"}, dropped={"content_not_text": 1}),
    "the prompt within both": only({"prompt": "Hi?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, kept=1),
    "the prompt within both, and another prompt": only(
        {"prompt": "Who are you?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, dropped={"prompt_contradicts_messages": 1}
    ),
    "the prompt within both, with other spaces": only({"prompt": " Hi? ", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, kept=1),
    "the prompt beside a single message, among others": only(
        *[{"prompt": "Hi?", "chosen": [USER, {**ANSWER, "content": f"{n}"}], "rejected": [USER, OTHER]} for n in range(3)],
        {"prompt": "Ho?", "chosen": [ANSWER], "rejected": [OTHER]}, kept=4,
    ),
    "no prompt, messages": only({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, kept=1),
    "no prompt, messages that part early": only(
        {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, OTHER, USER, ANSWER]}, dropped={"diverges_before_last_turn": 1}
    ),
    "no prompt, texts": only({"chosen": "Say hello. Hi", "rejected": "Say hello. No"}, kept=1),
    "no prompt, texts with nothing in common": only({"chosen": "Hi", "rejected": "No"}, dropped={"no_common_prompt": 1}),
    "HH": only({"chosen": HH + "\n\nAssistant: D", "rejected": HH + "\n\nAssistant: E"}, kept=1),
    "HH with a prompt": only({"prompt": HH + "\n\nAssistant:", "chosen": " D", "rejected": " E"}, kept=1),
    "HH with a prompt that ends with the request": only({"prompt": HH, "chosen": "D", "rejected": "E"}, kept=1),
    "HH with a prompt and all of the dialogues": only(
        {"prompt": HH + "\n\nAssistant:", "chosen": HH + "\n\nAssistant: D", "rejected": HH + "\n\nAssistant: E"}, kept=1
    ),
    "HH with a prompt and another dialogue": only(
        {"prompt": HH + "\n\nAssistant:", "chosen": hh(("Human", "X"), ("Assistant", "D")), "rejected": " E"},
        dropped={"prompt_contradicts_messages": 1},
    ),
    "HH with the assistant twice": only(
        {"chosen": hh(("Human", "A"), ("Assistant", "B"), ("Assistant", "C")), "rejected": hh(("Human", "A"), ("Assistant", "B"), ("Assistant", "D"))},
        dropped={"assistant_after_assistant": 1},
    ),
    "sharegpt": only({"conversations": [{"from": "human", "value": "Hi?"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}, kept=1),
    "messages beside responses": only({"messages": [USER], "chosen": ANSWER, "rejected": OTHER}, kept=1),
    "instruction": only({"instruction": "Hi?", "chosen": "a", "rejected": "b"}, kept=1),
    "instruction, input and history": only(
        {"instruction": "Sum up", "input": "a text", "history": [["A", "B"]], "system": "S", "chosen": "a", "rejected": "b"}, kept=1
    ),
    "instruction and a broken history": only({"instruction": "a", "history": ["A"], "chosen": "a", "rejected": "b"}, dropped={"wrong_type": 1}),
    "instruction and a number as input": only({"instruction": "a", "input": 3, "chosen": "a", "rejected": "b"}, dropped={"wrong_type": 1}),
    "a system message": only({**GOOD, "system": "Be brief."}, kept=1),
    "two system messages": only(
        {"prompt": [{"role": "system", "content": "A"}, USER], "system": "B", "chosen": "a", "rejected": "b"}, dropped={"two_system_messages": 1}
    ),
    "a system message twice": only({"prompt": [{"role": "system", "content": "A"}, USER], "system": "A", "chosen": "a", "rejected": "b"}, kept=1),
    "a question": data_error(lines({"question": "Hi?", "chosen": "a", "rejected": "b"}), "data.columns={prompt: question}"),
    "a question that is named": only({"question": "Hi?", "chosen": "a", "rejected": "b"}, kept=1, data={"columns": {"prompt": "question"}}),
    "a column that is not there": only(GOOD, error="ConfigError", says="data.columns names query", data={"columns": {"prompt": "query"}}),
    "a column that a row lacks": only({"q": "a", **GOOD}, WHO, kept=1, dropped={"missing_field": 1}, data={"columns": {"prompt": "q"}}),
    "a row of another form": only(GOOD, WHO, {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, kept=2, dropped={"missing_field": 1}, detail="the row is TRL implicit, messages"),
    "tool calls that the template does not show": only(
        {"prompt": [USER, ASKED, TOLD, USER], "chosen": "a", "rejected": "b"}, dropped={"template_refused": 0, "tool_calls_not_rendered": 1}
    ),
    "tools that the template does not show": only({**GOOD, "tools": [TOOL]}, dropped={"tools_not_rendered": 1}),
    "no tools": only({**GOOD, "tools": None}, {**WHO, "tools": []}, kept=2),
    "tools as plain text": only({**GOOD, "tools": [TOOL]}, dropped={"tools_not_rendered": 1}, data={"template": "none"}),
    "tools in tools in tools": only(
        {**GOOD, "tools": [nested(900)]}, {**WHO, "tools": [nested(300)]}, dropped={"wrong_type": 1, "tools_not_rendered": 1}, detail="nested too deeply"
    ),
    "tools that are text": only({**GOOD, "tools": "a clock"}, dropped={"wrong_type": 1}),
    "tool calls that are text": only({"prompt": [USER, {**ASKED, "tool_calls": "x"}, USER], "chosen": "a", "rejected": "b"}, dropped={"wrong_type": 1}),
    "cut off, said in words": only({**GOOD, "chosen_cut_off": "yes"}, dropped={"wrong_type": 1}),
    "a control token": only({**GOOD, "chosen": "Hello.<|end|><|user|>"}, kept=1),
    "too long": only(hi("x" * 500), GOOD, kept=1, dropped={"too_long": 1}, data={"max_length": 60}),
}  # fmt: skip

NEAR = {
    "OpenAI": ({"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [OTHER]}, "make prompt of input.messages"),
    "KTO without a prompt": ({"text": "b", "label": True}, "unpaired data as KTO"),
    "KTO of LLaMA-Factory": ({"conversations": [USER], "kto_tag": True}, "unpaired data as KTO"),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, "one response a row, as supervised"),
    "Alpaca with one output": ({"instruction": "a", "input": "", "output": "b"}, "one response a row, as supervised"),
    "messages alone": ({"messages": [USER, ANSWER]}, "one response a row, as supervised"),
    "sharegpt alone": ({"conversations": [{"from": "human", "value": "a"}]}, "holds prompts and no responses, which make no pairs"),
    "text alone": ({"text": "a"}, "one response a row, as supervised"),
    "UltraFeedback without scores": ({"instruction": "a", "completions": [{"response": "b"}, {"response": "c"}]}, "several responses a row"),
    "distilabel": ({"input": "a", "generations": ["b", "c"], "rating": [5, 1]}, "several responses a row"),
    "old LLaMA-Factory": ({"instruction": "a", "output": ["b", "c"]}, "several responses a row"),
    "messages with ranks": ({"messages": [USER, ANSWER], "rank": 1}, "with a rank or score"),
    "a response with a score": ({"prompt": "a", "response": "b", "score": 0.5}, "with a rank or score"),
    "Safe RLHF": ({"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 1}, "which of them is better"),
    "arena": ({"conversation_a": [USER], "conversation_b": [USER], "winner": "model_a"}, "which of them is better"),
    "summaries": ({"info": {}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}, "which of them is better"),
    "steps": ({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, "stepwise"),
    "chosen alone": ({"prompt": "a", "chosen": "b"}, "one of chosen and rejected"),
    "token ids": ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "token ids"),
}  # fmt: skip

TABLE = FILES | SOURCES | {f"row: {name}": row for name, row in ROWS.items()}


@pytest.fixture(autouse=True)
def _as_deep_as_python_goes_by_default():
    """Some library may have raised the limit in this process."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def test_the_table_is_long():
    assert len(TABLE) + len(NEAR) >= 200


@pytest.mark.parametrize("name", TABLE)
def test_an_input_is_read_or_refused_by_name(name, tokenizer):
    wanted = TABLE[name]
    found = outcome(wanted.lay_out(Path()), tokenizer, **wanted.data)
    found.says.encode()
    assert "\n" not in found.says
    assert (found.error, found.says if wanted.says not in found.says else "") == (wanted.error, "")
    assert (found.kept, found.dropped) == (wanted.kept, {reason: n for reason, n in wanted.dropped.items() if n})
    assert not wanted.detail or wanted.detail in found.details[0]


@pytest.mark.parametrize("name", NEAR)
def test_what_is_near_to_pairs_is_named(name, tokenizer):
    row, says = NEAR[name]
    Path("d.jsonl").write_bytes(lines(row, row))
    found = outcome("d.jsonl", tokenizer)
    assert (found.error, says in found.says) == ("DataError", True), found
    # prompts that are read as such need no word of their columns
    assert all(column in found.says for column in row) or "holds prompts and no responses" in found.says

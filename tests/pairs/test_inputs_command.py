"""A few of the inputs through the real command line: exit code and words, never a traceback; and standard input between stages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.artifacts.runs import open_run
from pipeline.config.files import load_config
from pipeline.errors import ConfigError, DataError
from pipeline.pairs.rows import open_parts
from pipeline.precompute.pairs_file import ensure_pairs
from tests.conftest import ROOT, experiment, preference_rows, refscore_here, write_rows
from tests.pairs.inputs import GOOD, WHO, gz, lines, parquet

# files, arguments, exit code, what is said
SAID = {
    "a file": ({"d.jsonl": lines(GOOD, WHO)}, ["d.jsonl"], 0, ["2 rows, 2 usable, 0 dropped", "TRL explicit, strings"]),
    "several files": (
        {"a.jsonl": lines(GOOD), "b.csv": b"prompt,chosen,rejected\nHi?,a,b\n"}, ["a.jsonl", "b.csv"], 0,
        ["a.jsonl: TRL explicit, strings", "b.csv: TRL explicit, strings"],
    ),
    "a pattern": ({"a.jsonl": lines(GOOD), "b.jsonl": lines({**WHO, "chosen": 3})}, ["*.jsonl"], 0, ["2 rows, 1 usable, 1 dropped", "b.jsonl row 0: wrong_type"]),
    "a folder": ({"p/a.jsonl.gz": gz(lines(GOOD)), "p/b.parquet": parquet([WHO])}, ["p"], 0, ["2 rows, 2 usable"]),
    "unread columns": ({"d.jsonl": lines({**GOOD, "score": 1, "\ud83d": 2})}, ["d.jsonl"], 0, [r"nothing reads the columns score, \ud83d"]),
    "nothing usable": ({"d.jsonl": lines({**GOOD, "chosen": ""})}, ["d.jsonl"], 3, ["dropped 1 x empty_response", "no row is usable"]),
    "an empty file": ({"d.jsonl": b""}, ["d.jsonl"], 3, ["d.jsonl holds no rows"]),
    "a broken line": ({"d.jsonl": lines(GOOD, "{")}, ["d.jsonl"], 3, ["d.jsonl, line 2, column 2"]),
    "a number of many digits": ({"d.jsonl": lines(GOOD, '{"a": %s}' % ("1" * 5000))}, ["d.jsonl"], 3, ["4300 digits"]),
    "UTF-16": ({"d.jsonl": lines(GOOD, encoding="utf-16")}, ["d.jsonl"], 3, ["iconv -f UTF-16 -t UTF-8"]),
    "gzip that is cut off": ({"d.jsonl.gz": gz(lines(GOOD))[:-9]}, ["d.jsonl.gz"], 3, ["cut off"]),
    "unpaired": (
        {"d.jsonl": lines({"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "b", "label": 7})}, ["d.jsonl"], 0,
        ["unpaired, TRL explicit, strings", "2 rows, 1 usable, 1 dropped", "responses: 1 good", "row 1: unknown_label (label is 7"],
    ),
    "ranked": (
        {"d.jsonl": lines({"prompt": "a", "responses": ["b", "c", ""], "scores": [1, 2, 3]}, {"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]})},
        ["d.jsonl"], 0,
        ["ranked, TRL explicit, strings", "2 rows, 1 usable, 2 dropped, 1 of these responses of rows that are used", "responses: 2 in a list", "equal_scores"],
    ),
    "half a character in all names": ({"d.jsonl": lines({"\ud83d": 1})}, ["d.jsonl"], 3, [r"\ud83d"]),
    "a missing file": ({}, ["gone.jsonl"], 3, ["no such file"]),
    "a missing folder": ({}, ["gone/"], 3, ["no such file"]),
    "no name": ({}, [""], 2, ["data.path is empty"]),
    "a device": ({}, ["/dev/null"], 3, ["no file, folder or pipe"]),
    "the place where one stands": ({"notes.txt": b""}, ["."], 3, ["holds no file of preference data"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_validate_says_it(name, tmp_path):
    files, arguments, code, said = SAID[name]
    for file, content in files.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(content)
    text = refscore_here(tmp_path, "validate", *arguments, code=code)
    assert "Traceback" not in text
    assert "bug in refscore" not in text
    for words in said:
        assert words in " ".join(text.split()), text


def refscore(*arguments, content=b"", stdin=None):
    done = subprocess.run(
        [sys.executable, "-m", "stages.cli", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        env={**os.environ, "COLUMNS": "160", "PYTHONPATH": str(ROOT)}, **({"stdin": stdin} if stdin is not None else {"input": content}),
    )  # fmt: skip
    text = done.stdout.decode("utf-8", "backslashreplace")
    assert "Traceback" not in text
    assert "bug in refscore" not in text
    return done.returncode, text


def test_validate_as_a_process_of_its_own():
    code, said = refscore("validate", "-", content=lines(GOOD, {**WHO, "rejected": None}))
    assert code == 0
    assert "2 rows, 1 usable, 1 dropped" in said
    assert refscore("validate", "-", content=b"")[0] == 3
    strange = os.fsdecode(b"a\xff.jsonl")
    write_rows(Path(strange), [GOOD])
    code, said = refscore("validate", strange)
    assert (code, "no path that can be read" in said) == (3, True)
    # among others it is written out
    code, said = refscore("validate", "*.jsonl")
    assert (code, "1 rows, 1 usable" in said) == (0, True)


@pytest.mark.parametrize("field", ["path", "eval_path"])
def test_a_dash_names_standard_input_although_yaml_takes_it_for_a_list(field, tmp_path):
    (tmp_path / "c.yaml").write_text("data:\n  path: '-'\n  eval_path: '-'\n")
    for config in (load_config(tmp_path / "c.yaml"), load_config("demo", [f"data.{field}=-"])):
        assert getattr(config.data, field) in ("-", ["-"])
    with pytest.raises(ConfigError):
        load_config("demo", [f"data.{field}=[null, x]"])


def test_names_are_written_out_where_tables_keep_them():
    write_rows(Path(os.fsdecode(b"a\xff.jsonl")), [GOOD])
    from pipeline.config.experiment import DataConfig

    assert [part.name for part in open_parts("*.jsonl", DataConfig(path="x"))[0]] == [r"a\udcff.jsonl"]


def test_rows_of_standard_input_serve_the_stages_after_the_one_that_read_them(tmp_path, tiny_model):
    config = experiment(tmp_path, tiny_model, "-")
    code, said = refscore("precompute", "--config", config, "--run", "r", content=lines(*preference_rows(8)))
    assert code == 0, said
    resolved, run = load_config(config), open_run("r")
    before = run.pairs.stat().st_mtime_ns
    kept = os.dup(0)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        try:
            ensure_pairs(resolved, run)
            assert run.pairs.stat().st_mtime_ns == before
            # what would read them again says that they are gone
            other = load_config(config, ["data.max_rows=4"])
            with pytest.raises(DataError, match="save the rows as a file and give data"):
                ensure_pairs(other, run)
        finally:
            os.dup2(kept, 0)
            os.close(kept)

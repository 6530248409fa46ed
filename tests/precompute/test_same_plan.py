"""However a plan is made, its tables are those of the first version that made them row by row in one process."""

import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.files import load_config
from pipeline.config.losses import LOSS_FACTS
from pipeline.pairs import table
from pipeline.pairs.reading import ranges
from pipeline.pairs.tokenised import assembly, making, part
from pipeline.precompute.join import write_joined
from pipeline.precompute.plan import make_plan
from pipeline.store.identity import score_key
from tests.conftest import experiment, preference_rows, write_rows

KTO = {"data": "responses", "mismatched": True}
BCO, LISTS = {"data": "responses"}, {"data": "lists"}


def pairs(number, begin=0):
    """Pairs with everything that a row of one may have, some of them no pairs, some of them twice."""
    rows = []
    for at, row in enumerate(preference_rows(begin + number)[begin:]):
        row["topic"] = ("rice", "mats")[at % 2]
        if at % 5 == 0:
            row |= {"chosen_score": at % 7, "rejected_score": 1.5, "rejected_cut_off": True}
        if at % 7 == 1:
            row |= {"margin": 0.25, "provenance": {"judge": f"judge {at % 3}"}, "extra": 1}
        if at % 11 == 3:
            row["rejected"] = row["chosen"]
        if at % 11 == 4:
            row["chosen"] = "Never say <|end|> or <|user|>."
        if at % 13 == 5:
            row["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}]
        if at % 17 == 6:
            row["chosen"] = "long " * 100
        if at % 17 == 7:
            row.pop("chosen")
        rows.append(row)
    return [*rows, *rows[2:5]]


def unpaired(number):
    return [
        {"prompt": f"How do I cook rice number {at // 2}?", "response": f"Boil it {at % 9} times.", "label": at % 3 > 0}
        for at in range(number)
    ] + [{"prompt": "Who?", "response": "", "label": True}]


def ranked(number):
    return [
        {
            "prompt": f"Who is {at}?",
            "responses": [f"I am {at}.", f"You, {at}, are.", "Nobody.", ""][: 2 + at % 3],
            "scores": [3, 2, 2, 1][: 2 + at % 3] if at % 5 else [1, 1, 1, 1][: 2 + at % 3],
        }
        for at in range(number)
    ]


def several_files():
    """A folder with files of four kinds, and held-out pairs whose prompts some of them repeat."""
    rows = pairs(90)
    write_rows(Path("many/a.jsonl"), rows[:20])
    pq.write_table(pa.Table.from_pylist(preference_rows(50)[30:]), "many/b.parquet", row_group_size=6)
    Path("many/c.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows[40:60]).encode(), mtime=0)
    )
    Path("many/d.json").write_text(json.dumps(rows[60:]))
    write_rows(Path("held.jsonl"), [*preference_rows(90)[80:], *preference_rows(35)[28:]])
    return ["many"]


def one_file(rows):
    return lambda: [str(write_rows(Path("d.jsonl"), rows))]


# what a case is made of, what its loss reads, its settings, and the digest of what was made of it
CASES = {
    "pairs": (one_file(pairs(60)), {}, {}, "5bdc8712fc47faa4"),
    "pairs, cut": (
        one_file(pairs(60)),
        {},
        {"too_long": "truncate_response", "max_length": 64, "max_rows": 41},
        "bdf43fc0bf479b75",
    ),
    "pairs, control tokens act": (
        one_file(pairs(60)),
        {},
        {"special_tokens": "parse", "eval_fraction": 0.4},
        "0a0db6bfe0172480",
    ),
    "pairs, plain text": (one_file(preference_rows(30)), {}, {"template": "none"}, "eb2144f1cb4578c1"),
    "pairs of several files": (several_files, {}, {"eval_path": "held.jsonl"}, "5ac65700a8269509"),
    "pairs of several sources": (lambda: [*several_files(), "held.jsonl"], {}, {"max_rows": 33}, "b1a56e0c627a44ed"),
    "pairs of lists": (one_file(ranked(30)), {}, {"lists": "all_pairs"}, "695b506f13e68503"),
    "lists": (one_file(ranked(30)), LISTS, {}, "dbb29d1747905b1e"),
    "lists of pairs": (one_file(pairs(60)), LISTS, {}, "c4727464f91e08c1"),
    "lists, held out": (
        lambda: [str(write_rows(Path("d.jsonl"), ranked(30))), str(write_rows(Path("e.jsonl"), ranked(34)[20:]))],
        LISTS,
        {"eval_path": "e.jsonl"},
        "046f278068abb6db",
    ),
    "responses": (one_file(unpaired(60)), BCO, {}, "972d80aa8ba0a9ad"),
    "responses beside others": (one_file(unpaired(60)), KTO, {}, "c1f1ff6e09da4adc"),
    "responses of pairs beside others": (one_file(pairs(60)), KTO, {"max_length": 64}, "adf610361ad42930"),
    "prompts": (one_file(unpaired(60)), {"data": "prompts"}, {}, "e637f881a72a91f0"),
}


def config_of(case, model, *settings):
    make, _, data, _ = CASES[case]
    path = experiment(Path.cwd(), model, Path("unused"))
    texts = {"data.path": json.dumps(make()), **{f"data.{name}": value for name, value in data.items()}}
    return load_config(path, [*(f"{name}={value}" for name, value in texts.items()), *settings])


def digest(plan) -> str:
    """Of everything that a plan says of its rows."""
    made, write = plan.pairs, Path("written.parquet")
    write_joined(write, plan, {}, scored=False)
    said = {
        "rows": pq.read_table(write).to_pylist(),
        "dropped": made.dropped_table().to_pylist(),
        "figures": [made.formats, made.read, made.splits, made.cut_off, made.judges, made.margins],
        "more": [
            made.labels,
            made.unread,
            made.control,
            made.sides,
            [(k, v.count) for k, v in made.drops.items()],
        ],
        "lengths": [made.prompt_tokens.tolist(), made.response_tokens.tolist(), made.group_of.tolist()],
        "missing": plan.missing.tolist(),
        "lines": [line for line in plan.lines() if not line.startswith("reference")],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


@pytest.fixture
def learns(monkeypatch):
    """Makes the default loss one that learns from a case's kind of data."""
    before = LOSS_FACTS["sigmoid"]
    return lambda case: monkeypatch.setitem(LOSS_FACTS, "sigmoid", replace(before, **CASES[case][1]))


@pytest.fixture(params=["whole files", "ranges"])
def _ranges(request, monkeypatch):
    """Files in one piece and one window, or in many."""
    if request.param == "ranges":
        monkeypatch.setattr(ranges, "RANGE_BYTES", 1500)
        monkeypatch.setattr(assembly, "WINDOW", 8)
        monkeypatch.setattr(part, "BLOCK", 4)
        monkeypatch.setattr(table, "BLOCK", 4)
        monkeypatch.setattr(assembly, "BLOCK", 4)


@pytest.mark.usefixtures("_ranges")
@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_the_same_the_first_time_and_the_second(tiny_model, learns, case, monkeypatch):
    learns(case)
    plan = make_plan(config_of(case, tiny_model))
    assert digest(plan) == CASES[case][-1]
    reference_id, rows = plan.identity.reference_id, pa.concat_tables(rows for _, rows in plan.pairs.groups())
    wanted = [
        score_key(reference_id, row["prompt_ids"], row[f"{side}_ids"])
        for row in rows.to_pylist()
        for side in plan.sides
    ]
    assert plan.keys.to_pylist() == wanted
    # nothing is tokenised again
    monkeypatch.setattr(making, "_make", lambda *_: pytest.fail("made again"))
    again = make_plan(config_of(case, tiny_model))
    assert (digest(again), again.keys) == (CASES[case][-1], plan.keys)


@pytest.mark.parametrize("case", ["pairs of several sources", "responses of pairs beside others"])
def test_processes_make_the_same_plan(tiny_model, learns, case, monkeypatch):
    learns(case)
    monkeypatch.setattr(ranges, "RANGE_BYTES", 4000)
    monkeypatch.setattr(making, "_make", lambda *_: pytest.fail("made in this process"))
    assert digest(make_plan(config_of(case, tiny_model, "data.workers=2"))) == CASES[case][-1]

"""Pages of comparisons, of tokens, and the search: the rows that were asked for, or a message."""

import re
import string

import pytest

from pipeline.artifacts.schemas import SAMPLES
from pipeline.artifacts.tables import read_table
from pipeline.errors import DataError
from pipeline.view import pages
from pipeline.view.comparisons import PAGE
from pipeline.view.texts import samples_page, search, tokens_page
from tests.view.runs import HOSTILE, SHADES, VERDICTS, make_run, plain_text, prompt_id, winner, write_samples


def test_pages_hold_every_row_once_and_in_order():
    run = make_run(prompts=60, samples=2)  # 120 rows: two whole pages and one of 20
    found = []
    for page, rows in enumerate((PAGE, PAGE, 20)):
        content = samples_page(run, 0, page)
        assert (content["first"], len(content["rows"])) == (page * PAGE, rows)
        found += content["rows"]
    for number, row in enumerate(found):
        assert (row["prompt_id"], row["sample"]) == (prompt_id(number // 2), number % 2)
        assert row["prompt"] == f"Subject {number // 2}?"
        texts = [plain_text(number, side, 8) for side in ("policy", "reference")]
        assert [side["text"] for side in row["responses"]] == texts
        assert ["".join(text for text, _ in parts) for parts in row["parts"]] == texts
        assert "policy " in [text for text, differs in row["parts"][0] if differs]
        assert [side["tokens"] for side in row["responses"]] == [5 + number * 3 % 37, 5 + number * 4 % 37]
        ends = ["length" if number % each == 0 else "stop" for each in (5, 7)]
        assert [side["finish_reason"] for side in row["responses"]] == ends


def test_a_page_that_there_is_not_is_a_message():
    run = make_run(prompts=50, samples=2)  # two pages, both whole
    assert len(samples_page(run, 0, 1)["rows"]) == PAGE
    for page in (2, 999_999_999):
        with pytest.raises(DataError, match=f"no page {page}: there are 100 rows, 50 on a page"):
            samples_page(run, 0, page)
    with pytest.raises(DataError, match=r"no page 2: there are 80 rows"):
        tokens_page(run, 2)


def test_every_verdict_stands_there_in_both_orders_with_the_judges_words():
    run = make_run()
    for number, row in enumerate(samples_page(run, 0, 0)["rows"]):
        letters = {"rule:words": "WTLX-f"[number % 6], "llm:shades": "WTLX-f"[(number + 1) % 6], "rule:other": "WTLX-f"[(number + 2) % 6]}  # fmt: skip
        expected = []
        for judge, letter in letters.items():
            known = SHADES if judge == "llm:shades" else VERDICTS
            for first, score in zip(("policy", "reference"), known.get(letter, ()), strict=False):
                words = f"I read both, {number}: {winner(score)}" if judge == "llm:shades" else None
                expected.append(
                    {"judge": judge, "first": first, "winner": winner(score), "score": score, "words": words}
                )
        by_judge = sorted(row["verdicts"], key=lambda one: (list(letters).index(one["judge"]), one["first"]))
        assert by_judge == expected


def test_tokens_of_a_row_are_those_of_its_prompt_and_models():
    run = make_run(prompts=30)
    tokens = tokens_page(run, 0)["rows"]
    for row in samples_page(run, 0, 0)["rows"]:
        prompt = int(row["prompt_id"], 16)
        own, other = row["kl_rows"]
        assert len(own) == len(other) == (0 if prompt % 5 == 4 else 1)
        for place, model in zip([*own, *other], ("policy", "reference"), strict=False):
            found = tokens[place]
            assert (found["prompt_id"], found["model"]) == (row["prompt_id"], model)
            assert found["pieces"] == ["<3>", "<4>", "<5>"]  # no tokenizer is at hand
            assert found["ref_logps"] == [-2.0, -1.0, -3.0]
            assert found["logps"][0] == pytest.approx(-2.0 + 0.01 * prompt * (model == "policy"), abs=1e-5)


SPECIAL = [
    ("Was (a+b)*[c] \\d kostet?", "Ä Straße .* $5 ^ {2} | ~", "日本語 & #1 'q' \"z\" @ % - _ = `"),
    ("plain\tand\nlines", "x < y > z; a, b: c! d? e/f", "nothing here"),
]
ASKED = [
    "needle-7", "NEEDLE-7 ", "subject 1", "plain words", "no such text", ".*", "\\", "(?i)", "[a", "$", "Ä", "ä", "straße", "日本",
    "a+b", "{2}", "\t", "\n", *string.punctuation,
]  # fmt: skip


def test_a_search_finds_what_a_plain_scan_finds():
    run = make_run(prompts=12, texts=SPECIAL + [(f"Subject {n}?", f"needle-{n} of", "plain words") for n in range(8)])
    table = read_table(run.samples, SAMPLES).to_pylist()
    for asked in ASKED:
        hits = {
            (row["prompt_id"], row["sample"])
            for row in table
            if asked.lower() in row["prompt"].lower() or asked.lower() in row["response"].lower()
        }
        expected = [number for number in range(24) if (prompt_id(number // 2), number % 2) in hits]
        assert search(run, 0, asked) == expected, asked
        assert expected or asked in ("no such text", "(?i)", "[a")


def test_a_sign_that_is_shown_as_its_code_point_is_found_by_that_and_by_itself():
    run = make_run(prompts=2, samples=1, texts=[("a\u202eb", "x", "y"), ("a[U+202E]b", "x", "y")])
    assert search(run, 0, "a[u+202e]b") == [1]  # as a text, in whatever case
    assert search(run, 0, "a[U+202E]b") == [0, 1]
    assert search(run, 0, "a\u202eb") == [0]


def test_text_that_hides_or_reorders_is_shown_as_what_it_is():
    run = make_run(prompts=len(HOSTILE), samples=1, texts=[(text, text, f"x {text} y") for text in HOSTILE])
    unseen = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
    rows = samples_page(run, 0, 0)["rows"]
    shown = [row["prompt"] for row in rows] + [side["text"] for row in rows for side in row["responses"]]
    shown += [text for row in rows for parts in row["parts"] for text, _ in parts]
    assert not [text[:80] for text in shown if unseen.search(text)]
    assert any("[U+202E]reversed" in text for text in shown)
    assert HOSTILE[0] in shown  # text as it is: the page makes no HTML of it


def test_a_file_of_the_same_rows_that_was_replaced_is_read_anew():
    run = make_run()
    assert samples_page(run, 0, 0)["rows"][3]["responses"][0]["text"].startswith("policy needle-3 ")
    write_samples(run, 24, 2, texts=[("new prompt", "new policy", "new reference")])
    row = samples_page(run, 0, 0)["rows"][3]
    assert (row["prompt"], row["responses"][0]["text"]) == ("new prompt", "new policy")
    assert search(run, 0, "needle") == []


def test_a_file_that_shrank_between_index_and_texts_is_a_message():
    run = make_run()
    with pytest.raises(DataError, match=r"samples\.parquet was replaced meanwhile: load the page again"):
        pages.rows(run.samples, SAMPLES, [0, 96], ["prompt"])


def test_a_damaged_or_absent_file_is_a_message():
    run = make_run()
    whole = run.samples.read_bytes()
    run.samples.write_bytes(whole[: len(whole) // 2])
    for ask in (lambda: samples_page(run, 0, 0), lambda: pages.rows(run.samples, SAMPLES, [0], ["prompt"])):
        with pytest.raises(DataError, match=r"samples\.parquet cannot be read as Parquet"):
            ask()
    run.samples.unlink()
    with pytest.raises(DataError, match=r"samples\.parquet does not exist"):
        samples_page(run, 0, 0)
    run.kl.write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(DataError, match=r"kl\.parquet cannot be read as Parquet"):
        tokens_page(run, 0)
    with pytest.raises(DataError, match=r"samples\.parquet cannot be|does not exist"):
        search(run, 0, "x")

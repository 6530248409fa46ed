"""The marks of a response, by hand."""

import pytest

from pipeline.evaluation.new_pairs import best_and_worst
from pipeline.judges import marks


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("Boil it.", True),
        ("Boil it", False),
        ("", False),
        ("Here is a list:", False),
        ("**Boil it.**", True),
        ('He said "boil it."', True),
        ("Steps:\n1. Boil\n2. Stir", True),
        ("Dear Ann,\nthank you.\nBest wishes", True),
        ("A first line.\nand then a very long last line that goes on and on and is not yet at its", False),
    ],
)
def test_an_ending_is_seen(text, ends):
    assert marks.ends_well(text) is ends


def test_repetition_counts_repeated_four_grams():
    assert marks.repetition("one two three four five") == 0.0
    # five grams of which the last repeats the first
    assert marks.repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert marks.repetition("a b c") == 0.0


@pytest.mark.parametrize(
    "phrase",
    [
        "мы идём домой вместе ",
        "我们一起回家",
        "نحن نذهب إلى البيت ",
        "हम साथ घर चलते ",
        "우리는 함께 집에 간다 ",
        "เรากลับบ้าน",
        "わたしたちはかえる",
    ],
)
def test_repetition_is_seen_in_any_script(phrase):
    assert marks.repetition(phrase * 6) > 0.5
    assert marks.repetition(phrase) < 0.2


def test_words_of_scripts_are_whole_and_english_ones_are_as_before():
    assert marks.words_of("It's 3 o'clock, a_b!") == ["it's", "3", "o'clock", "a", "b"]
    assert marks.words_of("हिन्दी में") == ["हिन्दी", "में"]
    assert marks.words_of("café 東京です") == ["café", "東", "京", "で", "す"]
    assert marks.words_of("cafe\u0301") == ["caf\u00e9"]
    assert marks.words_of("๑๒ กิ") == ["๑", "๒", "กิ"]


def test_signs_in_english_are_no_words():
    assert marks.words_of("1\ufe0f\u20e3 I \u2764\ufe0f x\u00b2, \u00bd cup \U0001f600\ufe0f") == ["1", "i", "x", "cup"]


@pytest.mark.parametrize(
    ("text", "number"),
    [("a - b, c\n d", 5), ("", 0), ("我们回家。", 4), ("用 Python 写", 3), ("เรา", 3), ("Мы идём", 2)],
)
def test_words_between_spaces_are_those_of_split_but_where_a_script_has_no_spaces(text, number):
    assert marks.words_between_spaces(text) == number


def test_relevance_is_seen_in_any_script():
    assert marks.relevance("варить яйца", "яйца варить долго") == 1.0
    assert marks.relevance("варить яйца", "Красим стену.") == 0.0
    assert marks.relevance("煮鸡蛋", "油漆墙壁") == 0.0
    assert marks.relevance("煮鸡蛋", "鸡蛋") == 1.0


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("我们回家。", True),
        ("我们回家，然后", False),  # noqa: RUF001
        ("本当ですか？", True),  # noqa: RUF001
        ("「はい。」", True),
        ("هل أنت بخير؟", True),
        ("نحن نذهب إلى", False),
        ("हम घर चलते हैं।", True),
        ("हम घर चलते", False),
        ("Мы идём домой.", True),
        ("Мы идём", False),
        ("เรากลับบ้าน", True),
        ("យើងទៅផ្ទះ។", True),
        ("យើងទៅផ្ទះ", False),
        ("အိမ်ပြန်တယ်။", True),
        ("ང་ཚོ་ཁྱིམ་ལ་འགྲོ།", True),
        ("Sie sagte: \u201eJa.\u201c", True),
        ("Sie sagte: \u00bbJa.\u00ab", True),
        ("She said \u201c", False),
        ("Il dit \u00ab", False),
        ("步骤：\n" + "然后把所有的东西都放进锅里" * 2, False),  # noqa: RUF001
    ],
)
def test_an_ending_is_seen_in_any_script(text, ends):
    assert marks.ends_well(text) is ends


def test_relevance_matches_content_words_whatever_their_ending():
    assert marks.relevance("How do I boil eggs?", "Boiling an egg takes time.") == 1.0
    assert marks.relevance("How do I boil eggs in salted water?", "An egg.") == pytest.approx(0.5)
    assert marks.relevance("How do I boil eggs?", "Paint the wall.") == 0.0
    assert marks.relevance("What is it?", "Anything.") == 1.0


def test_concision_falls_from_half_the_limit_to_nothing():
    assert marks.concision("w " * 75) == 1.0
    assert marks.concision("w " * 120) == pytest.approx(0.4)
    assert marks.concision("w " * 150) == 0.0


def test_best_and_worst_leaves_near_ties_out():
    assert best_and_worst([0.5, 0.9, 0.2, 0.9], 0.3).__dict__ == {"chosen": 1, "rejected": 2, "margin": 0.9 - 0.2}
    assert best_and_worst([0.5, 0.6], 0.3) is None
    assert best_and_worst([1.0], 0.0) is None


def test_the_bad_rule_s_pairs_are_as_their_readme_says():
    import json

    from stages.demo_data import RECIPES
    from tests.conftest import ROOT

    rows = {
        split: [json.loads(line) for line in (ROOT / f"data/bad_rule/{split}.jsonl").read_text().splitlines()]
        for split in RECIPES["bad_rule"].per_topic
    }
    assert len(rows["train"]) >= 240
    assert len(rows["eval"]) >= 60
    assert not {row["prompt"] for row in rows["train"]} & {row["prompt"] for row in rows["eval"]}
    written = {json.loads(line)["prompt"] for line in (ROOT / "data/bad_rule/prompts.jsonl").read_text().splitlines()}
    for found in rows.values():
        assert len({row["topic"] for row in found}) >= 12
        assert all(row["prompt"] in written and row["margin"] >= RECIPES["bad_rule"].margin for row in found)
        assert sum(row["differs_beyond_length"] for row in found) * 3 >= len(found)
        # what the marks see in the texts alone still prefers the chosen one
        scores = [
            marks.marks(row["prompt"], row["chosen"], "stop").score
            - marks.marks(row["prompt"], row["rejected"], "stop").score
            for row in found
        ]
        assert sum(score > 0 for score in scores) > 0.9 * len(scores)
    readme = (ROOT / "data/bad_rule/README.md").read_text()
    for split, found in rows.items():
        assert f"| `{split}.jsonl` | {len(found)} |" in readme

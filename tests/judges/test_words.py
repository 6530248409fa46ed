"""What a judge wrote stands beside its verdict, for people: of the order that was asked, or why nothing came."""

import json
from contextlib import contextmanager

from pipeline.artifacts.schemas import JUDGEMENTS
from pipeline.artifacts.tables import read_table, write_table
from pipeline.config.judges import JudgeConfig
from pipeline.evaluation.figures import judgements_table
from pipeline.judges.judging import Comparison, Duel, Judge, Prompt, Response, judge_both_orders
from pipeline.judges.open import JudgeContext, open_judge
from tests.judges.letter_server import Server

LONG, SHORT = Response("a long response", "stop"), Response("short", "stop")
COMPARISON = Comparison(Prompt("1", "clear prompt"), 0, "policy", "reference", LONG, SHORT)


@contextmanager
def serving(**how):
    server = Server(**how)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def judged(tmp_path, server, **settings):
    judge = open_judge(JudgeConfig(name=f"llm:{server.url}", **settings), JudgeContext(tmp_path / "verdicts"))
    return judge_both_orders(judge, [COMPARISON])


def test_replies_stand_beside_their_verdicts_also_when_they_are_read_from_what_was_kept(tmp_path):
    with serving() as server:
        first = judged(tmp_path, server, verdict="reasoning")
        replies = {json.loads(line)["reply"] for file in (tmp_path / "verdicts").iterdir() for line in file.open("rb")}
        assert len(replies) == 2
        assert {one.words for one in first} == replies
        assert [one.words for one in judged(tmp_path, server, verdict="reasoning")] == [one.words for one in first]


def test_a_failure_says_why(tmp_path):
    with serving(fail=[400]) as server:
        (failed,) = [one for one in judged(tmp_path, server, concurrency=1, model="m") if one.winner == "failed"]
        assert "400" in failed.words
        assert failed.words.startswith("failed: ")


def test_words_are_of_the_order_that_was_asked_and_half_a_character_can_be_kept(tmp_path):
    verdicts = open_judge(JudgeConfig(name="llm:http://127.0.0.1:9/v1"), JudgeContext(tmp_path)).words
    assert verdicts is not None
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({"key": "k", "value": 1.0, "reply": "half \ud800 of it"}) + "\n")
    from pipeline.judges.memory import Verdicts

    (words,) = Verdicts(file).words(["k"])
    judge = Judge(
        "j", lambda duels: [1.0] * len(duels), words=lambda duels: [f"{duel.first.text} {words}" for duel in duels]
    )
    write_table(tmp_path / "judgements.parquet", judgements_table(judge_both_orders(judge, [COMPARISON])))
    rows = read_table(tmp_path / "judgements.parquet", JUDGEMENTS).to_pylist()
    assert [(row["order"], row["words"].partition(" half")[0]) for row in rows] == [
        ("policy_first", LONG.text), ("reference_first", SHORT.text),
    ]  # fmt: skip


def test_equal_responses_are_a_tie_without_words():
    judge = Judge("j", lambda duels: [1.0] * len(duels), words=lambda duels: ["said"] * len(duels))
    same = Comparison(COMPARISON.prompt, 1, "policy", "reference", LONG, LONG)
    assert [one.words for one in judge_both_orders(judge, [same, COMPARISON])] == [None, None, "said", "said"]


def test_a_panel_has_the_words_of_its_members_that_wrote(tmp_path):
    with serving() as server:
        listed = [JudgeConfig(name=f"llm:{server.url}", verdict="reasoning")]
        context = JudgeContext(tmp_path / "verdicts", listed)
        panel = open_judge(JudgeConfig(name=f"panel:[llm:{server.url}, rule:no_repetition]"), context)
        duel = Duel(COMPARISON.prompt, LONG, SHORT)
        panel.prefer([duel])
        (words,) = panel.words([duel])
        assert words.startswith(f"llm:{server.url}: ")
        assert "no_repetition" not in words

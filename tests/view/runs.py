"""Synthetic runs of any size for tests and benchmarks of `refscore view`, made without a model.

What stands in a row follows from its number alone, so that a test knows it without reading the file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.artifacts import durable
from pipeline.artifacts.runs import RUNS, Run
from pipeline.artifacts.schemas import DROPPED, JUDGEMENTS, KL, METRICS, PAIRS, POLICY_LOGPS, SAMPLES
from pipeline.artifacts.tables import read_table, write_table
from pipeline.config.experiment import Config
from pipeline.config.files import dump_config
from pipeline.evaluation.rates.winrates import win_rate
from pipeline.evaluation.results import Results, write_results
from pipeline.judges.judging import Judgement

# a judge of verdicts, one of probabilities that also writes, and another of verdicts
JUDGES = ("rule:words", "llm:shades", "rule:other")
TOPICS = ("cooking", "travel", "")
# the score in either order that stands for a letter of `outcomes`; "-": not judged, "f": the orders contradict
VERDICTS = {"W": (1.0, 1.0), "T": (0.5, 0.5), "L": (0.0, 0.0), "X": (1.0, None), "f": (1.0, 0.0)}
SHADES = {"W": (0.9, 0.7), "T": (0.5, 0.5), "L": (0.2, 0.1), "X": (0.8, None), "f": (0.9, 0.4)}
OUTCOMES = "WTLX-f"
WORDS = ["some", "plain", "words", "that", "a", "model", "could", "have", "written", "about", "its", "subject"]

# each would act, or break a page, if a page let it
HOSTILE = [
    "<script>window.hacked=1</script>",
    '<img src=x onerror="window.hacked=1">',
    "<style>*{display:none!important}</style>",
    "<b><i><table><div class=unclosed",
    "</script></style></textarea></title></main></body><script>window.hacked=1;alert(1)</script>",
    '"><svg onload="window.hacked=1">',
    '<a href="javascript:window.hacked=1">link</a> [link](javascript:window.hacked=1)',
    "{{7*7}} ${7*7} {% raise %} %s \\u003cscript>",
    "\u202ereversed\u202c \u2066isolated\u2069 \x00 null \x1b[31m escape \u200b hidden \ufeff mark",
    "a line\u2028 another\u2029 and one\u0085 more",
    '<iframe src="//evil.example"></iframe><base href="//evil.example">',
    '<meta http-equiv=refresh content="0;url=//evil.example"><link rel=stylesheet href=//evil.example/x.css>',
    "a" * 1_000_000,
]
# as a report never is, since texts are escaped there: a policy must hold even so
HOSTILE_REPORT = "<!doctype html><html lang=en><title>report</title><h1>report of a run</h1>" + "".join(HOSTILE[:8])


def plain_text(number: int, side: str, words: int) -> str:
    """What `side` ("policy" or "reference") wrote in comparison `number`."""
    turned = [WORDS[(number + at) % len(WORDS)] for at in range(words)]
    return f"{side} needle-{number} of it: {' '.join(turned)}."


def make_run(
    name: str = "one",
    *,
    prompts: int = 24,
    samples: int = 2,
    judges: tuple[str, ...] = JUDGES,
    outcomes: str = OUTCOMES,
    judged: float = 1.0,
    words: int = 8,
    texts: list[tuple[str, str, str]] | None = None,
    topics: tuple[str, ...] = TOPICS,
    reference: str = "ab" * 32,
    steps: int = 16,
    beta: float = 0.1,
    evaluated: bool = True,
    pairs: int = 60,
    tokens: int = 3,
) -> Run:
    """Every table of a run below data/runs. `texts`: prompt, policy's, reference's, taken in turn; judge number k says of
    comparison n what `outcomes` has at (n + k). `tokens`: of samples of which KL is measured, and of chosen responses.
    """
    run = Run(RUNS / name)
    run.directory.mkdir(parents=True, exist_ok=True)
    config = Config.model_validate({"data": {"path": "embedded:demo"}, "train": {"beta": beta}})
    durable.write_text(run.config, dump_config(config))
    write_samples(run, prompts, samples, words, texts, topics)
    if judges:
        write_judgements(run, prompts, samples, judges, outcomes, judged, [one[0] for one in texts] if texts else None)
    write_kl(run, min(prompts, 2000), tokens)
    write_pairs(run, texts, reference, topics=topics, count=pairs, length=tokens)
    write_dropped(run, [one[0] for one in texts or []])
    write_metrics(run, steps)
    run.gate.write_text('{"mean_difference": 0.0001, "verdict": "agrees"}')
    if evaluated and judges:
        write_eval(run)
        run.report.write_text(HOSTILE_REPORT)
    return run


def prompt_id(prompt: int) -> str:
    return f"{prompt:016x}"


def write_samples(run, prompts, samples, words=8, texts=None, topics=TOPICS, opponent="cd" * 32):
    count = prompts * samples
    numbers = range(count)
    given = [texts[number // samples % len(texts)] for number in numbers] if texts else None
    table = {name: [] for name in SAMPLES.names}
    for place, side in enumerate(("policy", "reference")):
        responses = [one[1 + place] for one in given] if given else [plain_text(at, side, words) for at in numbers]
        table["prompt_id"] += [prompt_id(at // samples) for at in numbers]
        table["sample"] += [at % samples for at in numbers]
        table["model"] += [side] * count
        table["topic"] += [topics[at // samples % len(topics)] for at in numbers]
        table["prompt"] += [one[0] for one in given] if given else [f"Subject {at // samples}?" for at in numbers]
        table["response"] += responses
        table["response_ids"] += [[at % 7, 1, 2] for at in numbers]
        # cut off: every fifth of the policy, every seventh of the reference
        table["finish_reason"] += ["length" if at % (5 + 2 * place) == 0 else "stop" for at in numbers]
        table["tokens"] += [5 + (at * (3 + place)) % 37 for at in numbers]
    write_table(run.samples, pa.table(table, schema=SAMPLES), {"keys": {"reference": opponent}})


def write_judgements(run, prompts, samples, judges=JUDGES, outcomes=OUTCOMES, judged=1.0, wrote=None):
    """`wrote`: what the judge that writes wrote, in turn."""
    count = int(prompts * samples * judged)
    parts = []
    for number, judge in enumerate(judges):
        shades = judge == "llm:shades"
        letters = np.array(list(outcomes))[(np.arange(count) + number) % len(outcomes)]
        said = np.flatnonzero(letters != "-")
        for order in (0, 1):
            known = {letter: scores[order] for letter, scores in (SHADES if shades else VERDICTS).items()}
            scores = [known[letter] for letter in letters[said]]
            parts.append(
                pa.table(
                    {
                        "prompt_id": [prompt_id(at) for at in said // samples],
                        "sample": pa.array(said % samples, pa.int32()),
                        "judge": [judge] * len(said),
                        "model": ["policy"] * len(said),
                        "baseline": ["reference"] * len(said),
                        "order": [("policy_first", "reference_first")[order]] * len(said),
                        "winner": [winner(score) for score in scores],
                        "score": pa.array(scores, pa.float64()),
                        "words": [
                            f"I read both, {at}: {winner(known[letters[at]])}" if shades else None for at in said
                        ],
                    },
                    schema=JUDGEMENTS,
                )
            )
    write_table(run.judgements, pa.concat_tables(parts))


def winner(score: float | None) -> str:
    if score is None:
        return "failed"
    return "policy" if score > 0.5 else "reference" if score < 0.5 else "tie"


def write_kl(run, prompts, tokens=3):
    """One sample of each model for all prompts but every fifth, the policy's log-ratio growing with the prompt."""
    rows = []
    for prompt in range(prompts):
        if prompt % 5 == 4:
            continue
        for model in ("policy", "reference"):
            ref_logps = [-2.0, -1.0, -3.0] + [-1.0 - at % 7 / 3 for at in range(tokens - 3)]
            logps = [value + 0.01 * prompt * (model == "policy") for value in ref_logps]
            rows.append(
                {
                    "prompt_id": prompt_id(prompt), "sample": 0, "model": model, "topic": "", "prompt": f"Subject {prompt}?",
                    "response": "one two three", "response_ids": list(range(3, 3 + tokens)), "finish_reason": "stop", "tokens": tokens,
                    "logps": logps, "ref_logps": ref_logps, "logp": sum(logps), "ref_logp": sum(ref_logps), "exact_kl": None,
                }
            )  # fmt: skip
    write_table(run.kl, pa.Table.from_pylist(rows, schema=KL))


def write_pairs(run, texts=None, reference="ab" * 32, *, topics=TOPICS, count=60, tokens=True, length=3):
    """Every fifth pair is held out. `tokens`: whether scores of single tokens are known, as of what refscore scored."""
    rows, logps = [], []
    more, scores = list(range(length - 3)), [-1.0 - at % 7 / 3 for at in range(length - 3)]
    for number in range(count):
        prompt, chosen, rejected = texts[number % len(texts)] if texts else ("", "", "")
        sums = (-10.0 - number % 7, -10.0 - number % 5)
        held_out = number % 5 == 0
        rows.append(
            {
                "pair_id": f"{number:012x}", "split": "eval" if held_out else "train", "source": "data.jsonl",
                "source_row": number, "topic": topics[number % len(topics)],
                "prompt": prompt if texts else f"Question {number}?",
                "chosen": chosen if texts else f"chosen answer {number}, good",
                "rejected": rejected if texts else f"rejected answer {number}, good",
                "prompt_ids": [number], "chosen_ids": [1, 2, number % 9, *more], "rejected_ids": [3, 4, *more],
                "ref_chosen_token_logps": [sums[0] + 3, -1.0, -2.0, *scores] if tokens else None,
                "ref_rejected_token_logps": [sums[1] + 4, -4.0, *scores] if tokens else None,
                "ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1],
            }
        )  # fmt: skip
        # a training pair is seen once, a held-out pair before and after; of every eleventh nothing is known
        for step in (0, 16) if held_out else (number % 16,):
            if number % 11:
                moved = 0.5 * (number % 4 - 1.5) * bool(step)
                logps.append((f"{number:012x}", rows[-1]["split"], step, sums[0] + moved, sums[1] - moved))
    about = {"model": reference, "scored": True, **({} if tokens else {"imported_by": "somebody"})}
    write_table(run.pairs, pa.Table.from_pylist(rows, schema=PAIRS), about)
    columns = zip(POLICY_LOGPS.names, zip(*logps, strict=True), strict=True)
    write_table(run.policy_logps, pa.table({name: list(values) for name, values in columns}, schema=POLICY_LOGPS))


def write_dropped(run, texts=(), count=30):
    reasons = ("too_long", "too_long", "duplicate")
    rows = [
        {"source": "data.jsonl", "source_row": at, "reason": reasons[at % 3], "detail": f"detail {at}", **dict.fromkeys(DROPPED.names[4:])}
        for at in range(count)
    ]  # fmt: skip
    for row, text in zip(rows, texts, strict=False):
        row |= {"source": text[:200], "detail": text}
    write_table(run.dropped, pa.Table.from_pylist(rows, schema=DROPPED))


def write_metrics(run, steps, planned=16):
    """Evaluations every fourth step; the held-out accuracy stays below chance, which health finds."""
    rows = []
    for step in range(1, steps + 1):
        row = dict.fromkeys(METRICS.names)
        row |= {
            "step": step,
            "loss": 0.7 - 0.01 * step,
            "grad_norm": 1.0,
            "learning_rate": 1e-5,
            "tokens_per_second": 900.0,
        }
        row |= {"rewards/chosen": 0.01 * step, "rewards/rejected": -0.02 * step, "rewards/margins": 0.03 * step}
        row |= {"rewards/accuracies": 0.6, "logps/chosen": -20.0, "logps/rejected": -21.0}
        if step % 4 == 0:
            row |= {"eval_loss": 0.72, "eval_rewards/margins": -0.01, "eval_rewards/accuracies": 0.4}
        rows.append(row)
    write_table(run.metrics, pa.Table.from_pylist(rows, schema=METRICS))
    run.training.write_text(f'{{"steps": {planned}}}')


def said_of(run) -> dict[str, list[Judgement]]:
    """By judge, what it said of policy and reference."""
    found: dict[str, list[Judgement]] = {}
    for row in read_table(run.judgements, JUDGEMENTS).to_pylist():
        if (row["model"], row["baseline"]) == ("policy", "reference"):
            found.setdefault(row["judge"], []).append(Judgement(**row))
    return found


def write_eval(run):
    rates = {judge: win_rate(said) for judge, said in said_of(run).items()}
    results = replace(Results(), judges=rates, verdict="The policy is about as good as the reference.")
    write_results(run.eval, results)


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file below a directory with its bytes and when it was changed."""
    found = {str(path): path.stat() for path in sorted(directory.rglob("*"))}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}

"""Evaluations and runs for tests of reports: plausible figures, and text that would act if a page let it."""

from dataclasses import replace

import pyarrow as pa
from pydantic import TypeAdapter

from pipeline.artifacts.runs import record
from pipeline.artifacts.schemas import METRICS
from pipeline.artifacts.tables import write_table
from pipeline.config.experiment import Config
from pipeline.evaluation.baselines import GainByLength
from pipeline.evaluation.results import Results, SideBySide, write_results
from pipeline.report.markdown import write_markdown
from pipeline.report.page import write_report
from pipeline.report.words import verdict
from tests.evaluation.test_compare import make

HOSTILE = [
    "<script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    '"><svg onload="document.title=\'pwned\'">',
    "</div></details></style><iframe src=//evil.example></iframe>",
    "{{ 7 * 7 }} {% raise %}",
    "&lt;script&gt; \u202e reversed \x00 null \ud800 lone",
    "<!-- --><style>*{display:none}</style>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'><base href=//evil.example>",
    "<a href=\"javascript:document.title='pwned'\">$x^2$ \\(a\\)</a>",
    "a" * 5000,
]


GAINS = {"rule:no_repetition": GainByLength(rewards=True, points=[(-3.0, 0.25), (4.0, -0.5)])}
ODDS = {"mean": 0.5, "low": 0.4, "high": 0.6}
SPLIT = {"prompts": 20, "comparisons": 25, "rate": {"mean": 0.7, "low": 0.6, "high": 0.8}}


def rate(mean=0.7, low=0.6, high=0.8, **other):
    found = {
        "prompts": 40,
        "rate": {"mean": mean, "low": low, "high": high},
        "method": "wilson",
        "wins": 20,
        "ties": 16,
    }
    found |= {"losses": 4, "failed": 0, "worst": mean, "best": mean, "comparisons": 40, "flips": 0, "first_wins": 0.5}
    found |= {"sign_test_p": 0.01, "detectable": 0.12, "length_controlled": {"mean": mean, "low": low, "high": high}}
    return found | {"prompts_needed": 230} | other


def figures(*interval, **judges):
    tokens = {"mean": 30.0, "low": 25.0, "high": 35.0}
    seen = {"responses": 40, "tokens": tokens, "words": 20.0, "cut_off": 0.1, "repetition": 0.0, "empty": 0.0}
    estimates = {"sampled": {"interval": tokens, "standard_error": 2.5, "variance_ratio": 1.0}}
    positions = [
        {"where": "1 to 8", "tokens": 320, "sampled": 24.0, "exact": 20.0},
        {"where": "end token", "tokens": 36, "sampled": 6.0},
    ]
    cost = {
        "kl": tokens,
        "estimates": estimates,
        "positions": positions,
        "per_token": 0.3,
        "perplexity": 12.5,
        "responses": 40,
        "tokens": 900,
    }
    reward = {"reward": {"rule:no_repetition": {"mean": 0.9, "low": 0.8, "high": 1.0}}}
    one = rate(*interval)
    return {
        "models": {"policy": "a/<b>", "reference": "c"},
        "pair_judge": "rule:no_repetition",
        "judges": {"rule:no_repetition": one, **judges},
        "others": [{"model": "round1", "baseline": "reference", "judge": "rule:no_repetition", "rate": one}],
        "ratings": {"rule:no_repetition": {"policy": tokens, "round1": tokens, "reference": tokens}},
        "topics": {"rule:no_repetition": {"a<b>": one["rate"], "b": one["rate"]}},
        "responses": {"policy": seen, "reference": seen},
        "cost": {"policy": cost | reward, "reference": reward},
        "baselines": {
            name: {"shorter": ODDS, "longer": ODDS, "first_sentence": ODDS} for name in ("rule:no_repetition", *judges)
        },
        "endings": {"rule:no_repetition": dict.fromkeys(("both ended", "some cut off"), SPLIT)},
        "judge_costs": {"rule:no_repetition": {"requests": 3, "price": 0.5}},
        "held_out": None,
    }


def typed(content):
    return TypeAdapter(Results).validate_python(content)


def crowded():
    """Figures of more judges, topics and models than a screen has room for, under long names of several scripts."""
    names = [
        "llm:meta-llama/Llama-3.3-70B-Instruct@0123456789abcdef0123456789abcdef01234567",
        "\u8a55\u4fa1\u8005\u306b\u3088\u308b\u5224\u5b9a\u306e\u540d\u524d\u306f\u3068\u3066\u3082\u9577\u3044\u3082\u306e\u3067\u3059",
        "W" * 50,
        "rule:sentiment=textblob:odd",
        "implicit",
        *(f"rule:max_words={number}" for number in (10, 20, 40, 80)),
    ]
    failing = rate(
        0.5, 0.4, 0.6, failed=3, flips=20, first_wins=0.9, length_controlled=None, length_withheld="so it is"
    )
    found = figures()
    higher = {"mean": 0.9, "low": 0.8, "high": 1.0}
    topics = {"": ODDS | {"n": 7}, "x" * 90: ODDS | {"n": 8}, "a topic of several words": ODDS | {"n": 9}}
    return found | {
        "pair_judge": names[0],
        "judges": dict.fromkeys(names, failing) | {names[0]: rate()},
        "baselines": {name: {"shorter": ODDS | {"n": 31}, "longer": higher} for name in names},
        "topics": dict.fromkeys(names, topics),
        "others": [
            {"model": f"round{number}", "baseline": "b" * 60, "judge": names[0], "rate": failing} for number in (1, 2)
        ],
        "cost": {
            model: found["cost"]["policy"] | {"reward": dict.fromkeys(names[:4], ODDS | {"n": 40})}
            for model in ("policy", "m" * 60)
        },
    }


def compared(directory):
    """Three evaluated runs of one reference."""
    runs = []
    for name, mean in (("first", 0.7), ("sweep-beta0.3-learning_rate5e-06", 0.6), ("third", 0.5)):
        run = make(directory, name, [mean] * 8, mean)
        results = typed(figures(mean, mean - 0.1, mean + 0.1, **{"llm:meta-llama/Llama-3.3-70B-Instruct": rate()}))
        write_results(run.eval, replace(results, verdict=verdict(results)))
        runs.append(run)
    return runs


def write(run, samples=HOSTILE, found=None):
    config = Config.model_validate({"data": {"path": "</pre><script>document.title='pwned'</script>"}})
    record(run, config, "precompute", reference_id="ab" * 32, digests={"data": {"<b>x</b>": "cd"}})
    rows = {name: [0, 1] if name == "step" else [0.7, 0.6] for name in METRICS.names}
    write_table(run.metrics, pa.table(rows, schema=METRICS))
    run.health.write_text('{"words": ["All is <i>well</i>."]}')
    sides = [
        SideBySide(
            prompt_id="p",
            sample=0,
            topic=text,
            prompt=text,
            policy=text,
            reference=f"x {text} y",
            difference=-0.5,
            marks=0.1,
            policy_finish="length",
            reference_finish="stop",
        )
        for text in samples
    ]
    results = typed(found or figures())
    results = replace(results, verdict=verdict(results))
    write_report(run, config, results, sides, GAINS)
    write_markdown(run, config, results)
    return run

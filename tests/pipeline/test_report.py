"""The report is self-contained and nothing a model writes can act in it."""

import pyarrow as pa
import pytest

from pipeline.config import Config
from pipeline.report import verdict, write_report
from pipeline.runs import Run, record
from pipeline.schema import METRICS, write_table

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "</div></details><iframe src=//evil.example></iframe>",
    "{{ 7 * 7 }} {% raise %}",
    "&lt;script&gt; \u202e reversed \x00 null",
    "<!-- --><style>*{display:none}</style>",
]


def figures(mean=0.7, low=0.6, high=0.8):
    rate = {"prompts": 40, "rate": {"mean": mean, "low": low, "high": high}, "wins": 20, "ties": 16, "losses": 4}
    rate |= {"failed": 0, "flips": 0, "sign_test_p": 0.01}
    tokens = {"mean": 30.0, "low": 25.0, "high": 35.0}
    seen = {"responses": 40, "tokens": tokens, "words": 20.0, "cut_off": 0.1, "repetition": 0.0, "empty": 0.0}
    return {"judges": {"rule:no_repetition": rate}, "responses": {"policy": seen, "reference": seen}, "held_out": {}}


@pytest.fixture
def page(tmp_path):
    run = Run(tmp_path / "run")
    config = Config.model_validate({"data": {"path": "</pre><script>alert(1)</script>"}})
    record(run, config, "precompute", reference_id="ab" * 32, digests={"data": {"<b>x</b>": "cd"}})
    rows = {name: [0, 1] if name == "step" else [0.7, 0.6] for name in METRICS.names}
    write_table(run.metrics, pa.table(rows, schema=METRICS))
    samples = [
        {"prompt_id": "p", "sample": 0, "prompt": text, "policy": text, "reference": text, "difference": -0.5}
        for text in HOSTILE
    ]
    write_report(run, config, figures(), samples)
    return run.report.read_text()


def test_hostile_text_is_escaped_everywhere(page):
    for needle in ("<script", "<img", "<iframe", "onload=alert(1)>", "<b>x"):
        assert needle not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4
    assert "{{ 7 * 7 }}" in page
    assert "default-src 'none'" in page


def test_nothing_is_loaded_from_elsewhere(page):
    for attribute in ("src=", "<link", "@import", "url(http"):
        assert attribute not in page.replace("src=x", "").replace("src=//evil", "")


@pytest.mark.parametrize(
    ("interval", "words"),
    [((0.7, 0.6, 0.8), "is better"), ((0.5, 0.4, 0.6), "No difference"), ((0.2, 0.1, 0.3), "is worse")],
)
def test_the_verdict_follows_the_interval(interval, words):
    assert words in verdict(figures(*interval))
    assert f"{interval[0]:.0%}" in verdict(figures(*interval))

"""Addresses of rows: the form that `refscore view` reads, whatever stands in names."""

from urllib.parse import parse_qs, urlsplit

from pipeline.report import addresses
from pipeline.report.side_by_side import visible
from pipeline.view import server

PLACE = "http://127.0.0.1:7788/#/runs"


def test_addresses_have_the_form_that_the_viewer_reads():
    assert addresses.samples("a", model="policy", outcome="lost", topic="food & drink") == (
        f"{PLACE}/a/samples?model=policy&outcome=lost&topic=food%20%26%20drink"
    )
    assert addresses.samples("a") == f"{PLACE}/a/samples"
    assert addresses.prompt("a", "p/1", 2) == f"{PLACE}/a/prompts/p%2F1?sample=2&model=policy&baseline=reference"
    assert addresses.pairs("a") == f"{PLACE}/a/pairs"
    assert addresses.training("a") == f"{PLACE}/a/training"
    assert addresses.dropped("a") == f"{PLACE}/a/dropped"


def test_the_viewer_listens_where_links_lead():
    assert server.PORT == addresses.PORT


def test_no_name_breaks_out_of_its_parameter():
    for name in ("a&outcome=won#x", '"><script>', "%2e%2e/", "\u202e \ud800", "", "+"):
        address = addresses.judged("r", name, topic=name)
        query = parse_qs(urlsplit(address).fragment.partition("?")[2], keep_blank_values=True, strict_parsing=True)
        shown = [name.replace("\ud800", "?")]
        assert query == {"model": ["policy"], "baseline": ["reference"], "judge": shown, "topic": [visible(name)]}
        assert address.isascii()
        assert not set(address) & set("\"'<> ")


def test_the_reference_is_a_baseline_and_the_implicit_judge_has_pairs():
    assert addresses.responses("a", "reference") == f"{PLACE}/a/samples?baseline=reference"
    assert addresses.responses("a", "policy") == f"{PLACE}/a/samples?model=policy"
    assert addresses.judged("a", "implicit") == addresses.pairs("a")
    assert addresses.judged("a", "implicit", outcome="won") == addresses.judged("a", "implicit", topic="") == ""

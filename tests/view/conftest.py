"""One server with a few runs for all files of a worker."""

import pytest

from tests.view.browsing import Pages
from tests.view.runs import make_run
from tests.view.served import Served


@pytest.fixture(scope="session")
def served_runs(tmp_path_factory, browser):
    """A server of four runs: two that can be compared, one of another reference, one that has only begun to train."""
    directory = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        make_run(prompts=20)  # 40 rows: all in sight of a table
        make_run("other", prompts=20, beta=0.3, outcomes="WWTLX-f")
        make_run("strange", prompts=20, reference="ef" * 32)
        make_run("young", prompts=4, judges=(), steps=4, evaluated=False)
    opened = Served(directory)
    yield opened
    opened.stop()


@pytest.fixture(scope="session")
def context(browser, served_runs):
    """A window that has the token's cookie."""
    opened = browser.new_context(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(10_000)
    page = opened.new_page()
    page.goto(served_runs.address)
    assert "token" not in page.url
    page.close()
    yield opened
    opened.close()


@pytest.fixture
def pages(context, served_runs, monkeypatch):
    """A tab on that server; at its end nothing went wrong in it."""
    monkeypatch.chdir(served_runs.directory)
    opened = Pages(context, served_runs.home)
    yield opened
    opened.tab.close()
    assert opened.trouble == []

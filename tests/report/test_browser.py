"""The report in a real browser: light, dark and on a phone; nothing runs, nothing is asked of the network.

Needs Chromium, which `.ci/run` installs on Debian. Set REFSCORE_SCREENSHOTS to a directory to keep the pictures, and
REFSCORE_REPORT to look at a page of your own.
"""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from websockets.sync.client import connect

from pipeline.artifacts.runs import Run
from tests.report.test_page import write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium): the report was not seen in a browser"
)
VIEWS = {"light": (1200, 900, 1), "dark": (1200, 900, 1), "phone": (390, 844, 2)}


class Browser:
    """One page of a headless browser, by the DevTools protocol; `requests` are the addresses it asked for."""

    def __init__(self, directory: Path):
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run",
             "--disable-background-networking", f"--user-data-dir={directory}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port_file = directory / "DevToolsActivePort"
        for _ in range(300):
            if port_file.is_file() and len(port_file.read_text().splitlines()) == 2:
                break
            time.sleep(0.1)
        port, path = port_file.read_text().splitlines()
        self.context = connect(f"ws://127.0.0.1:{port}{path}", max_size=None, compression=None)
        self.socket = self.context.__enter__()
        self.number, self.session, self.requests = 0, None, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        return self.until(lambda found: found.get("id") == self.number)["result"]

    def until(self, wanted):
        while True:
            found = json.loads(self.socket.recv(timeout=60))
            if found.get("method") == "Network.requestWillBeSent":
                self.requests.append(found["params"]["request"]["url"])
            if wanted(found):
                return found

    def open(self, url):
        self("Page.navigate", url=url)
        self.until(lambda found: found.get("method") == "Page.loadEventFired")

    def evaluate(self, expression):
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def close(self):
        self.context.__exit__(None, None, None)
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if chosen := os.environ.get("REFSCORE_REPORT"):
        return Path(chosen).absolute()
    return write(Run(tmp_path_factory.mktemp("browser") / "run")).report


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.mark.parametrize("view", VIEWS)
def test_the_page_is_whole_and_inert_in(browser, page, view, tmp_path):
    width, height, scale = VIEWS[view]
    browser(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=scale,
        mobile=view == "phone",
    )
    scheme = "dark" if view == "dark" else "light"
    browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.requests.clear()
    browser.open(page.as_uri())
    browser.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    time.sleep(0.3)

    # nothing but the page itself was asked for, and no model text acted
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    assert "pwned" not in browser.evaluate("document.title")
    assert browser.evaluate("document.querySelectorAll('script,iframe,img,base,link,object,form,a').length") == 0
    assert (
        browser.evaluate(
            "[...document.querySelectorAll('*')].some(one => [...one.attributes].some(a => a.name.startsWith('on')))"
        )
        is False
    )

    # text on paper in this scheme's colours, nothing wider than the screen but what scrolls by itself
    ink, paper = (
        sum(
            map(
                int,
                browser.evaluate(f"getComputedStyle(document.body).{name}")
                .removeprefix("rgb(")
                .removesuffix(")")
                .split(","),
            )
        )
        for name in ("color", "backgroundColor")
    )
    assert (ink > paper) is (view == "dark")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelector('.verdict').getBoundingClientRect().bottom") < height

    shot = browser("Page.captureScreenshot", format="png", captureBeyondViewport=True)
    place = Path(os.environ.get("REFSCORE_SCREENSHOTS", tmp_path))
    (place / f"{view}.png").write_bytes(base64.b64decode(shot["data"]))
    assert (place / f"{view}.png").stat().st_size > 20_000

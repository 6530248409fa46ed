"""A forked process is one like any other: a place, an environment, streams, an end of its own."""

import os
import signal

import pytest

from tests.forked import Forked, run

TOLD = """
import atexit, os, sys
atexit.register(lambda: print("ended"))
print(os.getcwd(), sys.argv[1], os.environ["MINE"], __name__)
print("said", file=sys.stderr)
sys.exit(3)
"""


def test_it_has_a_place_an_environment_streams_and_an_end_of_its_own(tmp_path):
    done = run(tmp_path, TOLD, 5, MINE="x")
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{tmp_path} 5 x __main__\nended\n", "said\n")
    assert "MINE" not in os.environ


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP", "SIGINT"])
def test_signals_reach_it(tmp_path, name):
    child = Forked(tmp_path, "import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)")
    while not (tmp_path / "begun").exists():
        assert child.returncode is None
    child.send_signal(getattr(signal, name))
    said = child.communicate(60)[1]
    if name == "SIGINT":
        assert (child.returncode, "KeyboardInterrupt" in said) == (1, True)
    else:
        assert child.returncode == -getattr(signal, name)


def test_what_goes_wrong_is_on_its_error_stream(tmp_path):
    done = run(tmp_path, "raise ValueError('so')")
    assert done.returncode == 1
    assert "ValueError: so" in done.stderr

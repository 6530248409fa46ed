"""Who may ask the server of `refscore view`, what leads out of the runs, what is written: by a real process."""

import json
import socket
from pathlib import Path

import pytest

from tests.view.runs import make_run, tree
from tests.view.served import Served, start

MARK = b"not for browsers"
HEADERS = {
    "content-security-policy": "default-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
LONG = "a" * 6000


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        make_run(prompts=8, samples=1)
        make_run("other", prompts=60, samples=1, beta=0.3)
        # what must not be reached: beside the runs, above them, and in a run but no page's
        for place in ("data/secret", "data/runs/.hidden", "data/runs/no-run"):
            Path(place).mkdir(parents=True)
        for place in ("secret.json", "data/secret/config.yaml", "data/secret/report.html", "data/runs/.hidden/report.html",
                      "data/runs/secret.json", "data/runs/one/secret.html", "data/runs/no-run/report.html"):  # fmt: skip
            Path(place).write_bytes(MARK)
    opened = Served(directory)
    yield opened
    opened.stop()


def check_headers(answer):
    for name, value in HEADERS.items():
        assert answer.headers[name].startswith(value), name


FOREIGN_HOSTS = ["evil.example", "127.0.0.1", "127.0.0.1:1", "[::1]:{port}", "{host}.evil.example", "evil@{host}", "", None, "0.0.0.0:{port}", "{host}, evil.example"]  # fmt: skip


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_foreign_host_is_refused(served, host):
    given = host and host.format(port=served.port, host=served.host)
    for path in ("/", "/data/runs.json", "/static/view.js", f"/?token={served.token}"):
        answer = served.get(path, Host=given)
        # without any Host the server beneath may refuse before ours is asked
        assert answer.status == 403 or (answer.status, host) == (400, None)
        if answer.status == 403:
            check_headers(answer)
            assert b"refused: this server answers at http://127.0.0.1" in answer.body
            assert "set-cookie" not in answer.headers


def test_the_names_of_this_machines_own_are_answered(served):
    assert served.get("/data/runs.json", Host=f"localhost:{served.port}").status == 200
    assert served.get("/data/runs.json", Origin=f"http://localhost:{served.port}").status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://{host}", "http://127.0.0.1", "http://{host}.evil.example", ""])  # fmt: skip
def test_a_page_of_another_site_is_refused(served, origin):
    answer = served.get("/data/runs.json", Origin=origin.format(host=served.host))
    assert (answer.status, answer.body) == (403, b"refused: a page of another site asked\n")
    check_headers(answer)
    assert served.post({"run": "one"}, Origin=origin.format(host=served.host)).status == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_link_of_another_site_may_open_a_page_and_nothing_else(served, site):
    for mode in ("cors", "no-cors", "websocket"):
        assert served.get("/data/runs.json", **{"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}).status == 403
    assert served.get("/data/runs.json", **{"Sec-Fetch-Site": site}).status == 403
    opens = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}
    assert served.get("/", **opens).status == 200
    assert served.post({"run": "one"}, **opens).status == 403
    assert served.get("/data/runs.json", **{"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}).status == 200


def test_nothing_is_there_without_the_token(served):
    paths = [
        "/",
        "/data/runs.json",
        "/static/view.js",
        "/report/one/",
        "/ballot?run=one",
        "/search",
        "/compare",
        "/nothing",
    ]
    cookies = [None, f"refscore-{served.port}=wrong", f"refscore={served.token}", f"refscore-{served.port}=", "x"]
    cookies += [f"refscore-{served.port}={served.token[:-1]}", f"refscore-{served.port}=\xff\xfe"]
    for path in paths:
        for cookie in cookies:
            answer = served.ask("GET", path, {"Cookie": cookie})
            assert answer.status == 403, (path, cookie)
            check_headers(answer)
            assert b"open the whole address that refscore view printed" in answer.body
        for token in ("wrong", served.token[:-1], "%ff", "%00", LONG):
            sign = "&" if "?" in path else "?"
            # a wrong token is wrong even with the right cookie
            assert served.get(f"{path}{sign}token={token}").status == 403
    vote = served.ask("POST", "/votes", {"Content-Type": "application/json"}, b"{}")
    assert vote.status == 403


def test_the_token_leaves_the_address_for_a_cookie(served):
    for path in ("/", "/data/runs.json"):
        answer = served.ask("GET", f"{path}?token={served.token}")
        assert (answer.status, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith(f"refscore-{served.port}={served.token};")
        assert {part.strip().lower() for part in cookie.split(";")[1:]} == {"httponly", "samesite=lax", "path=/"}
        check_headers(answer)
    assert served.token not in served.get("/").body.decode()


DOTS = ["..", "%2e%2e", ".%2e", "..%2f..", "%2e%2e%2f%2e%2e", "..%5c..", "....//", "%252e%252e"]
AWAY = [
    *(f"/static/{dots}/server.py" for dots in DOTS),
    *(f"/static/{name}" for name in ("/etc/passwd", "%2fetc%2fpasswd", "..%00/server.py", "view.js%00", "\x00", LONG, "C:%5cx", ".", "")),
    *(f"/report/{dots}/secret/" for dots in DOTS),
    *(f"/report/{name}/" for name in (*DOTS, ".hidden", "no-run", "secret.json", "one%00", "one\x00", LONG, "%2fetc", "one/secret.html", "one%2fsecret.html", "..%2fsecret")),
    *(f"/data/runs/{name}/overview.json" for name in (*DOTS, ".hidden", "no-run", "one%2f..%2f..", "one%00", LONG, "one%2f", "ONE", "")),
    *(f"/data/{name}" for name in ("secret.json", "../secret.json", "%2e%2e/secret.json", "/etc/passwd", "runs/secret.json", "runs/one/../secret.json",
      "runs/one/secret.json", "runs/one/overview.json%00", "runs/one/config.json", "runs/one/votes.json", "runs/one/samples/-1.json", "runs/one/samples/0/1.5.json",
      "runs/one/samples/0/-1.json", "runs/one/samples/0/9999999999.json", "runs/one/samples/0/0/0.json", "runs/one/overview/0.json", "runs/one/pairs/0/0.json", LONG, "")),
    *(f"/search?{query}" for query in ("run=..&number=0&text=a", "run=one&number=-1&text=a", "run=one&text=a", "run=one&number=٣", "run=one&number=1e1", "", f"run={LONG}&number=0", "run=one%00&number=0")),
    *(f"/compare?{query}" for query in ("run=one&run=..", "run=one&run=%2e%2e/secret", "run=one&run=.hidden", f"run=one&run={LONG}", "run=one&run=a%00b")),
    *(f"/ballot?{query}" for query in ("", "run=..&voter=a", "run=one%00&voter=a", "run=one&voter=a&model=policy&baseline=reference&seed=-1")),
    "/nothing", "//", "/data", "/report/one", "/..", "/%2e%2e/secret.json", "/static/../../secret.json", "/votes",
]  # fmt: skip


@pytest.mark.parametrize("path", AWAY, ids=range(len(AWAY)))
def test_no_address_leads_out_of_what_pages_are_made_of(served, path):
    answer = served.get(path)
    # 307 goes to the same place with the slash that it lacks
    assert answer.status in (400, 404, 405) or (answer.status == 307 and path in ("/data", "/report/one")), (
        path,
        answer,
    )
    assert MARK not in answer.body
    assert b"Traceback" not in answer.body
    if answer.status != 400:
        check_headers(answer)


@pytest.mark.parametrize(("path", "problem"), [
    ("/data/runs/one/samples/1.json", "compares 1 pairs of models, and no number 1"),
    ("/data/runs/one/samples/0/7.json", "no page 7: there are 8 rows, 50 on a page"),
    ("/data/runs/one/tokens/1.json", "no page 1"),
    ("/data/runs/one/pairs/9.json", "no page 9: there are 60 rows"),
    ("/compare?run=one", "name two runs or more"),
    ("/compare?run=one&run=one", "name two runs or more"),
    ("/compare", "name two runs or more"),
    ("/ballot?run=one&voter=../../x&model=policy&baseline=reference", "voter '../../x'"),
    ("/ballot?run=one&voter=a&model=policy&baseline=policy", "'policy' cannot be compared with itself"),
    ("/ballot?run=one&voter=a&model=../x&baseline=reference", "holds no responses of ../x"),
])  # fmt: skip
def test_what_is_not_there_is_a_message(served, path, problem):
    answer = served.get(path)
    assert answer.status == 409
    assert problem in answer.problem
    check_headers(answer)


def test_looking_at_everything_writes_nothing(served):
    from pipeline.view.answers import addresses

    before = tree(served.directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(served.directory)
        pages = list(addresses(["one", "other"]))
    assert len(pages) > 20
    for page in pages:
        answer = served.get(f"/data/{page}")
        assert answer.status == 200, page
        json.loads(answer.body)
        check_headers(answer)
    statics = sorted((Path(__file__).parents[2] / "pipeline" / "view" / "static").iterdir())
    others = ["/", "/report/one/", *(f"/static/{file.name}" for file in statics), "/compare?run=one&run=other"]
    others += ["/search?run=one&number=0&text=needle", "/ballot?run=one&voter=looks&model=policy&baseline=reference"]
    for page in others:
        answer = served.get(page)
        assert answer.status == 200, page
        check_headers(answer)
    for method in ("HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "POST"):
        answer = served.ask(method, "/data/runs.json", served.cookie)
        assert answer.status in (200, 405)
        check_headers(answer)
    assert tree(served.directory) == before


def test_a_report_runs_and_loads_nothing_whatever_stands_in_it(served):
    answer = served.get("/report/one/")
    policy = answer.headers["content-security-policy"]
    assert b"<script>window.hacked" in answer.body
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    assert "allow-scripts" not in policy
    assert "script-src" not in policy


def test_a_run_behind_a_link_is_a_run_and_no_way_out(served):
    (served.directory / "elsewhere").mkdir(exist_ok=True)
    for name in ("log.txt", "private.html"):
        (served.directory / "elsewhere" / name).write_bytes(MARK)
    link = served.directory / "data" / "runs" / "linked"
    link.symlink_to(served.directory / "elsewhere")
    try:
        assert "linked" in [run["name"] for run in json.loads(served.get("/data/runs.json").body)["runs"]]
        assert served.get("/data/runs/linked/overview.json").status == 200
        for path in (
            "/report/linked/",
            "/report/linked/private.html",
            "/data/runs/linked/private.json",
            "/report/linked/../one/",
        ):
            assert served.get(path).status == 404
    finally:
        link.unlink()


def test_nothing_listens_beyond_loopback(served):
    inodes = set()
    for entry in Path(f"/proc/{served.process.pid}/fd").iterdir():
        try:
            name = str(entry.readlink())
        except OSError:
            continue
        if name.startswith("socket:"):
            inodes.add(name[8:-1])
    listening = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{served.process.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            # 0A: listens; UDP sockets have no such state
            if fields[9] in inodes and (fields[3] == "0A" or table.startswith("udp")):
                listening.append((table, fields[1]))
    assert listening == [("tcp", f"0100007F:{served.port:04X}")]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, only says which of our addresses it would come from
        except OSError:
            return
        own = probe.getsockname()[0]
    if not own.startswith("127."):
        with pytest.raises(OSError), socket.create_connection((own, served.port), timeout=5):
            pass


def test_a_port_that_is_taken_is_a_message(served):
    process = start(served.directory, "--port", str(served.port))
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert f"port {served.port} cannot be taken" in printed
    assert "name another with --port, or 0 for any" in printed
    assert "Traceback" not in printed


def test_ctrl_c_ends_it_without_a_word_of_error(served):
    with socket.create_connection(("127.0.0.1", served.port)) as idle:
        idle.sendall(b"GET / HTTP/1.1\r\n")  # somebody who never finishes asking does not hold it up
        code, printed = served.stop()
    assert code == 0
    assert "Traceback" not in printed
    assert "Error" not in printed

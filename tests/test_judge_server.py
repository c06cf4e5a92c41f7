"""The judge on a server, beside a local one that speaks the OpenAI protocol: order, retries, refusals, nonsense, budget, kill."""

import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from prlhf.errors import UserError
from prlhf.judge import __main__ as command
from prlhf.judge import server as module
from prlhf.judge.server import Server, answers
from prlhf.judge.template import parse_answer

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-secret-of-mine"


class Drip(str):
    """A body that comes a character every 0.1 seconds."""


class Stub(ThreadingHTTPServer):
    """Answers each conversation with its last message in capitals, or as `reply(stub, n, text)` says for request n = 0, 1, ...:
    a text to answer, or (status, headers, body)."""

    daemon_threads = True

    def __init__(self, reply=lambda stub, n, text: text.upper()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.lock = reply, threading.Lock()
        self.asked, self.times, self.headers, self.paths = [], [], [], []
        self.under_way = self.peak = 0
        self.usage = {"prompt_tokens": 10, "completion_tokens": 2}
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def texts(self):
        return [record["messages"][-1]["content"] for record in self.asked]

    def handle_error(self, *_):  # a client that is gone
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def do_POST(self):
        record, stub = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        with stub.lock:
            n = len(stub.asked)
            stub.asked.append(record)
            stub.times.append(time.monotonic())
            stub.headers.append(self.headers)
            stub.paths.append(self.path)
            stub.under_way += 1
            stub.peak = max(stub.peak, stub.under_way)
        found = stub.reply(stub, n, record["messages"][-1]["content"])
        with stub.lock:
            stub.under_way -= 1
        if isinstance(found, str):
            found = 200, {}, json.dumps({"choices": [{"message": {"content": found}}], "usage": stub.usage})
        status, headers, body = found
        if status is None:  # hang up
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        for piece in body if isinstance(body, Drip) else [body]:
            self.wfile.write(piece.encode())
            time.sleep(0.1 if isinstance(body, Drip) else 0)

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    made = []

    def make(*reply):
        made.append(Stub(*reply))
        return made[-1]

    yield make
    for one in made:
        one.shutdown()
        one.server_close()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(module, "NONSENSE_PAUSES", (0.01, 0.01))


@pytest.fixture
def server(tmp_path):
    def make(stub, **settings):
        return Server(**{"model": "m", "base_url": stub.url, "folder": tmp_path / "answers", "retries": 2, **settings})

    return make


def conversations(*texts):
    return [({"role": "system", "content": "Judge."}, {"role": "user", "content": text}) for text in texts]


LETTERS = conversations(*"abcdefghijkl")


def kept(tmp_path):
    path = tmp_path / "answers" / "answers.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_answers_are_in_order_and_each_question_is_asked_once(stub, server, tmp_path):
    """Whatever the order in which they come: later questions are answered sooner."""
    s = stub(lambda stub, n, text: time.sleep(0.1 / (1 + n)) or text.upper())
    asked = conversations("x", "y", "x", "z", "y")
    assert answers(server(s), asked) == ["X", "Y", "X", "Z", "Y"]
    assert sorted(s.texts) == ["x", "y", "z"] and set(s.paths) == {"/v1/chat/completions"}
    assert {headers["Authorization"] for headers in s.headers} == {f"Bearer {KEY}"}
    for record in s.asked:
        assert record == {"model": "m", "messages": [*asked[0][:1], record["messages"][1]], "temperature": 0,
                          "max_tokens": 16, "stream": False}  # fmt: skip
    assert sorted(record["answer"] for record in kept(tmp_path)) == ["X", "Y", "Z"]


def test_nothing_is_paid_for_twice(stub, server):
    """What is on disk is not asked for, wherever the URL has credentials or a slash; whatever else differs is asked anew."""
    s = stub()
    assert answers(server(s), LETTERS[:2]) == ["A", "B"] and len(s.asked) == 2
    assert answers(server(s), LETTERS[:3]) == ["A", "B", "C"] and s.texts[2:] == ["c"]
    for url in (s.url + "/", s.url.replace("//", "//me:pw@")):
        assert answers(server(s, base_url=url), LETTERS[:3]) == ["A", "B", "C"] and len(s.asked) == 3
    other = ({"role": "system", "content": "Judge!"}, LETTERS[0][1])
    for n, (settings, asked) in enumerate(
        [({"model": "n"}, LETTERS[0]), ({"answer_tokens": 32}, LETTERS[0]), ({"base_url": s.url + "2"}, LETTERS[0]), ({}, other)]
    ):  # fmt: skip
        assert answers(server(s, **settings), [asked]) == ["A"] and len(s.asked) == 4 + n


FIRST_FAILS = {  # the reply to the first request, and after how many seconds at least the second comes
    "rate limit": ((429, {"Retry-After": "1.2"}, '{"error": {"message": "slow down"}}'), 1.2),
    "server error": ((503, {}, "busy"), 0.375),
    "hung up": ((None, {}, ""), 0.375),
    "time-out": ("slow", 0.6 + 0.375),
    "drips": ((200, {}, Drip('{"choices": [{"message": {"content": "A"}}]}')), 0.6 + 0.375),
}


@pytest.mark.parametrize("kind", FIRST_FAILS)
def test_what_passes_is_asked_again(stub, server, kind):
    """Retry-After is honoured; else after half a second, less at most a quarter by chance."""
    found, least = FIRST_FAILS[kind]

    def reply(stub, n, text):
        if n == 0 and found == "slow":
            time.sleep(1.5)
        return found if n == 0 and found != "slow" else text.upper()

    s = stub(reply)
    assert answers(server(s, timeout=0.6 if kind in ("time-out", "drips") else 60), LETTERS[:1]) == ["A"]
    assert len(s.asked) == 2 and s.times[1] - s.times[0] >= least


def test_pauses_grow(stub, server):
    """0.5 and 1 second, each less at most a quarter."""
    s = stub(lambda stub, n, text: (500, {}, "{}") if n < 2 else text)
    answers(server(s), LETTERS[:1])
    first, second = s.times[1] - s.times[0], s.times[2] - s.times[1]
    assert first >= 0.375 and second >= 0.75


@pytest.mark.parametrize(
    ("found", "requests", "parts"),
    [
        ((500, {"Retry-After": "0.01"}, '{"error": {"message": "broken"}}'), 3, ("answered 500", "broken")),
        (
            (429, {"Retry-After": "600"}, '{"error": {"message": "no quota"}}'),
            1,
            ("answered 429 (no quota), with Retry-After 600",),
        ),
        (
            (400, {}, '{"error": {"message": "too\\nlong ' + "x" * 900 + '"}}'),
            1,
            ("answered 400", "too long xxx", "..."),
        ),
        (
            (401, {}, '{"error": {"message": "bad KEY"}}'),
            1,
            ("answered 401 (bad ***), expected its key in OPENAI_API_KEY",),
        ),
        ((403, {}, '{"error": {"message": "not you"}}'), 1, ("answered 403", "not you", "OPENAI_API_KEY")),
        (
            (404, {}, "<html>nothing\nhere</html>"),
            1,
            ("answered 404 (<html>nothing here</html>)", "below which it has m"),
        ),
        ((404, {}, '{"detail": "Not Found"}'), 1, ('answered 404 ({"detail": "Not Found"})',)),
        ((200, {}, "{"), 3, ("found {, expected a chat completion",)),
        (
            (200, {"Content-Type": "text/html"}, "<html>Welcome KEY</html>"),
            3,
            ("found <html>Welcome ***</html>, expected",),
        ),
        ((200, {}, ""), 3, ("found an empty body, expected",)),
        ((200, {}, '{"error": "overloaded"}'), 3, ('found {"error": "overloaded"}, expected',)),
        ((200, {}, '{"choices": []}'), 3, ('found {"choices": []}, expected',)),
        ((200, {}, '{"choices": [{"message": {"content": 5}}]}'), 3, ("expected a chat completion",)),
        ((200, {}, '{"choices": [{"text": "A"}]}'), 3, ("expected a chat completion",)),
    ],
)
def test_what_does_not_pass_is_one_sentence(stub, server, tmp_path, found, requests, parts):
    """At once for 400, 401, 403 and 404; after two retries for 500; after three tries for what is no completion. The first
    question, which was answered, is kept. Where a server repeats the key, it is not shown."""
    s = stub(lambda stub, n, text: "A" if text == "a" else (*found[:2], found[2].replace("KEY", KEY)))
    with pytest.raises(UserError) as raised:
        answers(server(s, concurrency=1), LETTERS)
    told = str(raised.value)
    assert told.startswith(f"{s.url}: ") and "\n" not in told and len(told) < 700 and KEY not in told
    assert f"1 of 12 answers are kept in {tmp_path / 'answers' / 'answers.jsonl'}, the same command goes on" in told
    for part in parts:
        assert part in told, told
    assert s.texts == ["a"] + ["b"] * requests and [record["answer"] for record in kept(tmp_path)] == ["A"]


def test_a_server_that_is_not_there(stub, server, tmp_path):
    s = stub()
    s.server_close()
    with pytest.raises(UserError, match=r"cannot be reached, tried 1 times \(.*\); 0 of 12 answers"):
        answers(server(s, retries=0), LETTERS)
    slow = stub(lambda stub, n, text: time.sleep(0.5) or text)
    with pytest.raises(UserError, match="no answer within 0.2 seconds, tried 1 times"):
        answers(server(slow, retries=0, timeout=0.2), LETTERS[:1])
    drips = stub(lambda stub, n, text: (200, {}, Drip('{"choices": [{"message": {"content": "A"}}]}')))
    with pytest.raises(UserError, match="no answer within 0.4 seconds, tried 1 times"):
        answers(server(drips, retries=0, timeout=0.4), LETTERS[:1])
    assert kept(tmp_path) == []


def completion(text, finish):
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}]})


CUT = {  # an answer, why it ended, and the verdict
    "a": ("A", "length", "first"),
    "b": (" b. 85", "length", "second"),
    "c": ("A is better than the other one, which", "length", "unparsed"),
    "d": ("A is better than the other one", "stop", "first"),
    "e": ("<think>\nA seems", "stop", "unparsed"),
    "f": ("<think>\nIs it A or not?\n</think>\n\nB", "stop", "second"),
    "g": ("<think>\n\n</think>\n\nB because A", "length", "unparsed"),
    "h": ("A tie", "length", "unparsed"),
    "i": ("", "length", "unparsed"),
    "j": ("", "stop", "unparsed"),  # which is not cut
}


def test_an_answer_that_was_cut_is_no_verdict(stub, server, tmp_path, capsys):
    """Nor is one from disk. What is said before the cut may be taken back behind it; a letter alone is all that was asked for."""
    s, asked = stub(lambda stub, n, text: completion(*CUT[text][:2])), conversations(*CUT)
    for _ in range(2):
        found = [parse_answer(text).verdict for text in answers(server(s), asked)]
        assert dict(zip(CUT, found)) == {name: verdict for name, (_, _, verdict) in CUT.items()}
        assert (
            "m: 5 of 10 answers were cut, at 16 tokens or while it thought, and are unparsed" in capsys.readouterr().err
        )
    assert len(s.asked) == 10 and {record["answer"] for record in kept(tmp_path)} == {
        text for text, _, _ in CUT.values()
    }


def test_nothing_is_asked_whose_answer_cannot_be_kept(stub, server, tmp_path):
    """A file stands where the folder should be; the folder's own file is no file; the folder cannot be had. One sentence."""
    s = stub()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "loop", Path("/proc/answers")):
        with pytest.raises(UserError, match=rf"^{folder}/answers.jsonl: cannot be written \(.*\), expected a folder"):
            answers(server(s, folder=folder), LETTERS)
    assert not s.asked and (tmp_path / "file").read_text() == "mine"


def test_a_moment_of_nonsense_passes_and_an_empty_answer_is_one(stub, server, tmp_path):
    """No content, as of a refusal, is the text "", and kept."""
    nothing = 200, {}, '{"choices": [{"message": {"content": null, "refusal": "no"}}]}'
    s = stub(lambda stub, n, text: (200, {}, "<html>") if n == 0 else nothing if text == "a" else "")
    assert answers(server(s), LETTERS[:1]) == [""] and len(s.asked) == 2
    assert answers(server(s), LETTERS[:2]) == ["", ""] and len(s.asked) == 3
    assert [record["tokens"] for record in kept(tmp_path)] == [None, 12]


def test_as_many_are_under_way_as_asked_and_no_more(stub, server):
    """Each request waits until three are under way: fewer would wait for ever."""
    together = threading.Barrier(3)
    s = stub(lambda stub, n, text: together.wait(timeout=20) >= 0 and (time.sleep(0.02) or text))
    assert answers(server(s, concurrency=3), LETTERS) == [*"abcdefghijkl"]
    assert s.peak == 3


def test_a_spent_budget_keeps_what_was_answered(stub, server, tmp_path):
    s = stub()
    for requests, done in ((5, 5), (10, 10)):
        with pytest.raises(UserError) as raised:
            answers(server(s, concurrency=3, max_requests=5), LETTERS)
        assert f"--max-requests 5: spent, with 5 requests and 60 tokens; {done} of 12 answers are kept" in str(
            raised.value
        )
        assert len(s.asked) == requests == len(kept(tmp_path))
    both = server(s, max_requests=2)
    assert answers(both, LETTERS) == [*"ABCDEFGHIJKL"] and sorted(s.texts) == [*"abcdefghijkl"]
    with pytest.raises(UserError, match="0 of 1 answers"):  # the budget is the command's, not the call's
        answers(both, conversations("m"))
    assert len(s.asked) == 12


def test_tokens_are_counted_as_the_server_says(stub, server, tmp_path):
    """12 a question: 30 are reached by the third. A server that does not say is no ground for a budget."""
    s = stub()
    with pytest.raises(UserError, match="--max-tokens 30: spent, with 3 requests and 36 tokens; 3 of 12 answers"):
        answers(server(s, concurrency=1, max_tokens=30), LETTERS)
    s.usage = None
    with pytest.raises(UserError, match="does not say how many tokens it used, .*; 4 of 12 answers are kept"):
        answers(server(s, concurrency=1, max_tokens=30), LETTERS)
    assert len(s.asked) == 4 == len(kept(tmp_path))


def test_nonsense_stays_within_the_budget(stub, server):
    s = stub(lambda stub, n, text: (200, {}, "<html>"))
    with pytest.raises(UserError, match="found <html>"):
        answers(server(s, concurrency=1, max_requests=2), LETTERS)
    assert len(s.asked) == 2


ASK = """
import signal
import sys
from pathlib import Path
from prlhf.errors import run_command
from prlhf.judge.server import Server, answers
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
url, folder = sys.argv[1:]
asked = [({"role": "system", "content": "Judge."}, {"role": "user", "content": text}) for text in "abcdefghijkl"]
run_command(lambda: answers(Server("m", url, Path(folder), concurrency=2), asked))
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_loses_nothing_that_was_answered(stub, server, tmp_path, kill):
    """The fifth and sixth answer never come; killed then, the process has left four, and a half line at most."""
    held = threading.Event()
    s = stub(lambda stub, n, text: text.upper() if n < 4 else held.wait(30) and "")
    process = subprocess.Popen(
        [sys.executable, "-c", ASK, s.url, tmp_path / "answers"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    for _ in range(2000):
        if len(s.asked) == 6:
            break
        time.sleep(0.01)
    process.send_signal(kill)
    _, err = process.communicate(timeout=20)
    held.set()
    assert process.returncode == (130 if kill == signal.SIGINT else -signal.SIGKILL)
    if kill == signal.SIGINT:
        assert "interrupted; 4 of 12 answers are kept in" in err and "Traceback" not in err
    before = kept(tmp_path)
    assert sorted(record["answer"] for record in before) == ["A", "B", "C", "D"]
    with open(tmp_path / "answers" / "answers.jsonl", "a") as file:
        file.write(json.dumps({"key": before[0]["key"], "answer": "cut short"})[:-4])
    s.reply = lambda stub, n, text: text.upper()
    assert answers(server(s), LETTERS) == [*"ABCDEFGHIJKL"]
    assert sorted(s.texts[6:]) == [*"efghijkl"]  # the first four were asked once
    assert len(kept(tmp_path)) == 12 and kept(tmp_path)[:4] == before


def test_a_damaged_file_of_answers_is_refused(stub, server, tmp_path):
    s = stub()
    answers(server(s), LETTERS[:2])
    path = tmp_path / "answers" / "answers.jsonl"
    for line in ("{", "[]", '{"key": "k"}', '{"key": "k", "answer": null}'):
        damaged = path.read_text().splitlines()[0] + f"\n{line}\n"
        path.write_text(damaged)
        with pytest.raises(UserError, match="answers.jsonl, line 2: no answer; expected"):
            answers(server(s), LETTERS)
        assert path.read_text() == damaged


@pytest.fixture
def judged(call, tmp_path):
    """Judge six pairs of alice's and bob's, in each of which A's response has the word fine and B's has not, or for "tea" the
    other way round; A wins 4 of 6."""
    things = {"alice": ("rain", "snow", "tea"), "bob": ("heavy rain", "old snow", "green tea")}
    rows = [(f"About {thing}?", user) for user in things for thing in things[user]]
    for name in "ab":
        records = [
            {
                "id": str(n),
                "user": u,
                "prompt": x,
                "response": f"{x} {'fine' if ('tea' in x) == (name == 'b') else 'dull'}",
            }
            for n, (x, u) in enumerate(rows)
        ]
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def run(*options, judge="openai:m"):
        out = tmp_path / "out"
        status, said, err = call(command.main, tmp_path / "a", tmp_path / "b", "--judge", judge, "--out", out, *options)
        path = out / "report.json"
        return status, said, err, json.loads(path.read_text()) if path.exists() else None

    return run


def finer(stub, n, text):
    return "A" if text.index("fine") < text.index("dull") else "B"


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_judgement_by_a_server(stub, judged, tmp_path, monkeypatch):
    """The stub prefers what is fine, in any order; asked in both. The key is nowhere."""
    s = stub(finer)
    monkeypatch.setenv("OPENAI_BASE_URL", s.url)
    status, said, err, report = judged()
    assert status == 0, err
    assert report["win_rate"]["per_sample"] == 4 / 6 and report["consistency"] == 1
    assert len(s.asked) == 12 and f"m was asked at {s.url}" in said
    assert judged()[::3] == (0, report) and len(s.asked) == 12
    assert not [path for path, content in files(tmp_path).items() if KEY.encode() in content] and KEY not in said + err


def test_a_judge_by_position_ties_and_prose_is_unparsed(stub, judged):
    s = stub(lambda stub, n, text: "Well, who knows?" if "rain" in text else "A")
    status, _, err, report = judged("--base-url", s.url)
    assert status == 0, err
    assert report["pairs"] == {"judged": 4, "unparsed": 2, "users": 2} and report["verdicts"]["ties"] == 4
    assert report["position_bias"]["always_first"] == 4


def test_a_judgement_goes_on_after_its_budget(stub, judged, tmp_path):
    s = stub(finer)
    status, _, err, report = judged("--base-url", s.url, "--max-requests", 7, "--concurrency", 2)
    assert status == 2 and report is None and len(s.asked) == 7
    assert "error: --max-requests 7: spent" in err and "7 of 12 answers are kept" in err and len(err.splitlines()) == 1
    status, _, err, report = judged("--base-url", s.url)
    assert status == 0 and len(s.asked) == 12 and report["win_rate"]["per_sample"] == 4 / 6
    again = judged("--base-url", s.url, "--answers", tmp_path / "elsewhere")
    assert again[::3] == (0, report) and len(s.asked) == 24


def test_what_differs_from_the_judgement_that_is_there_is_named(stub, judged, tmp_path):
    s = stub(finer)
    assert judged("--base-url", s.url)[0] == 0
    before = files(tmp_path / "out")
    for options, judge, differing in [
        (("--base-url", s.url, "--certainty"), "openai:m", "settings"),
        (("--base-url", s.url, "--no-text"), "openai:n", "judge, settings"),
        ((), "rule:longer", "judge"),
    ]:
        status, _, err, _ = judged(*options, judge=judge)
        assert status == 2 and f"by openai:m, which differs in {differing}; expected a new or empty folder" in err, err
    assert files(tmp_path / "out") == before and len(s.asked) == 12


def test_a_dry_run_sends_and_writes_nothing(stub, judged, tmp_path, monkeypatch):
    """Without a key and without the package; what is on disk does not count. An estimate: characters / 4, rounded up."""
    s = stub(finer)
    judged("--base-url", s.url, "--max-requests", 7, "--concurrency", 1)
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.delenv("OPENAI_API_KEY")
        patch.setitem(sys.modules, "openai", None)
        status, said, err, _ = judged("--base-url", s.url, "--dry-run")
        assert status == 0, err
        assert said.startswith(f"dry run: 5 requests to m at {s.url} would be sent") and "at most 80 to write" in said
        said = judged("--base-url", s.url, "--dry-run", "--answers", tmp_path / "none")[1]
        assert said.startswith("dry run: 12 requests") and "at most 192 to write" in said
        assert files(tmp_path) == before and len(s.asked) == 7
    judged("--base-url", s.url, "--answers", tmp_path / "none")
    questions = ["".join(message["content"] for message in record["messages"]) for record in s.asked[7:]]
    total = sum(-(-len(text) // 4) for text in questions)
    assert f"about {total:,} tokens to read" in said


def test_bad_options_change_nothing(stub, judged, tmp_path, monkeypatch):
    before, s = files(tmp_path), stub()
    url = ("--base-url", s.url)
    for options, judge, part in [
        ((*url, "--concurrency", 0), "openai:m", "--concurrency: found 0, expected at least 1"),
        ((*url, "--max-requests", 0), "openai:m", "--max-requests: found 0, expected at least 1"),
        ((*url, "--max-tokens", -1), "openai:m", "--max-tokens: found -1, expected at least 1"),
        (("--base-url", "localhost:8000"), "openai:m", "--base-url: found no URL, expected one such as https://"),
        (("--base-url", "http://[/v1"), "openai:m", "--base-url: found no URL"),
        (("--dry-run",), "rule:shorter", "--dry-run: not for --judge rule:shorter, expected openai:MODEL"),
        (("--max-requests", 5), "rule:longer", "--max-requests: not for --judge rule:longer"),
        (url, "openai:", "--base-url: not for --judge openai:, expected openai:MODEL"),
        (
            ("--seed", 1),
            "rule:longer",
            "--seed: not for --judge rule:longer, expected hf:... or openai:..., or --validate",
        ),
        (("--seed", 1), "simulated:x", "--seed: not for --judge simulated:x, expected"),
        (("--seed", 1), "prm:x", "--seed: not for --judge prm:x, expected"),
    ]:
        status, _, err, _ = judged(*options, judge=judge)
        assert status == 2 and part in err and len(err.splitlines()) == 1, err
    for name, value, part in [
        ("OPENAI_API_KEY", "", "error: OPENAI_API_KEY: not set, expected"),
        ("OPENAI_API_KEY", "sk-\u00e4", "error: OPENAI_API_KEY: found characters"),
        ("OPENAI_BASE_URL", "nowhere", "error: OPENAI_BASE_URL: found no URL"),
    ]:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            status, _, err, _ = judged(*(url if name == "OPENAI_API_KEY" else ()))
        assert status == 2 and part in err and len(err.splitlines()) == 1, err
    monkeypatch.setitem(sys.modules, "openai", None)
    status, _, err, _ = judged(*url)
    assert status == 2 and "pip install 'prlhf[judge]'" in err
    assert files(tmp_path) == before and not s.asked

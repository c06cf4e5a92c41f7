"""`fetch`, against a server of its own on 127.0.0.1, and against what the Hub's client raises."""

import io
import json
import socket
import struct
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from prlhf.data import sources
from prlhf.data.fetch import download as downloading
from prlhf.data.fetch import fetch
from prlhf.data.sources import Source

ABC, ABC_SHA256 = b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
LONG = b"".join(b"%06d\n" % n for n in range(30_000))  # 210,000 bytes, no two places alike
SHA = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """Serves `files` (path: bytes), unless `answers` (path: function of the handler) has its own."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.answers, self.seen = {}, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.server.seen.append(self.path)
        if self.path in self.server.answers:
            return self.server.answers[self.path](self)
        if self.path not in self.server.files:
            return self.send_error(404)
        self.reply(200, self.server.files[self.path])

    def reply(self, status, body, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture
def toy(monkeypatch, server):
    """Make `toy` the name of a data set with these files of the server. No pauses."""
    monkeypatch.setattr(downloading, "PAUSES", (0, 0))

    def make(*files, base=server.url, **fields):
        urls = {file: f"{base}/{file}" for file in files}
        source = Source(
            **{"title": "Toy data", "page": "https://example.org/toy", "licence": "CC0", "urls": urls, **fields}
        )
        monkeypatch.setitem(sources.SOURCES, "toy", source)

    make("a.json")
    return make


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache/data/toy"


@pytest.fixture
def run(call):
    """Run the command; exit status, stdout and stderr."""
    return lambda name="toy", out=None: call(lambda: fetch.run(name, out))


def record_of(folder):
    return json.loads((folder / "fetched.json").read_text())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_downloaded_and_recorded(server, toy, folder, run):
    server.files["/a.json"] = ABC
    status, out, _ = run()
    assert status == 0
    assert (folder / "a.json").read_bytes() == b"abc"
    assert names(folder) == ["a.json", "fetched.json"]
    assert record_of(folder) == {
        "name": "toy",
        "files": {"a.json": {"url": f"{server.url}/a.json", "bytes": 3, "sha256": ABC_SHA256}},
    }
    assert out.startswith("Toy data\npage: https://example.org/toy\nlicence: CC0\n")
    assert str(folder) in out
    assert out.endswith("next: python -m prlhf.data prepare toy\n")


def test_another_folder(server, toy, folder, run, tmp_path):
    server.files["/a.json"] = ABC
    status, out, _ = run(out=str(tmp_path / "my data"))
    assert status == 0
    assert (tmp_path / "my data/a.json").read_bytes() == b"abc"
    assert out.endswith(f"next: python -m prlhf.data prepare toy --raw '{tmp_path}/my data'\n")
    assert not folder.exists()


def test_the_second_call_downloads_nothing(server, toy, folder, run):
    server.files["/a.json"] = ABC
    run()
    before = record_of(folder)
    status, out, _ = run()
    assert status == 0 and "0 of them new" in out
    assert len(server.seen) == 1
    assert record_of(folder) == before


@pytest.mark.parametrize("content", [b"abd", b"ab", b""])
def test_a_file_that_differs_from_the_record_is_downloaded_again(server, toy, folder, run, content):
    toy("a.json", "b.json")
    server.files.update({"/a.json": ABC, "/b.json": b"b"})
    run()
    (folder / "a.json").write_bytes(content)
    status, out, _ = run()
    assert status == 0
    assert f"a.json: found {len(content)} bytes of SHA-256 " in out
    assert f", expected 3 bytes of SHA-256 {ABC_SHA256}, as recorded\n" in out
    assert (folder / "a.json").read_bytes() == b"abc"
    assert server.seen == ["/a.json", "/b.json", "/a.json"]


def test_a_missing_file_is_downloaded_again(server, toy, folder, run):
    server.files["/a.json"] = ABC
    run()
    (folder / "a.json").unlink()
    status, out, _ = run()
    assert status == 0 and "a.json: recorded, but not there" in out
    assert (folder / "a.json").read_bytes() == b"abc"


def test_a_file_placed_by_hand_is_kept(server, toy, folder, run):
    toy("a.json", "b.json")
    server.files.update({"/a.json": b"the server's", "/b.json": b"b"})
    folder.mkdir(parents=True)
    (folder / "a.json").write_bytes(ABC)
    for _ in range(2):
        status, out, _ = run()
        assert status == 0 and "a.json: placed by hand, kept" in out
        assert record_of(folder)["files"]["a.json"] == {"placed_by_hand": True, "bytes": 3, "sha256": ABC_SHA256}
    assert (folder / "a.json").read_bytes() == b"abc"
    assert server.seen == ["/b.json"]


@pytest.mark.parametrize("reset", [False, True])
def test_an_interrupted_transfer_starts_again(server, toy, folder, run, reset):
    server.files["/a.json"] = LONG

    def answer(handler):
        del server.answers["/a.json"]  # the next request is served as usual
        handler.reply(200, LONG[:140_000], length=len(LONG))
        if reset:  # a reset rather than an end
            handler.wfile.flush()
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()

    server.answers["/a.json"] = answer
    status, out, _ = run()
    assert status == 0 and "a.json: did not arrive" in out
    assert server.seen == ["/a.json", "/a.json"]
    assert (folder / "a.json").read_bytes() == LONG
    assert names(folder) == ["a.json", "fetched.json"]


def test_what_was_left_of_an_earlier_attempt_is_not_used(server, toy, folder, run):
    folder.mkdir(parents=True)
    (folder / "a.json.partial").write_bytes(b"abcdef")
    server.files["/a.json"] = ABC
    assert run()[0] == 0
    assert (folder / "a.json").read_bytes() == b"abc"
    assert names(folder) == ["a.json", "fetched.json"]


def test_fewer_bytes_than_announced_are_no_file(server, toy, folder, run):
    server.answers["/a.json"] = lambda handler: handler.reply(200, b"abc", length=1_000)
    status, _, err = run()
    assert status == 2
    assert "found 3 bytes, expected 1,000" in err and f"a.json from {server.url}/a.json" in err
    assert len(server.seen) == 3  # and two further attempts
    assert names(folder) == []


def test_a_server_that_announces_no_size(server, toy, folder, run):
    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(LONG)

    server.answers["/a.json"] = answer
    assert run()[0] == 0
    assert (folder / "a.json").read_bytes() == LONG


@pytest.mark.parametrize("status, attempts", [(404, 1), (403, 1), (500, 3)])
def test_a_refused_file(server, toy, folder, run, status, attempts):
    server.answers["/a.json"] = lambda handler: handler.send_error(status)
    code, _, err = run()
    assert code == 2
    assert "a.json" in err and f"{server.url}/a.json" in err and f"status {status}" in err
    assert len(server.seen) == attempts
    assert names(folder) == []


def test_a_redirect_is_followed(server, toy, folder, run):
    server.answers["/a.json"] = lambda handler: handler.reply(302, b"", Location="/elsewhere")
    server.files["/elsewhere"] = LONG
    assert run()[0] == 0
    assert (folder / "a.json").read_bytes() == LONG


def test_a_redirect_to_a_file_of_this_machine_is_refused(server, toy, folder, run, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("not for fetching")
    server.answers["/a.json"] = lambda handler: handler.reply(302, b"", Location=secret.as_uri())
    status, _, err = run()
    assert status == 2 and "not allowed" in err
    assert names(folder) == []


def test_a_url_of_another_scheme_is_refused(toy, folder, run, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    toy("a.json", base=tmp_path.as_uri())
    status, _, err = run()
    assert status == 2 and "expected http or https" in err
    assert names(folder) == []


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_without_a_network_the_message_lists_what_to_put_where(server, toy, folder, run):
    base = f"http://127.0.0.1:{closed_port()}"
    toy("a.json", "b.json", "c.json", base=base)
    folder.mkdir(parents=True)
    (folder / "b.json").write_bytes(b"b")
    status, _, err = run()
    assert status == 2 and "Connection refused" in err
    assert f"put into {folder}:\n  a.json from {base}/a.json\n  c.json from {base}/c.json\n" in err
    assert "b.json" not in err and "prepare toy" in err


def test_a_silent_server_is_given_up(server, toy, folder, run, monkeypatch):
    monkeypatch.setattr(downloading, "TIMEOUT", 0.05)
    monkeypatch.setattr(downloading, "PAUSES", ())
    done = threading.Event()
    server.answers["/a.json"] = lambda handler: done.wait(5)
    status, _, err = run()
    done.set()
    assert status == 2 and "timed out" in err and f"put into {folder}" in err


def archive(members):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in members:
            made.writestr(name, content)
    return packed.getvalue()


PATTERNS = ("rm_training/*.json", "koala_eval_50.json")
MEMBERS = [
    ("data/rm_training/P1A.json", ABC),
    ("data/rm_training/P1B.json", b"[]"),
    ("data/rm_training/old/P2A.json", b"not this one"),
    ("__MACOSX/data/rm_training/._P1A.json", b"nor this"),
    ("data/koala_eval_50.json", b"{}"),
    ("data/alpaca_gpt4_10k.json", b"nor that"),
    ("data/setup.py", b"raise SystemExit"),
]


def test_an_archive_is_unpacked_in_part(server, toy, folder, run):
    toy("data.zip", unpack=PATTERNS)
    server.files["/data.zip"] = archive(MEMBERS)
    assert run()[0] == 0
    assert names(folder) == ["P1A.json", "P1B.json", "data.zip", "fetched.json", "koala_eval_50.json"]
    assert (folder / "P1A.json").read_bytes() == b"abc"
    assert record_of(folder)["files"]["P1A.json"] == {
        "archive": "data.zip",
        "member": "data/rm_training/P1A.json",
        "bytes": 3,
        "sha256": ABC_SHA256,
    }
    (folder / "P1A.json").write_bytes(b"damaged")
    (folder / "P1B.json").unlink()
    status, out, _ = run()
    assert status == 0 and "2 of them new" in out
    assert (folder / "P1A.json").read_bytes() == b"abc"
    assert (folder / "P1B.json").read_bytes() == b"[]"
    assert len(server.seen) == 1


def test_a_new_archive_renews_what_came_of_the_old_one(server, toy, folder, run):
    toy("data.zip", unpack=PATTERNS)
    server.files["/data.zip"] = archive(MEMBERS)
    folder.mkdir(parents=True)
    (folder / "koala_eval_50.json").write_bytes(b"mine")
    run()
    (folder / "data.zip").write_bytes(b"damaged")
    server.files["/data.zip"] = archive([("rm_training/P1A.json", b"new"), ("koala_eval_50.json", b"new")])
    assert run()[0] == 0
    assert (folder / "P1A.json").read_bytes() == b"new"
    assert (folder / "koala_eval_50.json").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "path", ["../rm_training/P1A.json", "/rm_training/P1A.json", "a/../../x.txt", "..\\rm_training\\x.json"]
)
def test_an_archive_that_leads_out_of_the_folder_is_refused(server, toy, folder, run, path):
    toy("data.zip", unpack=PATTERNS)
    server.files["/data.zip"] = archive([("rm_training/P1A.json", b"[]"), (path, b"[]")])
    status, _, err = run()
    assert status == 2 and "data.zip: found a member" in err
    assert names(folder) == ["data.zip", "fetched.json"]


@pytest.mark.parametrize("size", [0, 10, -10, -400])
def test_a_truncated_archive(server, toy, folder, run, size):
    toy("data.zip", unpack=PATTERNS)
    server.files["/data.zip"] = archive(MEMBERS)[:size]
    status, _, err = run()
    assert status == 2 and f"{folder}/data.zip: not a whole zip archive" in err
    assert names(folder) == ["data.zip", "fetched.json"]


def damaged(whole, what):
    if what == "content":
        return whole[:5000] + b"damage" + whole[5006:]
    if (
        what == "no deflate"
    ):  # the first block, behind the local header of 30 bytes and the name, is of a kind there is not
        start = 30 + len("rm_training/P1A.json")
        return whole[:start] + b"\xff" + whole[start + 1 :]
    central = whole.index(b"PK\1\2")  # the flag "encrypted" in both headers
    return whole[:6] + b"\1" + whole[7 : central + 8] + b"\1" + whole[central + 9 :]


@pytest.mark.parametrize("what", ["content", "no deflate", "encrypted"])
def test_an_archive_with_a_damaged_member(server, toy, folder, run, what):
    toy("data.zip", unpack=PATTERNS)
    server.files["/data.zip"] = damaged(archive([("rm_training/P1A.json", LONG)]), what)
    status, _, err = run()
    assert status == 2 and "not a whole zip archive" in err
    assert not (folder / "P1A.json").exists()


def test_an_archive_without_the_files(server, toy, folder, run):
    toy("data.zip", unpack=PATTERNS)
    server.files["/data.zip"] = archive([("readme.txt", b"")])
    status, _, err = run()
    assert status == 2 and "found readme.txt" in err and "expected rm_training/*.json or koala_eval_50.json" in err


def test_a_damaged_record(server, toy, folder, run):
    folder.mkdir(parents=True)
    for content in ("", "[]", '{"name": "toy", "files": [1]}', '{"name": "toy", "files": {"a": 1}}'):
        (folder / "fetched.json").write_text(content)
        status, _, err = run()
        assert status == 2 and f"{folder}/fetched.json: damaged" in err, content


def test_a_folder_of_another_data_set(server, toy, folder, run):
    folder.mkdir(parents=True)
    (folder / "fetched.json").write_text('{"name": "tldr", "files": {}}')
    status, _, err = run()
    assert status == 2 and "found the files of 'tldr', expected 'toy'" in err


def test_an_unknown_name(run):
    status, _, err = run("prsm")
    assert status == 2 and "did you mean 'prism'?" in err
    assert "tldr, prism, psoups, persona, multipref" in err


def test_the_sources():
    assert list(sources.SOURCES) == ["tldr", "prism", "psoups", "persona", "multipref"]
    urls = sources.SOURCES["tldr"].urls
    numbers = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 22]
    assert list(urls) == [f"batch{n}.json" for n in numbers]
    start = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons/"
    assert urls["batch22.json"] == start + "batch22.json"
    assert sources.SOURCES["prism"].patterns == ("survey.jsonl", "conversations.jsonl")
    for source in sources.SOURCES.values():
        assert source.title and source.licence and source.page.startswith("https://")
        assert bool(source.urls) != bool(source.repository) and bool(source.patterns) == bool(source.repository)
        assert all(url.startswith("https://") for url in source.urls.values())


# The Hub. Its client is offline here, and what it does is played by functions.


def response(status):
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/api/datasets/x"))


@pytest.fixture
def hub(monkeypatch):
    """A Hub with `files` (path: bytes), or with `error`; `asked` lists what was asked of it. It is not offline."""
    state = SimpleNamespace(files={}, error=None, info_error=None, asked=[])

    def info(repository, revision=None):
        state.asked.append(("info", repository, revision))
        if state.info_error:
            raise state.info_error
        return SimpleNamespace(sha=SHA, siblings=[SimpleNamespace(rfilename=path) for path in state.files])

    def snapshot(repository, repo_type, revision, allow_patterns, local_dir):
        state.asked.append(("snapshot", repository, repo_type, revision, allow_patterns))
        for path in allow_patterns:
            (local_dir / path).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / path).write_bytes(state.files[path])
            if state.error:
                raise state.error
        return str(local_dir)

    monkeypatch.setattr(fetch, "dataset_info", info)
    monkeypatch.setattr(fetch, "snapshot_download", snapshot)
    monkeypatch.setattr(fetch, "is_offline_mode", lambda: False)
    return state


PRISM = "HannahRoseKirk/prism-alignment"


def test_a_repository(hub, run, tmp_path):
    folder = tmp_path / "cache/data/prism"
    hub.files = {
        "README.md": b"",
        "survey.jsonl": ABC,
        "conversations.jsonl": b"{}",
        "utterances.jsonl": b"{}",
        "x.py": b"",
    }
    status, out, _ = run("prism")
    assert status == 0 and "CC BY-NC 4.0" in out
    assert hub.asked == [
        ("info", PRISM, None),
        ("snapshot", PRISM, "dataset", SHA, ["survey.jsonl", "conversations.jsonl"]),
    ]
    assert names(folder) == ["conversations.jsonl", "fetched.json", "survey.jsonl"]
    assert not (tmp_path / "cache/data/prism.partial").exists()
    record = record_of(folder)
    assert record["revision"] == SHA
    assert record["files"]["survey.jsonl"] == {
        "repository": PRISM,
        "revision": SHA,
        "path": "survey.jsonl",
        "bytes": 3,
        "sha256": ABC_SHA256,
    }
    assert run("prism")[0] == 0
    assert len(hub.asked) == 2  # nothing more
    (folder / "survey.jsonl").write_bytes(b"damaged")
    assert run("prism")[0] == 0
    assert hub.asked[2:] == [("info", PRISM, SHA), ("snapshot", PRISM, "dataset", SHA, ["survey.jsonl"])]
    assert (folder / "survey.jsonl").read_bytes() == b"abc"


def test_files_of_a_repository_that_were_placed_by_hand_need_no_hub(hub, run, tmp_path):
    folder = tmp_path / "cache/data/prism"
    folder.mkdir(parents=True)
    for name in ("survey.jsonl", "conversations.jsonl"):
        (folder / name).write_bytes(ABC)
    status, out, _ = run("prism")
    assert status == 0 and "survey.jsonl: placed by hand, kept" in out
    assert hub.asked == []


def test_shards_of_a_repository_lie_side_by_side(hub, run, tmp_path):
    folder = tmp_path / "cache/data/persona"
    folder.mkdir(parents=True)
    (folder / "train-1.parquet").write_bytes(b"by hand")
    hub.files = {"data/train-0.parquet": ABC, "data/train-1.parquet": b"one", "more/train-0.parquet": b"two"}
    assert run("persona")[0] == 0
    assert hub.asked[1][-1] == ["data/train-0.parquet", "more/train-0.parquet"]
    assert (folder / "train-0.parquet").read_bytes() == b"abc"
    assert (folder / "train-1.parquet").read_bytes() == b"by hand"
    assert (folder / "more-train-0.parquet").read_bytes() == b"two"


def test_an_interrupted_download_leaves_nothing_that_passes_for_the_data_set(hub, run, tmp_path):
    hub.files = {"data/train-0.parquet": ABC, "data/train-1.parquet": b"one"}
    hub.error = httpx.ReadTimeout("timed out")
    status, _, err = run("persona")
    folder = tmp_path / "cache/data/persona"
    assert status == 2 and f"put into {folder}:\n  *.parquet from https://huggingface.co/datasets/SynthLabsAI" in err
    assert names(folder) == []
    hub.error = None
    assert run("persona")[0] == 0
    assert names(folder) == ["fetched.json", "train-0.parquet", "train-1.parquet"]


def test_a_repository_without_the_files(hub, run):
    hub.files = {"README.md": b"", "survey.jsonl": ABC}
    status, _, err = run("prism")
    assert status == 2 and f"found no conversations.jsonl at revision {SHA}" in err
    status, _, err = run("persona")
    assert status == 2 and f"found no *.parquet at revision {SHA}" in err


def test_a_repository_into_the_current_folder(hub, run, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hub.files = {"MultiPref-Train.jsonl": ABC, "data/train-00000-of-00001.parquet": b"", "features/x.jsonl": b""}
    assert run("multipref", out=".")[0] == 0
    assert names(tmp_path / "here") == ["MultiPref-Train.jsonl", "fetched.json"]
    assert names(tmp_path) == ["here"]


@pytest.mark.parametrize("token", [None, "hf_aSecretThatIsNotToBeSeen"])
@pytest.mark.parametrize("kind, status", [(GatedRepoError, 403), (RepositoryNotFoundError, 401), (HfHubHTTPError, 401)])
def test_a_gated_repository(hub, run, monkeypatch, tmp_path, token, kind, status):
    monkeypatch.setattr(fetch, "get_token", lambda: token)
    hub.files = {"data/train-0.parquet": ABC}
    hub.error = kind(f"Access is restricted. Bearer {token}", response=response(status))
    code, out, err = run("persona")
    assert code == 2
    assert "accept its terms on https://huggingface.co/datasets/SynthLabsAI/PERSONA" in out  # before it begins
    assert "accept its terms on https://huggingface.co/datasets/SynthLabsAI/PERSONA" in err
    assert "`hf auth login`" in err and "HF_TOKEN" in err and f"status {status}" in err
    assert ("no token was found" in err) == (token is None)
    assert "hf_aSecret" not in out + err
    assert names(tmp_path / "cache/data/persona") == []


def test_a_repository_that_is_gone(hub, run, monkeypatch):
    monkeypatch.setattr(fetch, "get_token", lambda: None)
    hub.info_error = RepositoryNotFoundError("Repository Not Found", response=response(404))
    status, _, err = run("prism")
    assert status == 2 and PRISM in err and "status 404" in err and "expected a public data set" in err


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("[Errno -2] Name or service not known"),
        httpx.ProxyError("403 Forbidden"),
        LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder"),
        HfHubHTTPError("502 Bad Gateway", response=response(502)),
        ConnectionResetError("Connection reset by peer"),
    ],
)
def test_a_hub_that_is_not_reached(hub, run, tmp_path, error):
    hub.info_error = error
    status, _, err = run("prism")
    page = "https://huggingface.co/datasets/HannahRoseKirk/prism-alignment/tree/main"
    assert status == 2 and str(error) in err
    assert (
        f"put into {tmp_path}/cache/data/prism:\n  survey.jsonl from {page}\n  conversations.jsonl from {page}\n" in err
    )
    assert "prepare prism" in err


def test_offline_mode(run, tmp_path):
    """The client itself, to which conftest.py has given HF_HUB_OFFLINE=1."""
    status, _, err = run("prism")
    assert status == 2 and "HF_HUB_OFFLINE" in err and "unset it" in err
    assert f"put into {tmp_path}/cache/data/prism:\n  survey.jsonl from" in err


def test_offline_mode_with_a_download_begun(hub, run, monkeypatch):
    monkeypatch.setattr(fetch, "is_offline_mode", lambda: True)
    hub.files = {"survey.jsonl": ABC, "conversations.jsonl": ABC}
    hub.error = OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled.")
    status, _, err = run("prism")
    assert status == 2 and "HF_HUB_OFFLINE" in err


def test_the_token_is_neither_told_nor_written(hub, run, monkeypatch, tmp_path):
    token = "hf_aSecretThatIsNotToBeSeen"
    monkeypatch.setattr(fetch, "get_token", lambda: token)
    hub.info_error = httpx.LocalProtocolError(f"Illegal header value b'Bearer {token}'")
    status, out, err = run("prism")
    assert status == 2 and "Illegal header value" in err and token not in out + err
    hub.info_error, hub.files = None, {"survey.jsonl": ABC, "conversations.jsonl": ABC}
    status, out, err = run("prism")
    assert status == 0 and token not in out + err
    assert not any(token in path.read_text() for path in (tmp_path / "cache/data/prism").iterdir())

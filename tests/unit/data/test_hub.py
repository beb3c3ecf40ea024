"""Uploading a generated dataset, against a stand-in of the hub on this machine."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

pytest.importorskip("huggingface_hub", reason="needs the hub's client: pip install 'stepladder[hf]'")

TOKEN = "hf_" + "notarealtoken"
WORDS = ["data", "compgen", "generate", "--out-dir", "made", "--tasks", "gcd,majority", "--dataset-size", "40"]
UPLOAD = ["--hf-repo", "me/programs", "--hf-upload"]


class Hub(http.server.ThreadingHTTPServer):
    """A stand-in for the hub: the part of its HTTP interface that creating and filling a dataset uses.

    ``calls``: (method, path, authorisation). ``files``: what was committed, by path. ``refuse``: an HTTP status.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.calls, self.files, self.blobs, self.created, self.refuse = [], {}, {}, [], None
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub():
    """A Hub that runs for as long as the context lasts."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _any(self):
        hub, body, path = self.server, self._body(), self.path.split("?")[0]
        hub.calls.append((self.command, path, self.headers.get("Authorization")))
        if hub.refuse and path == "/api/repos/create":
            self._reply({"error": "You have not the right to create this"}, hub.refuse)
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._reply({"url": f"{hub.url}/datasets/me/programs", "name": "me/programs"})
        elif path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.startswith("train") else "regular" for path in paths}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self._reply({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{hub.url}/blob/{o['oid']}"}}} for o in objects]
            self._reply({"transfer": "basic", "objects": actions})
        elif path.startswith("/blob/"):
            hub.blobs[path.removeprefix("/blob/")] = body
            self._reply({})
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.blobs[value["oid"]]
            oid = "0" * 40
            self._reply(
                {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/datasets/me/programs/commit/{oid}"}
            )
        else:
            self._reply({}, 404 if self.command == "GET" else 200)

    do_GET = do_POST = do_PUT = do_HEAD = _any


@pytest.fixture
def stepladder(tmp_path):
    """Run a command in an empty directory, with a home of its own, no token, and an address that nobody listens at."""

    def call(*words, **environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        known = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_XET": "1"}
        return subprocess.run(
            [sys.executable, "-m", "stepladder.cli", *words],
            cwd=tmp_path,
            env={**kept, **known, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return call


def test_every_file_arrives_as_it_is(stepladder, tmp_path):
    with hub() as server:
        done = stepladder(*WORDS, *UPLOAD, "--hf-private", HF_ENDPOINT=server.url, HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr
    assert f"uploaded: {server.url}/datasets/me/programs" in done.stdout
    (created,) = server.created
    assert (created["organization"], created["name"], created["type"]) == ("me", "programs", "dataset")
    assert created.get("private") or created.get("visibility") == "private"
    here = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    assert set(here) == {
        *(f"{split}.jsonl" for split in ("train", "test", "ood", "value_ood")),
        "meta.json",
        "README.md",
    }
    assert server.files == here
    assert len(server.blobs) == 1, "large files go another way"
    asked = [(path, told) for method, path, told in server.calls if path.startswith("/api/datasets/")]
    assert asked
    assert {told for _, told in asked} == {f"Bearer {TOKEN}"}


def test_without_being_asked_nothing_is_sent(stepladder):
    with hub() as server:
        assert stepladder(*WORDS, HF_ENDPOINT=server.url, HF_TOKEN=TOKEN).returncode == 0
    assert server.calls == []


@pytest.mark.parametrize(
    ("words", "environment", "says"),
    [
        (UPLOAD, {}, "no Hugging Face token: set HF_TOKEN"),
        (UPLOAD[:2], {"HF_TOKEN": TOKEN}, "needs both --hf-repo OWNER/NAME and --hf-upload"),
        (UPLOAD[2:], {"HF_TOKEN": TOKEN}, "needs both --hf-repo OWNER/NAME and --hf-upload"),
        (["--hf-repo", "programs", "--hf-upload"], {"HF_TOKEN": TOKEN}, "'programs' is no name on the hub"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_made(stepladder, tmp_path, words, environment, says):
    done = stepladder(*WORDS, *words, **environment)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "made").exists()


def test_a_refusal_is_one_sentence_and_the_same_command_goes_on(stepladder, tmp_path):
    with hub() as server:
        server.refuse = 403
        done = stepladder(*WORDS, *UPLOAD, HF_ENDPOINT=server.url, HF_TOKEN=TOKEN)
        assert done.returncode == 2
        assert "upload of made to 'me/programs' failed" in done.stderr
        assert "403" in done.stderr
        assert TOKEN not in done.stderr
        assert len(done.stderr.splitlines()) == 1
        before = (tmp_path / "made" / "train.jsonl").stat().st_mtime_ns
        server.refuse = None
        assert stepladder(*WORDS, *UPLOAD, HF_ENDPOINT=server.url, HF_TOKEN=TOKEN).returncode == 0
    assert (tmp_path / "made" / "train.jsonl").stat().st_mtime_ns == before
    assert "train.jsonl" in server.files


def test_offline_is_one_sentence(stepladder):
    done = stepladder(*WORDS, *UPLOAD, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "upload of made to 'me/programs' failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_client_the_way_out_is_named(monkeypatch):
    from stepladder.core.errors import UserError
    from stepladder.data import hub as ours

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'stepladder\[hf\]'"):
        ours.upload("made", "me/programs")

"""Push and pull against a hub of our own on loopback, and `hf:` sources from a local cache."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptrix_export.errors import SourceError
from adaptrix_export.load.source import HubName, commit_of, hub_name, resolve
from adaptrix_export.package.documents import ManifestDocument
from adaptrix_export.save.hashes import hash_file
from adaptrix_export.show.card import model_card
from adaptrix_export.show.facts import read_facts

DATA = Path(__file__).parents[1] / "show" / "data" / "moved_and_gated"
COMMIT = "a" * 40
REPO = "org/name"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a commit and a download need; `files` is what it keeps."""

    files: dict[str, bytes]
    blobs: dict[str, bytes]
    calls: list[str]
    ignores: str

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def do_PUT(self) -> None:
        self.blobs[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        told, path = self.body(), self.path.partition("?")[0]
        self.calls.append(path)
        here = f"http://{self.headers['host']}"
        if path == "/api/repos/create":
            self.answer({"url": f"{here}/{REPO}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["size"] > 4000 else "regular",
                    "shouldIgnore": f["path"] == self.ignores,
                }
                for f in json.loads(told)["files"]
            ]
            self.answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{here}/blob/{o['oid']}"}}}
                if o["oid"] not in self.blobs
                else o
                for o in json.loads(told)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            for line in told.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.files[value["path"]] = self.blobs[value["oid"]]
            self.answer({"commitUrl": f"{here}/{REPO}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.partition("/resolve/")[2].partition("/")[2]
        if name not in self.files:
            self.send_response(404)
            self.send_header("x-error-code", "EntryNotFound")
            self.send_header("content-length", "0")
            self.end_headers()
            return
        content = self.files[name]
        self.send_response(200)
        self.send_header("etag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("x-repo-commit", COMMIT)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Any]:
    kind = type("OwnHub", (Hub,), {"files": {}, "blobs": {}, "calls": [], "ignores": ""})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    kind.address = f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
    yield kind
    server.shutdown()
    server.server_close()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A manifest that lists a few files, with the right hashes; one is large enough for LFS."""
    folder = tmp_path / "artifact"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model.onnx").write_bytes(bytes(range(256)) * 40)
    (folder / "config.json").write_text("{}")
    (folder / "report.json").write_bytes((DATA / "report.json").read_bytes())
    manifest = json.loads((DATA / "manifest.json").read_text())
    names = ("onnx/model.onnx", "config.json", "report.json")
    manifest["outputs"] = {name: hash_file(folder / name).as_dict() for name in names}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def run(hub: Any, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": "hf_token",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-m", "adaptrix_export", *map(str, arguments)],
        capture_output=True, text=True, env=env, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_what_is_pushed_is_what_is_pulled(hub: Any, artifact: Path, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "push", artifact, REPO, "--license", "mit", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == 5
    assert set(hub.files) == {
        "README.md", "manifest.json", "config.json", "report.json", "onnx/model.onnx",
    }  # fmt: skip
    assert len(hub.blobs) >= 1
    card = hub.files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    out = tmp_path / "pulled"
    done = run(hub, tmp_path, "pull", f"hf:{REPO}", out)
    assert done.returncode == 0, done.stderr
    for name in ("manifest.json", "config.json", "report.json", "onnx/model.onnx"):
        assert (out / name).read_bytes() == (artifact / name).read_bytes()
    assert not (out / "README.md").exists()


@pytest.mark.slow
def test_what_is_not_as_the_manifest_says_is_refused(
    hub: Any, artifact: Path, tmp_path: Path
) -> None:
    hub.ignores = "config.json"
    done = run(hub, tmp_path, "push", artifact, REPO)
    assert done.returncode == 2
    assert "left out config.json" in done.stderr
    hub.ignores = ""
    assert run(hub, tmp_path, "push", artifact, REPO).returncode == 0
    hub.files["config.json"] = b"{ }"
    done = run(hub, tmp_path, "pull", f"hf:{REPO}", tmp_path / "pulled")
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert not (tmp_path / "pulled").exists()
    (artifact / "config.json").write_text("{ }")
    calls = len(hub.calls)
    done = run(hub, tmp_path, "push", artifact, REPO)
    assert done.returncode == 2
    assert len(hub.calls) == calls  # nothing was sent


def test_the_card_tells_base_method_and_proof() -> None:
    facts = read_facts(DATA)
    manifest = facts.manifest.as_dict()
    manifest["recipe"]["base"] = "hf:org/base@main"
    manifest["revisions"] = {"hf:org/base@main": COMMIT}
    card = model_card(type(facts)("x", ManifestDocument.of(manifest), facts.report), REPO)
    told = yaml.safe_load(card.split("---")[1])
    assert told["base_model"] == ["org/base"]
    assert told["base_model_relation"] == "merge"
    assert "license" not in told
    assert COMMIT in card
    assert all(f"| {case.name} |" in card for case in facts.cases)
    assert f'Session("{REPO}")' in card


def test_names_of_the_hub() -> None:
    assert hub_name("hf:org/name") == HubName("org/name", "", None)
    assert hub_name("hf:gpt2@main") == HubName("gpt2", "", "main")
    assert hub_name("hf:org/name/sub/lora@refs/pr/1") == HubName(
        "org/name", "sub/lora", "refs/pr/1"
    )
    with pytest.raises(SourceError, match="leads|path"):
        hub_name("hf:org/name/../other")
    assert commit_of("./folder", Path("/a/snapshots/b")) is None


def test_a_folder_of_a_repository_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "models--org--name"
    sub = repo / "snapshots" / COMMIT / "loras" / "sql"
    sub.mkdir(parents=True)
    (sub / "adapter_config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = resolve("hf:org/name/loras/sql@main")
    assert found.folder == sub
    assert commit_of(found.spec, found.folder) == COMMIT
    with pytest.raises(SourceError, match="no loras/other in org/name"):
        resolve("hf:org/name/loras/other@main")

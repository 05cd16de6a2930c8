"""The test Hub behaves as the real client (`huggingface_hub`, in its own process) expects."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import LFS_MINIMUM_BYTES, HubFile, HubServer
from safetensors.numpy import save

NAME = "owner/model"
WEIGHTS = save({"weight": np.arange(LFS_MINIMUM_BYTES // 4 + 1, dtype=np.float32)})
PRELUDE = """
import json, os, sys
import huggingface_hub as hub
from huggingface_hub import errors
api = hub.HfApi()
def error_name(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except Exception as error:
        return type(error).__name__
    return "no error"
"""


def run_client(environment: dict[str, str], code: str, *arguments: object) -> Any:
    """Run code in a fresh process, and return its variable `answer` by JSON."""
    script = f"{PRELUDE}\n{code}\nprint(json.dumps(answer))"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def write_folder(folder: Path, note: str = "first") -> Path:
    """Write a model folder: a card, a small file in a sub-folder and large weights."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n{note}\n")
    (folder / "sub" / "naïve é.json").write_text(json.dumps({"note": note}))
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


@dataclass
class Published:
    """A Hub with two versions of a model, and the folder of the second."""

    hub: HubServer
    folder: Path
    first: str
    second: str


PUBLISH = f"""
assert api.create_repo("{NAME}") == api.create_repo("{NAME}", exist_ok=True)
first = api.upload_folder(repo_id="{NAME}", folder_path=sys.argv[1]).oid
second = api.upload_folder(repo_id="{NAME}", folder_path=sys.argv[2], delete_patterns="old/*").oid
unchanged = api.upload_folder(repo_id="{NAME}", folder_path=sys.argv[2]).oid
again = error_name(api.create_repo, "{NAME}")
answer = [first, second, unchanged, again]
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """Publish two versions with the real client; the tests that share this only read."""
    old, new = (write_folder(tmp_path_factory.mktemp(v) / v, v) for v in ("first", "second"))
    (old / "old").mkdir()
    (old / "old" / "gone.txt").write_text("gone")
    with HubServer() as hub:
        environment = hub.environment(tmp_path_factory.mktemp("publisher"))
        first, second, unchanged, again = run_client(environment, PUBLISH, old, new)
        assert unchanged == second
        assert again == "HfHubHTTPError"
        yield Published(hub, new, first, second)


def fetch(hub: HubServer, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Get a path without the client; return status, headers and body."""
    request = urllib.request.Request(hub.url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_large_files_go_through_lfs_and_unchanged_ones_are_sent_once(published: Published) -> None:
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    files = published.hub.repositories[NAME].commits[published.second]
    assert files["model.safetensors"] == HubFile(WEIGHTS, is_lfs=True)
    assert not files["README.md"].is_lfs
    assert published.hub.requests.count(f"PUT /lfs-objects/{oid}") == 1


def test_the_client_lists_what_was_published_and_raises_for_what_is_missing(
    published: Published, tmp_path: Path
) -> None:
    code = f"""
info = api.model_info("{NAME}")
tree = {{f.path: f for f in api.list_repo_tree("{NAME}", recursive=True)}}
get = hub.hf_hub_download
answer = {{
    "sha": info.sha, "private": info.private,
    "files": api.list_repo_files("{NAME}"), "tree": sorted(tree),
    "older": api.list_repo_files("{NAME}", revision=sys.argv[1]),
    "top": [f.path for f in api.list_repo_tree("{NAME}")],
    "sub": [f.path for f in api.list_repo_tree("{NAME}", "sub")],
    "lfs": [tree["model.safetensors"].lfs.sha256, tree["model.safetensors"].size],
    "there": [api.file_exists("{NAME}", "README.md"), api.file_exists("{NAME}", "nothing")],
    "errors": [
        error_name(get, "{NAME}", "ничего.json"),
        error_name(get, "{NAME}", "README.md", revision="nowhere"),
        error_name(api.model_info, "owner/other"),
        error_name(api.model_info, "{NAME}", revision="nowhere"),
        error_name(api.model_info, "{NAME}", token="hf_wrong"),
    ],
}}"""
    top = [".gitattributes", "README.md", "model.safetensors"]
    everything = [*top, "sub/naïve é.json"]
    assert run_client(published.hub.environment(tmp_path), code, published.first) == {
        "sha": published.second,
        "private": False,
        "files": everything,
        "tree": everything,
        "older": sorted([*everything, "old/gone.txt"]),
        "top": ["sub", *top],
        "sub": ["sub/naïve é.json"],
        "lfs": [hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS)],
        "there": [True, False],
        "errors": [
            "RemoteEntryNotFoundError", "RevisionNotFoundError", "RepositoryNotFoundError",
            "RevisionNotFoundError", "HfHubHTTPError",
        ],
    }  # fmt: skip


def test_downloads_equal_the_files_and_are_cached_for_offline_use(
    published: Published, tmp_path: Path
) -> None:
    code = f"""
read = lambda **k: open(hub.hf_hub_download("{NAME}", "sub/naïve é.json", **k)).read()
answer = [read(), read(revision=sys.argv[1]), hub.snapshot_download("{NAME}")]
"""
    new, old, snapshot = run_client(published.hub.environment(tmp_path), code, published.first)
    assert [json.loads(new)["note"], json.loads(old)["note"]] == ["second", "first"]
    for source in filter(Path.is_file, published.folder.rglob("*")):
        copy = Path(snapshot) / source.relative_to(published.folder)
        assert copy.read_bytes() == source.read_bytes()
    asked = len(published.hub.requests)
    offline = published.hub.environment(tmp_path, offline=True)
    assert run_client(offline, code, published.first) == [new, old, snapshot]
    empty = published.hub.environment(tmp_path / "empty", offline=True)
    missing = f'answer = error_name(hub.hf_hub_download, "{NAME}", "README.md")'
    assert run_client(empty, missing) == "LocalEntryNotFoundError"
    assert len(published.hub.requests) == asked


def test_branches_and_tags_keep_their_commits(tmp_path: Path) -> None:
    code = f"""
put = lambda text, **k: api.upload_file(
    repo_id="{NAME}", path_in_repo="a.txt", path_or_fileobj=text.encode(), **k)
read = lambda **k: open(hub.hf_hub_download("{NAME}", "a.txt", **k)).read()
api.create_repo("{NAME}")
start = put("one").oid
api.create_tag("{NAME}", tag="v1")
api.create_branch("{NAME}", branch="wip/adapter")
put("two")
put("three", revision="wip/adapter")
api.upload_file(repo_id="{NAME}", path_in_repo="folder/b.txt", path_or_fileobj=b"b")
before = api.list_repo_files("{NAME}")
stale = error_name(put, "four", parent_commit=start)
texts = [read(), *(read(revision=r) for r in ("v1", "wip/adapter", start))]
api.delete_file("a.txt", "{NAME}")
api.delete_folder("folder", "{NAME}")
answer = [texts, stale, before, api.list_repo_files("{NAME}")]
"""
    with HubServer() as hub:
        texts, stale, before, left = run_client(hub.environment(tmp_path), code)
    assert texts == ["two", "one", "three", "one"]
    assert stale == "HfHubHTTPError"
    assert before == [".gitattributes", "a.txt", "folder/b.txt"]
    assert left == [".gitattributes"]


def test_private_repositories_and_changes_need_the_token(tmp_path: Path) -> None:
    name = "owner/secret"
    make = f"""
api.create_repo("{name}", private=True)
api.upload_file(repo_id="{name}", path_in_repo="a.txt", path_or_fileobj=b"secret")
answer = [api.model_info("{name}").private, open(hub.hf_hub_download("{name}", "a.txt")).read()]
"""
    ask = f"""
answer = [
    error_name(api.model_info, "{name}"),
    error_name(hub.hf_hub_download, "{name}", "a.txt"),
    error_name(api.create_repo, "owner/mine"),
    error_name(api.upload_file, repo_id="owner/open", path_in_repo="a", path_or_fileobj=b"a"),
    api.list_repo_files("owner/open"),
]"""
    with HubServer("hf_other_token") as hub:
        assert run_client(hub.environment(tmp_path / "owner"), make) == [True, "secret"]
        hub.create_repository("owner/open")
        stranger = hub.environment(tmp_path / "stranger", signed_in=False)
        refused, unread, uncreated, unwritten, seen = run_client(stranger, ask)
        assert [refused, unread] == ["RepositoryNotFoundError"] * 2
        assert [uncreated, unwritten] == ["HfHubHTTPError"] * 2
        assert list(hub.repositories) == [name, "owner/open"]
        assert seen == [".gitattributes"]
        assert fetch(hub, f"/{name}/resolve/main/a.txt")[0] == 401
        assert fetch(hub, f"/{name}/resolve/main/a.txt", Authorization="Bearer no")[0] == 401


def test_an_interrupted_upload_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    code = f"""
api.create_repo("{NAME}")
upload = lambda: api.upload_folder(repo_id="{NAME}", folder_path=sys.argv[1])
# Newer clients repeat it by themselves; 1.3 leaves that to its caller.
assert error_name(upload) in ("no error", "RuntimeError")
answer = upload().oid
"""
    with HubServer() as hub:
        hub.fail_next_uploads = 1
        environment = hub.environment(tmp_path / "cache")
        sha = run_client(environment, code, write_folder(tmp_path / "model"))
        assert hub.fail_next_uploads == 0
        puts = [r for r in hub.requests if r.startswith("PUT ")]
        assert len(puts) == 1  # only the whole one counts as a request
        assert hub.repositories[NAME].commits[sha]["model.safetensors"].content == WEIGHTS

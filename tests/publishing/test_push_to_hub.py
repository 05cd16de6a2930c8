"""Publishing: what is refused, what a commit holds, and what those who pull it get.

The client reads its endpoint when it is imported, so all that asks the test Hub runs in processes
of its own. They cost seconds each, so one of them does much and the tests read what it found.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from breaking import edit_json, remove
from hub_server import HubServer, Repository
from huggingface_hub import HfApi
from huggingface_hub.errors import BadRequestError
from shared_models import shared_model
from tiny import tiny_model

import modeling_llm2clip
from modeling_llm2clip.__main__ import LINE, main
from modeling_llm2clip.cli.command import parse
from modeling_llm2clip.model_folders.model_card import CardData, read_card_data
from modeling_llm2clip.model_folders.model_writing import save_model
from modeling_llm2clip.publishing.push_to_hub import (
    check_publishable,
    list_files,
    push_to_hub,
    require_repo_id,
)

pytestmark = pytest.mark.slow
STATED = CardData(license="mit")
NAME, OPEN = "owner/model", "owner/open"
# As if not installed: its import takes long, and `doctor` skips it then.
PRELUDE = """
import contextlib, io, json, os, sys
sys.modules["sentence_transformers"] = None
from modeling_llm2clip.__main__ import LINE, main
from modeling_llm2clip.cli.command import parse
answers = []
def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    answers.append([code, out.getvalue(), err.getvalue()])
"""
# What others add on the Hub: a merged evaluation result, graphs, an image.
ADDED = (".eval_results/mteb.yaml", "onnx/model.onnx", "image [1].png")
PUBLISH = f"""
from huggingface_hub import CommitOperationAdd, HfApi
source, again, other, opened = sys.argv[1:5]
# The Hub refuses one of the large files of the first upload.
assert main(["export", source, again, "--max-shard-size", "50KB"]) == 0
run("push", again, "{NAME}")
HfApi().create_commit("{NAME}", commit_message="By others", operations=[
    CommitOperationAdd(path, path.encode()) for path in {list(ADDED)}])
run("push", again, "{NAME}", "--commit-message", "Second try")
run("push", other, "{NAME}")
run("push", other, "{NAME}", "--delete-others", "--dry-run")
run("push", other, "{NAME}", "--delete-others")
run("push", again, "{NAME}", "--revision", "sharded", "--delete-others")
run("push", again, "{NAME}", "--no-private")
run("push", opened, "{OPEN}", "--no-private")
run("push", opened, "{OPEN}")
run("push", opened, "{OPEN}", "--no-private", "--license", "nearly-mit")
del os.environ["HF_TOKEN"]  # a stranger from here on
run("push", source, "{NAME}")
run("doctor", "{NAME}")
print(json.dumps(answers))
"""
# Loads a private repository, pinned and not, and says what it got: a name of the class, an
# embedding.
LOAD = f"""
import json, sys
way, first = sys.argv[1:]
given = {{"trust_remote_code": True}} if way == "remote" else {{}}
if way == "remote":
    sys.modules["modeling_llm2clip"] = None  # importing the package raises from here on
else:
    import modeling_llm2clip
from transformers import AutoModel, AutoProcessor
def load(**more):
    processor = AutoProcessor.from_pretrained("{NAME}", **given, **more)
    model = AutoModel.from_pretrained("{NAME}", **given, **more)
    return [type(model).__module__, model(**processor(text="a dog")).text_embeds[0].tolist()]
def refuse(**more):
    try:
        load(**more)
    except OSError as error:
        return str(error)
print(json.dumps([load(), load(revision=first), refuse(token=False), refuse(revision="0" * 40)]))
"""


def run_client(
    code: str, environment: dict[str, str], *arguments: object, with_package: bool = True
) -> Any:
    environment = {**environment, "PYTHONPATH": str(Path(modeling_llm2clip.__file__).parents[1])}
    if not with_package:
        del environment["PYTHONPATH"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=240, cwd=os.sep,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Published:
    """What the process that published found, and the Hub it left."""

    hub: HubServer
    answers: list[tuple[int, str, str]]
    sharded: Path
    other: Path

    @property
    def repository(self) -> Repository:
        return self.hub.repositories[NAME]

    def snapshots(self) -> list[dict[str, bytes]]:
        """The content of every commit on `main`, the oldest first."""
        return [
            {path: file.content for path, file in files.items()}
            for files in self.repository.commits.values()
        ]


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path: (folder / path).read_bytes() for path in list_files(folder)}


@pytest.fixture(scope="module")
def published(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    here = tmp_path_factory.mktemp("published")
    other = save_model(*tiny_model(seed=1), here / "other", card=STATED)
    opened = shutil.copytree(other, here / "opened")
    pushed = shutil.copytree(good, here / "source")  # pushing names the repository on its card
    with HubServer() as hub:
        hub.fail_next_uploads, hub.upload_failure_status = 1, 403
        folders = (pushed, here / "sharded", other, opened)
        answers = run_client(PRELUDE + PUBLISH, hub.environment(here / "cache"), *folders)
        yield Published(hub, answers, here / "sharded", other)


# Before anything is sent


def test_what_the_hub_calls_a_bad_request_is_explained_with_the_whole_command(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "a model"))
    (folder / "token.txt").write_text("<s>", encoding="utf-8")

    def refuse(*_: Any, **__: Any) -> None:
        # What the error reads of a response, whose class differs between versions of the client.
        response: Any = SimpleNamespace(status_code=400, headers={}, request=None)
        raise BadRequestError("the name is taken", response=response)

    assert issubclass(BadRequestError, ValueError)
    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(
        RuntimeError, match=r"was interrupted.*BadRequestError: the name is taken"
    ) as raised:
        push_to_hub(
            folder, NAME, private=False, revision="next", commit_message="New towers",
            allow_files=["token.txt"], delete_others=True,
        )  # fmt: skip
    [again] = re.findall(r"`llm2clip (push .*)`", str(raised.value))
    call = parse(LINE, shlex.split(again))
    assert call.args == (folder, NAME)
    expected = {
        "private": False, "revision": "next", "commit_message": "New towers",
        "allow_files": ("token.txt",), "delete_others": True,
    }  # fmt: skip
    assert expected.items() <= call.keywords.items()


def remove_license(folder: Path) -> None:
    card = folder / "README.md"
    card.write_text(card.read_text().replace("license: mit\n", ""), encoding="utf-8")


break_golden_embeddings = edit_json("config.json", lambda c: c.update(text_pooling="last_token"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_license, "states no license, and nothing is published without one.*--license"),
        (break_golden_embeddings, "not healthy, so it cannot be published.*golden embeddings: "),
        (remove("config.json"), "is not a model folder: it has no"),
    ],
    ids=["no license", "unhealthy", "no config"],
)
def test_a_folder_that_nobody_should_get_is_refused(
    change: Any, message: str, good: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    change(folder)
    with pytest.raises(ValueError, match=message):
        check_publishable(folder)


def test_a_given_license_is_stated_on_the_card_before_the_upload(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(good, tmp_path / "model"))
    remove_license(folder)
    weights = (folder / "model.safetensors").rename(tmp_path / "away")
    assert main(["push", str(folder), NAME]) == 2  # before anything is loaded
    assert "states no license" in capsys.readouterr().err
    weights.rename(folder / "model.safetensors")
    assert check_publishable(folder, license="cc-by-4.0")  # which writes nothing
    assert read_card_data(folder).license is None
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("reached the Hub"))
    with pytest.raises(pytest.fail.Exception, match="reached the Hub"):
        push_to_hub(folder, NAME, license="cc-by-4.0")
    assert read_card_data(folder).license == "cc-by-4.0"


def save_parts(folder: Path, _source: Path) -> None:
    for part in shared_model():  # as transformers' and sentence-transformers' trainers save them
        part.save_pretrained(folder)


def save_encoder(folder: Path, good: Path) -> None:
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(good), device="cpu").save(str(folder))


@pytest.mark.parametrize("save", [save_parts, save_encoder])
def test_a_checkpoint_of_a_trainer_is_refused_with_the_command_that_completes_it(
    save: Any, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save(tmp_path / "checkpoint 9", good)
    monkeypatch.chdir(tmp_path)
    assert main(["push", "checkpoint 9", NAME, "--license", "mit", "--dry-run"]) == 2
    [refusal] = re.findall("llm2clip push: (.*)", capsys.readouterr().err)
    assert "golden embeddings" in refusal and "licenses" in refusal
    [command] = re.findall(r"`llm2clip (export .*)`", refusal)
    assert main(["doctor", "checkpoint 9"]) == 0
    assert refusal in capsys.readouterr().out
    stand_ins = {"LICENSE": "mit", "NAME": "my-images"}
    words = [stand_ins.get(word, word) for word in shlex.split(command)]
    with pytest.warns(UserWarning, match="has no golden embeddings"):
        assert main(words) == 0
    assert main(["push", "COMPLETE", NAME, "--dry-run"]) == 0
    assert read_card_data(tmp_path / "COMPLETE").training_data == ("my-images",)


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "owner/", "owner/na me", "owner/a..b"])
def test_a_name_that_is_not_a_hub_id_is_refused(repo_id: str) -> None:
    with pytest.raises(ValueError, match=r"owner/name|repo"):
        require_repo_id(repo_id)


# One commit


def test_an_upload_that_breaks_off_shows_nothing_and_says_how_to_go_on(
    published: Published,
) -> None:
    code, _, error = published.answers[0]
    assert code == 2
    assert f"The upload to {NAME} was interrupted, and none of it is visible there" in error
    assert f"Repeat it with `llm2clip push {published.sharded} {NAME}`" in error
    by_hub, by_others, *_ = published.snapshots()
    assert set(by_hub) == {".gitattributes"}
    assert set(by_others) == {".gitattributes", *ADDED}


def test_a_repeated_upload_does_not_send_again_what_had_arrived(published: Published) -> None:
    assert published.answers[1][0] == 0
    puts = [request for request in published.hub.requests if request.startswith("PUT ")]
    assert len(puts) == len(set(puts)) == len(published.hub.objects) > 3


def test_a_push_deletes_nothing_unasked_and_never_the_evaluation_results_of_others(
    published: Published,
) -> None:
    # By the Hub, by others, the repeated upload, another model, and a branch of its own.
    *_, kept, other, branch = published.snapshots()
    assert len(published.snapshots()) == 5
    added = {path: path.encode() for path in ADDED}
    attributes = {".gitattributes": kept[".gitattributes"]}
    assert kept == attributes | added | read_folder(published.sharded)
    results = {path: added[path] for path in ADDED[:1]}
    assert other == attributes | results | read_folder(published.other)
    assert branch == attributes | results | read_folder(published.sharded)
    shas = list(published.repository.commits)
    assert published.repository.references == {"main": shas[3], "sharded": shas[4]}


def test_a_push_refuses_a_repository_of_a_lora_whose_base_would_be_loaded_instead(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, answer in {
        "create_repo": None,
        "model_info": SimpleNamespace(private=True),
        "repo_exists": True,
        "revision_exists": True,
        "list_repo_files": ["adapter_config.json", "notes.txt"],
    }.items():
        monkeypatch.setattr(HfApi, name, lambda *_, answer=answer, **__: answer)
    with pytest.raises(ValueError, match=r"another model .* folder: adapter_config\.json\."):
        push_to_hub(good, NAME)


def test_what_a_push_deletes_is_listed_before(published: Published) -> None:
    """So are its weights that loaders would mix with the new ones: they are deleted or refused."""
    refused, dry, pushed = published.answers[2:5]
    shards = [path for path in published.snapshots()[2] if path.startswith("model")]
    shards = sorted(path for path in shards if path not in read_folder(published.other))
    assert refused[0] == 2 and len(shards) > 2
    assert f"another model that are not in this folder: {', '.join(shards)}. Loaders" in refused[2]
    assert f"Nothing was uploaded to {NAME} (" in dry[1] and "model.safetensors\n" in dry[1]
    deleted = ", ".join(sorted([*shards, *ADDED[1:]]))
    for answer in (dry, pushed):
        assert answer[0] == 0 and f"Deleted from the repository: {deleted}.\n" in answer[1]


def test_the_address_ends_in_the_revision_to_pin(published: Published) -> None:
    shas = list(published.repository.commits)
    answers = [published.answers[number] for number in (1, 4, 5)]
    for answer, sha in zip(answers, shas[2:], strict=True):
        assert re.search(rf"Published http\S+/{NAME}/commit/{sha}\.", answer[1]), answer


def test_a_repository_is_private_unless_it_is_to_be_public_and_stays_so(
    published: Published,
) -> None:
    assert published.repository.private
    assert not published.hub.repositories[OPEN].private
    to_private, made, to_public = published.answers[6:9]
    assert made[0] == 0 and to_private[0] == to_public[0] == 2
    assert f"{NAME} exists and is private, not public" in to_private[2]
    assert f"{OPEN} exists and is public, not private" in to_public[2]
    assert len(published.hub.repositories[OPEN].commits) == 2


def test_a_license_that_the_hub_does_not_know_is_refused_before_the_upload(
    published: Published,
) -> None:
    """The Hub has the list, and is asked before a file is sent."""
    code, _, error = published.answers[9]
    assert code == 2 and '"license" must be one of' in error
    assert len(published.hub.repositories[OPEN].commits) == 2


def test_without_a_token_nothing_is_published_and_the_error_says_how_to_get_one(
    published: Published,
) -> None:
    assert published.hub.token not in json.dumps(published.answers)
    push, doctor = published.answers[10:]
    assert push[0] == 2
    assert "there is no valid token. Log in with `hf auth login`, or set HF_TOKEN" in push[2]
    assert doctor[0] == 1 and "is not on the Hub" in doctor[1]


# Those who pull


@pytest.mark.parametrize("way", ["remote", "package"])
def test_a_private_repository_loads_with_a_token_at_its_newest_or_pinned_revision(
    way: str, published: Published, tmp_path: Path
) -> None:
    first = list(published.repository.commits)[2]
    newest, pinned, refused, unknown = run_client(
        LOAD, published.hub.environment(tmp_path), way, first, with_package=way == "package"
    )
    assert newest[0].startswith("transformers_modules.") == (way == "remote")
    model, processor = shared_model()
    other, _ = tiny_model(seed=1)
    for found, wanted in ((newest, other), (pinned, model)):
        embedding = wanted(**processor(text="a dog")).text_embeds[0].tolist()
        # Equal weights at other addresses, whose alignment picks other kernels.
        assert found[1] == pytest.approx(embedding, abs=1e-6)
    assert newest[1] != pytest.approx(pinned[1], abs=1e-3)
    assert "private" in refused and "token" in refused
    assert "0" * 40 in unknown

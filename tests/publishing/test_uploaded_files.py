"""What leaves this machine: the folder's own files, no links out of it, no credentials."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from shared_models import shared_model

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.model_folders.model_card import CardData
from modeling_llm2clip.model_folders.model_writing import save_model, save_trained_model
from modeling_llm2clip.publishing import push_to_hub as pushing
from modeling_llm2clip.publishing.export_model import export_model
from modeling_llm2clip.publishing.push_to_hub import (
    check_publishable,
    describe_files,
    list_files,
    push_to_hub,
    require_no_credentials,
)

NAME = "owner/model"
# Made up, in the shapes of real ones.
HF_TOKEN = "hf_" + "aB3" * 12
SECRET_KEY = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
SECRETS = {
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz",
    "PEM of RSA": "x\n-----BEGIN RSA PRIVATE KEY-----\n",
    "Hugging Face": f"export HF_TOKEN={HF_TOKEN}\n",
    "at the start": HF_TOKEN,
    "AWS": "aws_access_key_id = AKIAIOSFODNN7EXAMPLE",
    "GitHub": "ghp_" + "a1B2" * 9,
    "fine-grained": "github_pat_" + "a1B2" * 20,
    "GitLab": "glpat-" + "a1B2" * 5,
    "OpenAI": 'key = "sk-proj-' + "a1B2" * 12 + '"',
    "Google": "AIza" + "a1B2c" * 7,
    "Slack": "xoxb-" + "123456789012-" * 2,
    "AWS, secret alone": "aws_secret_access_key=" + SECRET_KEY,
    "AWS, environment": f"export AWS_SECRET_ACCESS_KEY='{SECRET_KEY}'",
    "AWS, JSON": f'{{"SecretAccessKey": "{SECRET_KEY}"}}',
    "after a lot": "\n" * 2_000_000 + HF_TOKEN,
}
CREDENTIAL_NAMES = (
    "id_rsa", "id_ed25519", "server.pem", "tls.KEY", "token", "hf_token", "token.txt", "prod.env",
    "netrc", "credentials.json", "credentials", "client_secret_42.json", "secrets.json",
    "keys/deploy.p12", "service-account-prod.json", "api_key.txt", "kubeconfig",
    "passwords.csv", "password.xlsx", "secrets.ini", "new_user_credentials.csv", "api_tokens.txt",
    "hf-tokens", "access_tokens.yaml", "passwords.json",
)  # fmt: skip
HARMLESS = {
    "tokenizer.json": '{"hf_hub_download_is_a_function_with_a_long_name": 1}',
    "added_tokens.json": '{"<|im_end|>": 3}',
    "special_tokens_map.json": "{}",
    "notes.md": "task-oriented-dialogue-systems-with-vision-and-language-v2, hf_token comes from "
    "`hf auth login`, AKIA is a prefix, -----BEGIN CERTIFICATE-----, git_hash_gh",
    "keyboard.txt": "keys",
    "empty.txt": "",
    "tokens.txt": "<unk>\nthe\na",
    "special_tokens.txt": "<unk>",
    "setup.md": "aws_secret_access_key=YOUR_SECRET, secret_access_key: see AWS_SECRET_ACCESS_KEY",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy folder with a license; not to be changed."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return save_model(*shared_model(), folder, card=CardData(license="mit"))


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy of it beside a file that is nobody's business."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "passwd").write_text("root:x:0:0", encoding="utf-8")
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.fixture(autouse=True)
def without_checks_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused here is refused before the model is loaded; what passes has others' tests."""
    monkeypatch.setattr(pushing, "check_model", lambda *_, **__: SimpleNamespace(healthy=True))


# Links


def link_file(folder: Path) -> None:
    (folder / "notes.txt").symlink_to(folder.parent / "elsewhere" / "passwd")


def link_relatively(folder: Path) -> None:
    (folder / "notes.txt").symlink_to(Path("..", "elsewhere", "passwd"))


def link_deep_inside(folder: Path) -> None:
    (folder / "docs" / "more").mkdir(parents=True)
    (folder / "docs" / "more" / "a.txt").symlink_to(folder.parent / "elsewhere" / "passwd")


def link_through_another(folder: Path) -> None:
    (folder / "b.txt").symlink_to("c.txt")
    (folder / "c.txt").symlink_to(folder.parent / "elsewhere" / "passwd")


def link_folder(folder: Path) -> None:
    (folder / "assets").symlink_to(folder.parent / "elsewhere")


def link_own_folder(folder: Path) -> None:
    (folder / "docs").mkdir()
    (folder / "more").symlink_to("docs")


def link_through_a_folder(folder: Path) -> None:
    (folder / "up").symlink_to("..")
    (folder / "a.txt").symlink_to("up/elsewhere/passwd")


def link_to_what_is_hidden(folder: Path) -> None:
    (folder / ".env").write_text("secret", encoding="utf-8")
    (folder / "notes.txt").symlink_to(".env")


def link_nowhere(folder: Path) -> None:
    (folder / "notes.txt").symlink_to("gone.txt")


LINKS = {
    link_file: "notes.txt links to .*passwd, outside of the folder",
    link_relatively: "notes.txt links to .*passwd, outside",
    link_deep_inside: "docs/more/a.txt links to .*passwd, outside",
    link_through_another: "b.txt links to c.txt, outside of the folder; c.txt links to .*outside",
    link_folder: "assets links to .*elsewhere, outside",
    link_own_folder: "more links to the folder docs, whose files would be left out",
    link_through_a_folder: "a.txt links to up/elsewhere/passwd, outside",
    link_to_what_is_hidden: "notes.txt links to .env, which is hidden",
    link_nowhere: "notes.txt links to gone.txt, which is not there",
}


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.__name__)
def test_a_link_that_is_not_to_a_file_of_the_folder_is_not_pushed(
    link: Callable[[Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link(folder)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("reached the Hub"))
    for refuse in (check_publishable, lambda given: push_to_hub(given, NAME)):
        with pytest.raises(ValueError, match=LINKS[link]):
            refuse(folder)


def test_a_link_to_a_file_of_the_folder_is_pushed_as_that_file(folder: Path) -> None:
    (folder / "LICENSE.txt").write_text("MIT", encoding="utf-8")
    (folder / "LICENSE").symlink_to("LICENSE.txt")
    sizes = list_files(folder)
    assert sizes["LICENSE"] == sizes["LICENSE.txt"] == 3
    (folder.parent / "alias").symlink_to(folder)  # the folder itself may be one
    assert list_files(folder.parent / "alias") == list_files(folder)


def test_a_snapshot_in_the_hubs_cache_is_made_of_links_and_may_be_pushed_and_exported(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "LICENSE").write_text("MIT", encoding="utf-8")
    snapshot = tmp_path / "models--owner--model" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    for path in (snapshot, blobs):
        path.mkdir(parents=True)
    for number, file in enumerate(list_files(folder)):
        shutil.copy(folder / file, blobs / str(number))
        place = snapshot / file
        place.parent.mkdir(exist_ok=True, parents=True)
        place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    assert list_files(snapshot) == list_files(folder)
    new = export_model(snapshot, tmp_path / "new")
    assert (new / "LICENSE").read_text() == "MIT" and not (new / "LICENSE").is_symlink()
    (blobs / "evil").symlink_to(tmp_path / "elsewhere" / "passwd")
    (snapshot / "conversion.json").symlink_to(blobs / "evil")
    with pytest.raises(ValueError, match="outside of the folder"):
        list_files(snapshot)
    with pytest.raises(ValueError, match=r"lead out of it: conversion\.json"):
        export_model(snapshot, tmp_path / "newer")


def save_trained(source: Path, output: Path) -> object:
    return save_trained_model(source, {}, output)


def test_a_folder_that_cannot_be_listed_is_not_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, scandir = folder / "1_Pooling", os.scandir
    closed.mkdir()

    def refuse(path: str) -> object:  # in place of permissions, which do not bind root
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="1_Pooling"):
        list_files(folder)


@pytest.mark.parametrize("name", ["conversion.json", "LICENSE", "conversion_before_training.json"])
@pytest.mark.parametrize("write", [export_model, save_trained])
def test_what_a_link_leads_to_is_never_copied(
    write: Callable[[Path, Path], Any], name: str, folder: Path, tmp_path: Path
) -> None:
    (folder / name).symlink_to(tmp_path / "elsewhere" / "passwd")
    with pytest.raises(ValueError, match=f"lead out of it: {name} -> .*passwd"):
        write(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Credentials


@pytest.mark.parametrize("name", CREDENTIAL_NAMES)
def test_a_file_named_like_a_credential_is_refused_without_the_flag(
    name: str, folder: Path
) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"looks like credentials: {name} \(its name\)"):
        check_publishable(folder)
    assert name in check_publishable(folder, allow_files=[name])


@pytest.mark.parametrize("kind", SECRETS)
def test_a_file_with_a_credential_in_it_is_refused_whatever_its_name(
    kind: str, folder: Path
) -> None:
    (folder / "setup.py").write_text(SECRETS[kind], encoding="utf-8")
    with pytest.raises(ValueError, match=r"looks like credentials: setup.py \(an? ") as raised:
        check_publishable(folder)
    assert HF_TOKEN not in str(raised.value)  # nor is it shown


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_credential_is_found_in_files_of_windows_too(encoding: str, folder: Path) -> None:
    (folder / "setup.txt").write_text(f"token: {HF_TOKEN}\n", encoding=encoding)
    with pytest.raises(ValueError, match=r"looks like credentials: setup.txt \(a token"):
        check_publishable(folder)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_resembles_a_credential_is_none(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(HARMLESS[name], encoding="utf-8")
    require_no_credentials(tmp_path, list_files(tmp_path))


def test_a_file_is_allowed_by_its_path_alone(folder: Path) -> None:
    (folder / "token").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"allow_files=\['tokens'\].*no such files"):
        check_publishable(folder, allow_files=["tokens"])
    (folder / "id_rsa").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"credentials: id_rsa \(its name\)\. Remove"):
        check_publishable(folder, allow_files=["token"])


@pytest.mark.parametrize("suffix", [".bin", ".PT", ".Pkl"])
def test_a_pickle_is_refused_however_it_is_spelled(suffix: str, folder: Path) -> None:
    (folder / f"old{suffix}").touch()
    with pytest.raises(ValueError, match="can carry code"):
        check_publishable(folder)


# The list


def test_everything_is_shown_with_its_size_before_anything_is_sent(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("reached the Hub"))
    with pytest.raises(pytest.fail.Exception, match="reached the Hub"):
        push_to_hub(folder, NAME, license="apache-2.0")
    shown = capsys.readouterr().out
    # With the card that was just written: what is shown is what is sent.
    assert shown == describe_files(list_files(folder)) + "\n"
    assert f"{(folder / 'README.md').stat().st_size:>15,}  README.md\n" in shown
    assert "              4  notes.txt\n" in shown
    assert "Not of the model, but in its folder: notes.txt." in shown
    with pytest.raises(RuntimeError, match="stop"):  # a caller may stop it there

        def stop(_: str) -> None:
            raise RuntimeError("stop")

        push_to_hub(folder, NAME, show=stop)


def test_the_command_shows_the_list_and_takes_the_flag(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "token").write_text("x", encoding="utf-8")
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("reached the Hub"))
    assert main(["push", str(folder), NAME]) == 2
    assert "token (its name). Remove them" in capsys.readouterr().err
    with pytest.raises(pytest.fail.Exception, match="reached the Hub"):
        main(["push", str(folder), NAME, "--allow-files", "token"])
    assert "              1  token\n" in capsys.readouterr().out

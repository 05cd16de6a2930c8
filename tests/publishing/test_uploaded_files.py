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

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.model_folders.model_writing import save_trained_model
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


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of it beside a file that is nobody's business."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "passwd").write_text("root:x:0:0", encoding="utf-8")
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.fixture(autouse=True)
def without_checks_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused here is refused before the model is loaded; what passes has others' tests."""
    monkeypatch.setattr(pushing, "check_model", lambda *_, **__: SimpleNamespace(healthy=True))


# Links


# Links by their names and targets, and the refusal. `elsewhere` is beside the model folder.
LINKS: dict[str, tuple[dict[str, str], str]] = {
    "a file": (
        {"notes.txt": "{root}/elsewhere/passwd"},
        "notes.txt links to .*passwd",
    ),
    "relative": ({"notes.txt": "../elsewhere/passwd"}, "notes.txt links to .*passwd"),
    "deep inside": (
        {"docs/more/a.txt": "{root}/elsewhere/passwd"}, "docs/more/a.txt links to .*passwd"
    ),
    "through another": (
        {"b.txt": "c.txt", "c.txt": "{root}/elsewhere/passwd"},
        "b.txt links to c.txt; c.txt links to .*",
    ),
    "a folder": ({"assets": "{root}/elsewhere"}, "assets links to .*elsewhere"),
    "an own folder": (
        {"more": "1_Pooling"}, "more links to 1_Pooling"
    ),
    "through a folder": (
        {"up": "..", "a.txt": "up/elsewhere/passwd"},
        "a.txt links to up/elsewhere/passwd",
    ),
    "a hidden file": ({"notes.txt": ".env"}, "notes.txt links to .env"),
    "nowhere": ({"notes.txt": "gone.txt"}, "notes.txt links to gone.txt"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_is_not_to_a_file_of_the_folder_is_not_pushed(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links, error = LINKS[name]
    (folder / ".env").write_text("secret", encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    for place, target in links.items():
        (folder / place).parent.mkdir(exist_ok=True, parents=True)
        (folder / place).symlink_to(target.format(root=folder.parent))
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("reached the Hub"))
    for refuse in (check_publishable, lambda given: push_to_hub(given, NAME)):
        with pytest.raises(ValueError, match=error):
            refuse(folder)


def test_a_link_to_a_file_of_the_folder_is_pushed_as_that_file(folder: Path) -> None:
    (folder / "LICENSE.txt").write_text("MIT", encoding="utf-8")
    (folder / "LICENSE").symlink_to("LICENSE.txt")
    (folder / ".env").write_text("secret", encoding="utf-8")  # hidden files stay at home
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret", encoding="utf-8")
    sizes = list_files(folder)
    assert not any("/." in f"/{name}" for name in sizes)
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
    with pytest.raises(ValueError, match=r"conversion\.json links to .*evil"):
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


def check_credentials(folder: Path, name: str, content: str, encoding: str = "utf-8") -> None:
    """Put a file alone into a folder, and look for credentials there."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(content, encoding=encoding)
    require_no_credentials(folder, list_files(folder))


def test_a_file_named_like_a_credential_is_refused_without_the_flag(
    folder: Path, tmp_path: Path
) -> None:
    for name in CREDENTIAL_NAMES:
        with pytest.raises(ValueError, match=rf"look like credentials: {name} \(its name\)"):
            check_credentials(tmp_path / "alone", name, "x")
    (folder / "token").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"look like credentials: token \(its name\)"):
        check_publishable(folder)
    assert "token" in check_publishable(folder, allow_files=["token"])


@pytest.mark.parametrize("kind", SECRETS)
def test_a_file_with_a_credential_in_it_is_refused_whatever_its_name(
    kind: str, tmp_path: Path
) -> None:
    error = r"look like credentials: setup.py \(an? "
    of_windows = ["utf-16", "utf-16-le", "utf-16-be"] if kind == "Hugging Face" else []
    for encoding in ("utf-8", *of_windows):
        with pytest.raises(ValueError, match=error) as raised:
            check_credentials(tmp_path / "alone", "setup.py", SECRETS[kind], encoding)
        assert HF_TOKEN not in str(raised.value)  # nor is it shown


def test_what_only_resembles_a_credential_is_none(tmp_path: Path) -> None:
    for name, content in HARMLESS.items():
        check_credentials(tmp_path / "alone", name, content)


def test_a_file_is_allowed_by_its_path_alone(folder: Path) -> None:
    (folder / "token").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"allow_files=\['tokens'\].*no such files"):
        check_publishable(folder, allow_files=["tokens"])
    (folder / "id_rsa").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"credentials: id_rsa \(its name\)\. Remove"):
        check_publishable(folder, allow_files=["token"])


def test_a_pickle_is_refused_however_it_is_spelled(folder: Path) -> None:
    for name in ("old.bin", "old.PT", "old.Pkl"):
        (folder / name).touch()
        with pytest.raises(ValueError, match=rf"can contain code: \['{name}'\]"):
            check_publishable(folder)
        (folder / name).unlink()


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
    assert "Other files in the folder, not part of the model: notes.txt." in shown
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

"""The tables of an index: what is found by content, what a filter escapes, where they may be."""

from __future__ import annotations

import warnings
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from breaking import set_config
from indexes import add_rows, build, make_database, make_embeddings, save_images, save_model
from shared_models import shared_model

from modeling_llm2clip import LLM2CLIPVisionModel
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.search.index_about import IndexUnavailableError
from modeling_llm2clip.search.index_database import (
    IndexDatabase,
    _find_storage_options,
)

pytestmark = pytest.mark.usefixtures("own_cache")


def test_more_values_than_a_filter_may_have_are_found_in_parts(tmp_path: Path) -> None:
    embeddings = make_embeddings(1200)
    database = make_database(tmp_path / "index", embeddings)
    names = [f"{row:06d}.png" for row in range(1200)]
    found = database.find_by_digest([*names, "not there"])
    assert set(found) == set(names)
    for row in (0, 499, 500, 1199):
        assert np.array_equal(found[names[row]]["embedding"], embeddings[row])
        assert found[names[row]]["width"] == row
    database.remove(names[:1100])
    assert database.count() == 100 and database.count("width >= 1150") == 50
    assert database.find_by_digest([]) == {}


def test_a_row_of_the_same_path_is_replaced(tmp_path: Path) -> None:
    database = make_database(tmp_path / "index", make_embeddings(20))
    add_rows(database, make_embeddings(10, seed=9), first=15)
    assert database.count() == 25
    (row,) = database.search(make_embeddings(10, seed=9)[2], top_k=1)
    assert row["path"] == "000017.png" and row["cosine"] == pytest.approx(1, abs=1e-6)


def test_what_another_process_adds_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_llm2clip.search.index_database._SEEN_AFTER_S", 0)
    writer = make_database(tmp_path / "index", make_embeddings(20))
    reader = IndexDatabase(tmp_path / "index")
    add_rows(writer, make_embeddings(5, seed=1), first=20)
    assert reader.count() == 25
    writer.optimize()
    assert len(reader.search(make_embeddings(1)[0], top_k=30)) == 25


@pytest.mark.parametrize("damage", ["embedding", "stat"])
def test_rows_with_a_flipped_bit_are_refused_by_all_readers(damage: str, tmp_path: Path) -> None:
    embeddings = make_embeddings(20)
    make_database(tmp_path / "index", embeddings)
    (file,) = (tmp_path / "index" / "images.lance" / "data").iterdir()
    content = bytearray(file.read_bytes())
    damaged = embeddings[7].tobytes() if damage == "embedding" else b"000007.png"
    content[content.rindex(damaged)] ^= 4  # `stat` is the last of the columns of these names
    file.write_bytes(content)
    database = IndexDatabase(tmp_path / "index")
    for read in (
        lambda: database.search(embeddings[7], top_k=1),
        lambda: list(database.iterate_embeddings()),
        lambda: database.find_by_digest(["000007.png"]),
    ):
        with pytest.raises(
            IndexUnavailableError, match=r"index cannot be read: damaged rows.*CRC-32.*000007\.png"
        ):
            read()


def test_a_panic_of_the_database_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged bytes make LanceDB's decoder panic, which no exported class describes."""
    database = make_database(tmp_path / "index", make_embeddings(2))
    panic = type("RustPanic", (Exception,), {})

    def read(*_: object) -> None:
        raise panic("rust future panicked: unknown error")

    monkeypatch.setattr(database._table, "search", read)
    with pytest.raises(
        IndexUnavailableError, match=r"cannot be read: rust future panicked.*remove"
    ):
        list(database.iterate(["path"]))
    panic.__name__ = "AnotherError"
    with pytest.raises(panic):
        list(database.iterate(["path"]))


@pytest.mark.parametrize(
    ("location", "endpoint", "wanted"),
    [
        ("s3://b/i", "http://[::1]:9", {"endpoint": "http://[::1]:9", "allow_http": "true"}),
        ("s3://b/i", "https://a.b", {"endpoint": "https://a.b", "allow_http": "false"}),
        ("s3://b/i", "", None),
        ("gs://b/i", "http://127.0.0.1:9", None),
        ("folder", "http://127.0.0.1:9", None),
    ],
)  # fmt: skip
def test_another_s3_than_amazons_is_found_by_its_environment_variable(
    location: str, endpoint: str, wanted: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert _find_storage_options(location) == wanted


def test_the_command_says_what_it_did_and_how_to_search(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, images = save_model(tmp_path / "model"), save_images(tmp_path / "images", count=6)
    (images / "broken.png").write_bytes(b"no image")
    path = tmp_path / "index"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["index", str(model), str(images), str(path)]) == 0
    shown = capfd.readouterr()
    assert shown.out == "" and "WARN" not in shown.err  # nor what LanceDB logs
    assert "6 images: 6 new, 0 changed, 0 unchanged; 0 removed. Encoded 6." in shown.err
    assert f"Not in the index: 1 unreadable image:\n{images / 'broken.png'}" in shown.err
    assert f'6 images in {path}. Search: llm2clip search {path} "a dog"' in shown.err


def test_a_command_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    model, images = save_model(tmp_path / "model"), save_images(tmp_path / "images", count=2)
    monkeypatch.setattr("modeling_llm2clip.search.index_update.encode_readable_images", stop)
    assert main(["index", str(model), str(images), str(tmp_path / "index")]) == 130
    assert "Run the same call to continue" in capsys.readouterr().err
    monkeypatch.undo()
    assert len(build(model, images, tmp_path / "index")[0]) == 2


def test_a_model_that_cannot_search_is_refused(tmp_path: Path) -> None:
    folder, part = save_model(tmp_path / "model"), tmp_path / "part"
    images = save_images(tmp_path / "images", count=2)
    LLM2CLIPVisionModel.from_pretrained(folder).save_pretrained(part)
    shared_model()[1].save_pretrained(part)
    with pytest.raises(ValueError, match="LLM2CLIPVisionModel, but search needs both towers"):
        build(part, images, tmp_path / "index")
    set_config(random_heads=["text_projection"])(folder)
    with pytest.raises(ValueError, match=r"refused for search: it is untrained"):
        build(folder, images, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_a_damaged_description_is_refused(tmp_path: Path) -> None:
    about = make_database(tmp_path / "db", make_embeddings(3)).about
    rows = pa.table({"content": [about.seal().replace("made", "mAde")]})
    lancedb.connect(tmp_path / "db").create_table("about", data=rows, mode="overwrite")
    with pytest.raises(ValueError, match=r"db is damaged: .*about.* has the SHA-256"):
        IndexDatabase(tmp_path / "db")

"""Searching an index over HTTP finds what the index itself finds."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_apps import run_app, save_searched, send, to_data_url
from shared_models import ROUNDING
from tiny import draw_noise
from tiny_folders import export_tiny_model

from modeling_llm2clip import ImageIndex
from modeling_llm2clip.configs.encoding_config import IndexConfig
from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.serving.app import create_app
from modeling_llm2clip.serving.demo_page import DemoPage
from modeling_llm2clip.serving.json_bodies import JsonResponse
from modeling_llm2clip.serving.service import EmbeddingService
from modeling_llm2clip.serving.service_results import RequestError

pytest.importorskip("lancedb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = {f"{n}.png": draw_noise(30 + n, 40, seed=n) for n in range(6)}
    return save_searched(tmp_path_factory.mktemp("search"), images)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny_model(tmp_path_factory.mktemp("other") / "model", vision="siglip")


def open_service(folder: Path, database: Path | None = None) -> EmbeddingService:
    config = ServeConfig(device="cpu")
    return EmbeddingService.open(folder / "model", config, index=str(database or folder / "db"))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with run_app(create_app(open_service(folder))) as address:
        yield address


def search(url: str, body: Any) -> tuple[int, Any]:
    return send(f"{url}/v1/search", body)[:2]


def test_hits_are_those_of_the_index(url: str, folder: Path) -> None:
    image = folder / "images" / "3.png"
    queries = ["a dog", {"image": to_data_url(image.read_bytes())}]
    status, answer = search(url, {"queries": queries, "top_k": 3})
    assert status == 200, answer
    expected = ImageIndex.open(folder / "db").search(["a dog", image], top_k=3)
    for row, result in zip(answer["data"], expected, strict=True):
        assert [hit["path"] for hit in row["hits"]] == [path.name for path, _ in result.hits]
        for hit, (_, cosine) in zip(row["hits"], result.hits, strict=True):
            assert hit["cosine"] == pytest.approx(cosine, abs=ROUNDING)
    assert answer["data"][1]["hits"][0]["path"] == "3.png"
    assert answer["data"][1]["hits"][0]["height"] == 33


def test_a_list_is_one_query_as_in_python(url: str, folder: Path) -> None:
    image = folder / "images" / "3.png"
    item = {"image": to_data_url(image.read_bytes())}
    long = "the sea at night " * 40
    body = {"queries": [["a dog", item, {"text": "at night"}], item, [long, item], ["a dog"]]}
    status, answer = search(url, {**body, "top_k": 6})
    assert status == 200, answer
    queries: list[Any] = [["a dog", image, "at night"], image, [long, image], "a dog"]
    expected = ImageIndex.open(folder / "db").search(queries, top_k=6)
    assert [row["index"] for row in answer["data"]] == [0, 1, 2, 3]
    for row, result in zip(answer["data"], expected, strict=True):
        cosines = {hit["path"]: hit["cosine"] for hit in row["hits"]}
        expected_cosines = {path.name: cosine for path, cosine in result.hits}
        assert cosines == pytest.approx(expected_cosines, abs=ROUNDING)
    assert answer["truncated"] == [2]
    refused: dict[str, list[Any]] = {
        "queries.0": [[]], "queries.0.1": [["a", ["b"]]], "queries.1.1": ["a", ["a", " "]],
    }  # fmt: skip
    for param, queries in refused.items():
        status, answer = search(url, {"queries": queries})
        assert (status, answer["error"]["param"]) == (400, param)


def test_negatives_and_a_threshold_find_what_they_find_in_python_and_on_the_page(
    url: str, folder: Path
) -> None:
    image = folder / "images" / "3.png"
    item = {"image": to_data_url(image.read_bytes())}
    index = ImageIndex.open(folder / "db")
    queries: list[Any] = ["a dog", ["at night", image]]
    sent = ["a dog", ["at night", item]]
    for negative, given in (("a cat", "a cat"), (["a cat", image], ["a cat", item])):
        hits = index.search("a dog", negative=negative).hits
        threshold = (hits[2][1] + hits[3][1]) / 2
        body = {"queries": sent, "negative": given, "threshold": threshold}
        status, answer = search(url, body)
        assert status == 200, answer
        expected = index.search(queries, negative=negative, threshold=threshold)
        assert len(expected[0].hits) == 3
        for row, result in zip(answer["data"], expected, strict=True):
            assert [hit["path"] for hit in row["hits"]] == [path.name for path, _ in result.hits]
            cosines = [cosine for _, cosine in result.hits]
            assert [hit["cosine"] for hit in row["hits"]] == pytest.approx(cosines, abs=ROUNDING)
            assert row["best_cosine"] == pytest.approx(result.best_cosine, abs=ROUNDING)
    page = DemoPage(service := open_service(folder))
    threshold = index.search("a dog", negative="a cat").hits[3][1] - ROUNDING
    shown, summary = asyncio.run(page.search("a dog", None, "a cat", 12, threshold, None))
    nothing, note = asyncio.run(page.search("a dog", None, " ", 12, 1, None))
    service.close()
    found = index.search("a dog", negative="a cat", threshold=threshold)
    assert re.findall(r'"cosine">([\d.-]+)<.*?"name">(.*?)<', shown) == [
        (f"{cosine:.3f}", path.name) for path, cosine in found.hits
    ]
    assert summary == "4 of 6 images, best first."
    assert "<li>" not in nothing and note == index.search("a dog", threshold=1).note


def test_a_truncated_negative_is_reported_for_every_query_and_a_wrong_one_refused(
    url: str,
) -> None:
    long = "the sea at night " * 40
    body = {"queries": ["a dog", "a cat"]}
    assert search(url, {**body, "negative": ["people", long]})[1]["truncated"] == [0, 1]
    assert search(url, {**body, "negative": "people"})[1]["truncated"] == []
    for field, value in (("negative", []), ("negative", " "), ("negative", None), ("threshold", 2)):
        status, answer = search(url, {**body, field: value})
        assert (status, answer["error"]["param"]) == (400, field)


def test_a_filter_is_applied_and_a_broken_one_refused(url: str) -> None:
    status, answer = search(url, {"queries": ["a dog"], "where": "height >= 34"})
    assert status == 200
    assert {hit["path"] for hit in answer["data"][0]["hits"]} == {"4.png", "5.png"}
    deep = "height > " + "1+" * 3000 + "1"  # overflows the stack of LanceDB's parser
    for where in ("height >=", "nothing = 3", "1; drop table images", "height > 1 LIMIT 1", deep):
        status, answer = search(url, {"queries": ["a dog"], "where": where})
        assert status == 400, answer
        assert "The columns are path" in answer["error"]["message"]
        assert answer["error"]["param"] == "where"


def test_only_the_error_of_a_filter_is_named_as_such(folder: Path) -> None:
    service = open_service(folder)
    try:
        for top_k, where, param in ((0, "height > 3", None), (1, "height >", "where")):
            with pytest.raises(RequestError) as refused:
                asyncio.run(service.search(["a dog"], top_k=top_k, where=where))
            assert refused.value.param == param
    finally:
        service.close()


def read_health(url: str) -> Any:
    return send(f"{url}/health")[1]


def test_an_index_that_is_gone_fails_searches_alone_until_it_is_back(
    folder: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling_llm2clip.search.index_database._SEEN_AFTER_S", 0)
    ImageIndex.build(other, folder / "images", tmp_path / "new", IndexConfig(show_progress=False))
    database = Path(shutil.copytree(folder / "db", tmp_path / "db"))
    with run_app(create_app(open_service(folder, database))) as url:
        assert search(url, {"queries": ["a dog"]})[0] == 200
        health = read_health(url)
        assert (health["status"], health["num_images"]) == ("ok", 6)
        for replacement, message in (
            (None, "no such database"),
            (tmp_path / "new", "whose embeddings differ"),
        ):
            shutil.rmtree(database, ignore_errors=True)
            if replacement is not None:
                shutil.copytree(replacement, database)
            status, answer = search(url, {"queries": ["a dog"]})
            assert (status, answer["error"]["code"]) == (503, "index_unavailable")
            assert message in answer["error"]["message"]
            health = read_health(url)
            assert health["status"] == "degraded" and message in health["index_error"]
            assert health["num_images"] is None
            assert health["working_routes"] == [
                "/v1/embeddings",
                "/v2/embed",
                "/api/embed",
                "/predict",
                "/v1/classify",
            ]
        shutil.rmtree(database)
        shutil.copytree(folder / "db", database)
        assert search(url, {"queries": ["a dog"]})[0] == 200
        assert "/v1/search" in read_health(url)["working_routes"]


def test_an_index_of_another_model_is_refused(folder: Path, other: Path) -> None:
    with pytest.raises(ValueError, match=r"the embeddings of .* differ"):
        EmbeddingService.open(other, ServeConfig(device="cpu"), index=str(folder / "db"))


def test_a_search_asks_for_a_bounded_number_of_images(url: str) -> None:
    status, answer = search(url, {"queries": ["a dog"] * 400, "top_k": 800})
    assert status == 400
    assert "400 queries would return 320,000 results" in answer["error"]["message"]


def test_responses_are_written_outside_of_the_event_loop(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    render, threads = JsonResponse.render, []

    def note_thread(response: JsonResponse, content: Any) -> bytes:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            threads.append("worker")
        else:
            threads.append("event loop")
        return render(response, content)

    monkeypatch.setattr(JsonResponse, "render", note_thread)
    assert search(url, {"queries": ["a dog"]})[0] == 200
    assert send(f"{url}/v1/embeddings", {"input": ["a dog"]})[0] == 200
    assert send(f"{url}/v2/embed", {"texts": ["a dog"]})[0] == 200
    assert threads == ["worker"] * 3

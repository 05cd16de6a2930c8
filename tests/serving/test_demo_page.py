"""The page at `/`, in a real browser, and what it lets nobody do."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browsing import WIDTHS, Visit, measure_hits, needs_browser, open_browser
from served_apps import run_app, save_searched
from tiny import draw_noise

from modeling_llm2clip.configs.serve_config import API_KEY_VARIABLE, ServeConfig
from modeling_llm2clip.encoding.encode import encode_images, encode_texts
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.search.image_index import ImageIndex
from modeling_llm2clip.serving.app import create_app
from modeling_llm2clip.serving.demo_page import add_demo_page, encode_thumbnail
from modeling_llm2clip.serving.service import EmbeddingService

NUM_IMAGES = 15
# On a phone, from the top.
BLOCKS = ["query", "search-button", "hits-note", "hits", "query-image", "more"]
ODD_NAMES = [
    "archive/scans of 1998/originals/box 17/negatives and slides/unsorted.png",
    f"{'a_name_without_a_space_' * 9}.png",
    "写真/東京/夜の街並み.png",
    '<b>${value}<!-- {{value}} &amp; "x".png',
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    numbers = range(NUM_IMAGES)
    images = {f"{'sub/' * (n % 2)}number {n}.png": draw_noise(seed=n) for n in numbers}
    return save_searched(tmp_path_factory.mktemp("page"), images, model="model_1")


@pytest.fixture(scope="module")
def odd_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and an index of images in deep folders with odd names."""
    names = [*ODD_NAMES, *(f"{number}.png" for number in range(len(ODD_NAMES), 12))]
    images = {name: draw_noise(40 + 20 * n, 200, seed=n) for n, name in enumerate(names)}
    return save_searched(tmp_path_factory.mktemp("odd"), images, model="model_1")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serve(folder) as address:
        yield address


def serve(folder: Path, *, index: bool = True, **limits: Any) -> Any:
    """Serve model and index with the page; closes the service at its end."""
    service = EmbeddingService.open(
        folder / "model_1",
        ServeConfig(device="cpu", **limits),
        index=str(folder / "db") if index else None,
    )
    return run_app(create_app(service, page=add_demo_page))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


def read_captions(visit: Visit, *, count: int) -> list[str]:
    """Wait for this many hits, whose images are loaded; returns their captions."""
    hits = visit.page.locator("#hits li")
    hits.nth(count - 1).wait_for()
    assert hits.count() == count
    visit.page.wait_for_function(
        "[...document.querySelectorAll('#hits img')].every((i) => i.naturalWidth > 0)"
    )
    texts = visit.page.locator("#hits .caption").all_text_contents()  # as they are without styles
    return [" ".join(text.split()) for text in texts]


def describe(result: Any, root: Path) -> list[str]:
    return [
        f"{rank}. {cosine:.3f} {path.relative_to(root.resolve()).as_posix()}"
        for rank, (path, cosine) in enumerate(result.hits, start=1)
    ]


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", ["desktop", "phone"])
def test_texts_and_images_show_the_images_of_the_index_in_their_order(
    width: str, browser: Any, url: str, folder: Path
) -> None:
    index = ImageIndex.open(folder / "db", model=folder / "model_1")
    image = folder / "images" / "sub" / "number 3.png"
    queries: list[Any] = ["two red apples", ["two red apples", image], image]
    text, both, alone = (
        describe(result, folder / "images") for result in index.search(queries, top_k=12)
    )
    with Visit(browser, url, width=width) as visit:
        visit.fill("query", "two red apples")
        visit.press("search-button")
        assert read_captions(visit, count=12) == text
        assert "12 of 15 images" in visit.page.locator("#hits-note").inner_text()
        assert not visit.overflows()
    with Visit(browser, url, width=width) as visit:
        visit.drop("query-image", image)
        assert read_captions(visit, count=12) == alone
        assert alone[0] == "1. 1.000 sub/number 3.png"
    with Visit(browser, url, width=width) as visit:
        visit.fill("query", "two red apples")
        visit.drop("query-image", image)
        assert read_captions(visit, count=12) == both


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_the_best_hit_is_on_the_first_screen_and_no_caption_covers_an_image(
    width: str, browser: Any, odd_names: Path
) -> None:
    with serve(odd_names) as address, Visit(browser, address, width=width) as visit:
        assert not visit.overflows()
        heading = visit.page.locator("#heading").inner_text()
        assert "model_1 · 12 images to search" in heading
        visit.fill("query", "two red apples")
        visit.press("search-button")
        captions = read_captions(visit, count=12)
        found = measure_hits(visit.page)
        assert found["top"] + 100 < visit.height, found  # so that the image is seen, not an edge
        if width == "phone":  # text, button, hits; the other ways to search are below
            places = {name: visit.page.locator(f"#{name}").bounding_box() for name in BLOCKS}
            assert sorted(places, key=lambda name: places[name]["y"]) == BLOCKS, places
        assert found["covering"] == found["narrow"] == 0
        assert abs(found["unused"]) < 1  # a pixel is rounded
        assert not visit.overflows()
        titles = [link.get_attribute("title") for link in visit.page.locator("#hits a").all()]
    # Whole names are there, whatever Gradio and HTML would make of them.
    assert {name for caption in captions for name in ODD_NAMES if caption.endswith(name)} == {
        *ODD_NAMES
    }
    assert {*ODD_NAMES} <= {*titles}


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", ["desktop", "phone"])
def test_a_dropped_image_gets_labels(width: str, browser: Any, url: str, folder: Path) -> None:
    file = folder / "images" / "number 6.png"
    names = ["cat", "dog", "owl"]
    model, processor = load_model(folder / "model_1", device="cpu")
    texts = encode_texts(model, processor, [f"a drawing of a {name}" for name in names])
    with torch.inference_mode():
        logits = model.logit_scale() * encode_images(model, processor, [str(file)]) @ texts.T
    wanted = dict(zip(names, logits.softmax(-1)[0].tolist(), strict=True))
    with Visit(browser, url, width=width) as visit:
        visit.page.get_by_role("tab", name="Classify").click()
        scores = visit.page.locator("#scores")
        visit.drop("image", file)
        scores.get_by_text("plant").first.wait_for()  # one of the labels that the page begins with
        visit.fill("labels", "cat, dog\nowl")
        visit.fill("template", "a drawing of a {}")
        visit.press("classify-button")
        scores.get_by_text("owl").first.wait_for()
        shown = scores.inner_text().split()[1:]  # without its heading
        assert not visit.overflows()
    assert {f"{share:.0%}" for share in wanted.values()} <= {*shown}, wanted
    found = {name: shown[shown.index(f"{share:.0%}") - 1] for name, share in wanted.items()}
    assert found == dict.fromkeys(names) | {name: name for name in names}
    assert shown[0] == max(wanted, key=lambda name: wanted[name])


@needs_browser
@pytest.mark.slow
def test_errors_are_shown(browser: Any, url: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n<b>nothing</b>")
    with Visit(browser, url) as visit:
        visit.press("search-button")
        assert "Describe what to look for" in visit.read_error()
        visit.drop("query-image", broken)
        assert "image in the request" in visit.read_error()
        visit.page.get_by_role("button", name="More").click()
        visit.fill("filter", "nothing = <i>1</i>")
        visit.fill("query", "a dog")
        visit.page.get_by_label("Remove Image").or_(visit.page.get_by_label("Clear")).first.click()
        visit.press("search-button")
        assert "nothing = <i>1</i>" in visit.read_error()  # as text, not as HTML
        visit.page.get_by_role("tab", name="Classify").click()
        visit.press("classify-button")
        assert "Drop an image first" in visit.read_error()


@needs_browser
@pytest.mark.slow
def test_images_that_are_gone_are_counted(browser: Any, folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "images"
    moved.mkdir()
    for number in range(3):
        draw_noise(seed=100 + number).save(moved / f"{number}.png")
    (tmp_path / "model_1").symlink_to(folder / "model_1")
    ImageIndex.build(folder / "model_1", moved, tmp_path / "db")
    (moved / "1.png").unlink()
    with serve(tmp_path) as address, Visit(browser, address) as visit:
        visit.fill("query", "a dog")
        visit.press("search-button")
        assert len(read_captions(visit, count=2)) == 2
        assert "1 cannot be shown" in visit.page.locator("#hits-note").inner_text()


@needs_browser
@pytest.mark.slow
def test_without_an_index_there_is_no_search(browser: Any, folder: Path) -> None:
    with serve(folder, index=False) as address, Visit(browser, address) as visit:
        tabs = visit.page.get_by_role("tab").all_inner_texts()
        assert tabs == ["Classify", "API"]
        visit.page.get_by_role("tab", name="API").click()
        with visit.context.expect_page() as opened:
            visit.page.get_by_role("link", name="OpenAPI").click()
        opened.value.wait_for_url("**/openapi.json")


@needs_browser
@pytest.mark.slow
def test_a_server_with_a_key_asks_for_it(
    browser: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    credentials = {"username": "any", "password": "secret"}
    with serve(folder) as address:
        assert fetch(address)[0] == 401
        assert fetch(f"{address}/gradio_api/queue/data?session_hash=a")[0] == 401
        with Visit(browser, address, http_credentials=credentials) as visit:
            visit.fill("query", "a dog")
            visit.press("search-button")
            assert len(read_captions(visit, count=12)) == 12


def fetch(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def call(url: str, function: int, data: list[Any]) -> dict[str, Any]:
    """Call a function of the page as its scripts do; returns the last event."""
    body = {"fn_index": function, "data": data, "session_hash": "test"}
    content_type = {"Content-Type": "application/json"}
    status, answer = fetch(
        f"{url}/gradio_api/queue/join", json.dumps(body).encode(), **content_type
    )
    assert status == 200, answer
    _, events = fetch(f"{url}/gradio_api/queue/data?session_hash=test")
    lines = [json.loads(line[5:]) for line in events.decode().splitlines() if line[:5] == "data:"]
    return next(event for event in lines if event["msg"] == "process_completed")


def upload(url: str, content: bytes, name: str = "a.png") -> tuple[int, Any]:
    boundary = "xxxx"
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode() + content + f"\r\n--{boundary}--\r\n".encode()  # fmt: skip
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    status, answer = fetch(f"{url}/gradio_api/upload", body, **kind)
    return status, json.loads(answer) if status == 200 else answer


def as_file(path: str, **fields: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **fields}


SEARCH = 0


def test_the_functions_of_the_page_answer_over_http(url: str, folder: Path) -> None:
    content = (folder / "images" / "number 2.png").read_bytes()
    _, (path,) = upload(url, content)
    found = call(url, SEARCH, [None, as_file(path), None, 3, None, None])
    assert found["success"], found
    hits = found["output"]["data"][0]
    assert re.sub("<[^>]+>", "", hits).split()[:2] == ["1.", "1.000"]
    # The page shows a small copy of a hit, and names no file of the machine.
    copies = re.findall('<img alt="" src="data:image/jpeg;base64,([^"]+)"', hits)
    assert [base64.b64decode(copy)[:3] for copy in copies] == [b"\xff\xd8\xff"] * 3
    assert "file=" not in hits


@pytest.mark.parametrize("name", ["/etc/passwd", "images/number 2.png"])
def test_no_file_of_the_machine_is_served(name: str, url: str, folder: Path) -> None:
    path = str(folder / name)  # or the absolute name
    status, content = fetch(f"{url}/gradio_api/file={urllib.request.quote(path)}")
    assert status in (403, 404), content
    # Nor copied to where files are served, in place of an image or of any other input.
    for data in (
        [None, as_file(path), None, 3, None, None],
        [as_file(path), None, None, 3, None, None],
        ["a dog", None, as_file(path), 3, None, None],
        ["a dog", None, None, 3, None, as_file(path)],
        ["a dog", None, None, [as_file(path)], None, None],
        ["a dog", None, None, 3, [as_file(path)], None],
    ):
        found = call(url, SEARCH, data)
        assert not found["success"]
        assert "not an upload" in found["output"]["error"]
    data_url = f"data:image/png;base64,{base64.b64encode(b'not an image').decode()}"
    files = (path, {"path": path}, {"path": path, "url": path}, [path], as_file("", url=data_url))
    for image in files:
        assert not call(url, SEARCH, [None, image, None, 3, None, None])["success"]


def test_no_address_is_fetched(url: str) -> None:
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/a.png"
        for file in (as_file(address), as_file(address, url=address), as_file("", url=address)):
            for data in (
                [None, file, None, 3, None, None],
                ["a dog", None, file, 3, None, None],
                ["a dog", None, None, 3, None, file],
            ):
                assert not call(url, SEARCH, data)["success"]
        assert fetch(f"{url}/gradio_api/file={address}")[0] in (302, 307, 403, 404)
        fetch(f"{url}/gradio_api/proxy={address}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert asked in ([], ["/a.png"])  # of our own client, which follows a redirect


@pytest.mark.parametrize("data", [[7, None, 8, "x", "y", 3], [None], [{}, [], {}, {}, {}, {}], []])
def test_rubbish_is_an_error_and_the_page_lives_on(data: list[Any], url: str) -> None:
    assert not call(url, SEARCH, data)["success"]
    assert call(url, SEARCH, ["a dog", None, None, 3, None, None])["success"]


def test_the_api_keeps_its_errors_beside_the_page(url: str) -> None:
    for path, status in (("/v1/nothing", 404), ("/v1/embeddings", 405), ("/v2/nothing", 404)):
        found, content = fetch(url + path)
        assert (found, list(json.loads(content))) == (status, ["error"])
    assert fetch(f"{url}/docs")[0] == fetch(f"{url}/health")[0] == 200


def test_uploads_and_requests_of_the_page_have_limits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServeConfig, "max_pending_mb", 0.2)
    with serve(folder, max_image_mb=0.05, max_request_mb=0.2) as address:
        noise = np.random.default_rng(0).bytes(100_000)
        assert upload(address, noise)[0] == 413
        assert upload(address, noise[:10_000])[0] == 200
        assert fetch(f"{address}/gradio_api/queue/join", b" " * 300_000)[0] == 413
        # Without a stated length it ends while it arrives.
        request = urllib.request.Request(
            f"{address}/gradio_api/queue/join",
            iter([b" " * 1000] * 300),  # type: ignore[arg-type]
        )
        with pytest.raises(OSError):  # an error of HTTP, or of the connection
            urllib.request.urlopen(request, timeout=20)
        assert fetch(f"{address}/health")[0] == 200
        statuses = [upload(address, noise[n : n + 45_000])[0] for n in range(7)]
        assert statuses[0] == 200 and statuses[-1] == 429, statuses  # a full disk helps nobody


def test_uploads_are_private_and_gone_after_the_server(folder: Path) -> None:
    with serve(folder) as address:
        _, (path,) = upload(address, b"content")
        assert Path(path).read_bytes() == b"content"
        assert Path(path).parents[1].stat().st_mode & 0o077 == 0  # nobody else reads them
    assert not Path(path).exists()


def test_an_image_that_is_gone_changed_or_broken_has_no_small_copy(tmp_path: Path) -> None:
    broken, changed, gone = (tmp_path / f"{name}.png" for name in ("broken", "changed", "gone"))
    broken.write_bytes(b"nothing")
    draw_noise(seed=0).save(changed)
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (broken, changed)]
    draw_noise(seed=1).save(changed)
    for file, digest in zip((broken, changed, gone), [*digests, "0" * 64], strict=True):
        for _ in range(2):  # an error is not kept
            with pytest.raises(ValueError, match=r"cannot be read|changed since|no longer there"):
                encode_thumbnail(file, digest)
    draw_noise(seed=0).save(changed)
    assert encode_thumbnail(changed, digests[1]).startswith("data:image/jpeg;base64,")


def test_the_page_says_that_a_text_was_truncated(url: str) -> None:
    shown = call(url, SEARCH, ["a red apple " * 40, None, None, 3, None, None])
    assert "truncated to the model's limit of 128 tokens" in shown["output"]["data"][1]
    shown = call(url, SEARCH, ["a dog", None, None, 3, None, None])
    assert "truncated" not in shown["output"]["data"][1]


def test_the_page_of_the_api_loads_nothing_and_shows_the_examples(url: str) -> None:
    status, content = fetch(f"{url}/docs")
    page = content.decode()
    assert status == 200 and "<script" not in page
    assert not re.search(r'(src|href)="(https?:)?//', page)
    assert "POST /v1/embeddings" in page and "two red apples" in page

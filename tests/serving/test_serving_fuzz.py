"""Whatever comes, the answer is embeddings of what was sent, or a 4xx that says what is wrong.

Derandomized: the same examples each time, for about a minute in all.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from served_apps import save_searched
from tiny import draw_noise

from modeling_llm2clip import load_images
from modeling_llm2clip.configs.serve_config import ServeConfig
from modeling_llm2clip.image_loading_llm2clip import ImageLimits
from modeling_llm2clip.serving.app import create_app
from modeling_llm2clip.serving.image_inputs import decode_sent_image
from modeling_llm2clip.serving.service import EmbeddingService
from modeling_llm2clip.serving.service_results import RequestError

schemathesis: Any = pytest.importorskip("schemathesis")
pytest.importorskip("lancedb")

from schemathesis.generation import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

pytestmark = pytest.mark.slow

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "EPS", "ICO", "TGA")
MODES = ("RGB", "RGBA", "L", "P", "1", "LA", "CMYK", "I;16")


def often(count: int) -> Any:
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and an index of three images."""
    images = {f"{number}.png": draw_noise(seed=number) for number in range(3)}
    return save_searched(tmp_path_factory.mktemp("fuzz"), images)


@contextmanager
def open_app(folders: Path) -> Iterator[Any]:
    """All routes, search included."""
    config = ServeConfig(device="cpu", max_megapixels=1, timeout_s=20)
    service = EmbeddingService.open(folders / "model", config, index=str(folders / "db"))
    yield create_app(service)
    service.close()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_as_the_openapi_says(folders: Path, mode: Any) -> None:
    """Requests that fit the schemas of the API, and such that do not."""
    with open_app(folders) as app:  # which schemathesis closes
        _check_answers(app, mode)


def _check_answers(app: Any, mode: Any) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 7
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # without parameters there is nothing to get wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @often(30)
        def check(case: Any) -> None:
            # A schema cannot say which strings are images, filters or names of the served model.
            response = case.call_and_validate(excluded_checks=[positive_data_acceptance])
            assert response.status_code < 500
            if response.status_code >= 400:
                assert response.json()["error"]["message"]
                assert "Traceback" not in response.text

        check()


@cache
def list_files() -> list[bytes]:
    """Small images of every format and mode that Pillow writes here."""
    files = []
    for form in FORMATS:
        for mode in MODES:
            buffer = io.BytesIO()
            try:
                draw_noise(9, 11).convert(mode).save(buffer, form)
            except (OSError, ValueError, KeyError):  # a format without this mode
                continue
            files.append(buffer.getvalue())
    assert len(files) > 30
    return files


@st.composite
def damaged_images(draw: Any) -> bytes:
    """Image files with bytes changed, cut out, repeated or appended; or any bytes."""
    content = bytearray(draw(st.sampled_from(list_files()) | st.binary(max_size=200)))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.sampled_from(("change", "cut", "repeat", "insert", "header"))):
            case "change" if content:
                content[place] = draw(st.integers(0, 255))
            case "cut":
                del content[place : place + draw(st.integers(1, 40))]
            case "repeat":
                content[place:place] = content[place : place + 20]
            case "insert":
                content[place:place] = draw(st.binary(max_size=8))
            case "header" if content:
                content[min(place % 40, len(content) - 1)] = draw(st.integers(0, 255))
    return bytes(content)


@given(content=damaged_images())
@often(2500)
def test_any_bytes_are_an_image_or_a_refusal(content: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on odd files
        try:
            decoded = decode_sent_image(content, ImageLimits(max_megapixels=1))
        except RequestError as error:
            assert error.status in (400, 413)
            assert len(error.message) < 500
            return
        assert decoded.mode == "RGB"
        assert 0 < decoded.width * decoded.height <= 1e6
        expected = load_images(Image.open(io.BytesIO(content)))
        assert np.array_equal(np.asarray(decoded), np.asarray(expected))


def test_the_formats_of_the_fuzzer_are_read() -> None:
    """Else it would only see refusals."""
    read = 0
    for content in list_files():
        try:
            decode_sent_image(content, ImageLimits(max_megapixels=1))
        except RequestError:  # of EPS and others that are not served
            continue
        read += 1
    assert read > 20

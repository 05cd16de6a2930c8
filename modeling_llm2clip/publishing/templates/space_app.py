"""A Gradio Space for an LLM2CLIP model: labels of an image, and search in a few images.

The model is the folder named by MODEL_ID, a Hub id with the commit in MODEL_REVISION, or else the
folder that this file is in, or the one above.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoProcessor

TITLE = "LLM2CLIP"
MAX_IMAGES = 64
MAX_LABELS = 100
MAX_MEGAPIXELS = 50
BATCH_SIZE = 8
TEMPLATE = "a photo of a {}."
SUFFIXES = [".avif", ".bmp", ".gif", ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"]


class Demo:
    """The model, and what the page asks of it.

    Args:
        source: Folder, or Hub id.
        revision: Commit of the Hub id, since its code is run.
    """

    def __init__(self, source: str, revision: str | None = None) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options: dict[str, Any] = {"trust_remote_code": True, "revision": revision}
        self.model = AutoModel.from_pretrained(source, dtype="auto", **options).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(source, **options)

    @torch.inference_mode()
    def classify(self, image: str | None, labels: str, template: str) -> dict[str, float]:
        """Compare an image with the sentences of all labels.

        Args:
            image: File that was dropped.
            labels: Labels, with commas between them.
            template: Sentence around a label.

        Returns:
            Label → share; the shares add up to 1.
        """
        names = list(dict.fromkeys(filter(None, (label.strip() for label in labels.split(",")))))
        if image is None:
            raise gr.Error("Drop an image first.")
        if not 2 <= len(names) <= MAX_LABELS:
            raise gr.Error(f"Give 2 to {MAX_LABELS} labels, with commas between them.")
        if template.count("{}") != 1 or template.count("{") != 1:
            raise gr.Error("The sentence needs {} where the label goes.")
        texts = self.encode_texts([template.format(name) for name in names])
        logits = self.model.compare(self.encode_images([image]), texts).logits_per_image
        return dict(zip(names, logits.softmax(dim=-1)[0].tolist(), strict=True))

    def search(self, images: Sequence[str] | None, query: str) -> list[tuple[str, str]]:
        """Sort images by their cosine with a text, the best first.

        Args:
            images: Files that were dropped.
            query: A text.

        Returns:
            File and caption of each.
        """
        if not images or len(images) > MAX_IMAGES:
            raise gr.Error(f"Drop 1 to {MAX_IMAGES} images.")
        if not query.strip():
            raise gr.Error("Write what to look for.")
        cosines = (self.encode_images(images) @ self.encode_texts([query]).T).flatten()
        order = cosines.argsort(descending=True, stable=True).tolist()
        return [(images[row], f"{float(cosines[row]):.3f}") for row in order]

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts.

        Args:
            texts: N texts.

        Returns:
            (N, P) float32 of unit length.
        """
        features = []
        for start in range(0, len(texts), BATCH_SIZE):
            batch = self.processor(text=list(texts[start : start + BATCH_SIZE]))
            features.append(
                self.model.get_text_features(**batch.to(self.model.device)).pooler_output
            )
        return F.normalize(torch.cat(features), dim=-1).cpu()

    @torch.inference_mode()
    def encode_images(self, paths: Sequence[str]) -> torch.Tensor:
        """Embed image files.

        Args:
            paths: N files.

        Returns:
            (N, P) float32 of unit length.
        """
        features = []
        for start in range(0, len(paths), BATCH_SIZE):
            images = [self._open(path) for path in paths[start : start + BATCH_SIZE]]
            batch = self.processor(images=images).to(self.model.device)
            features.append(self.model.get_image_features(**batch).pooler_output)
        return F.normalize(torch.cat(features), dim=-1).cpu()

    def _open(self, path: str) -> Any:
        """Open a file that gradio has stored, and refuse a large image before it is decoded."""
        name = Path(path).name
        try:
            return self.processor.open_image(path, name=name, max_megapixels=MAX_MEGAPIXELS)
        except ValueError as error:
            raise gr.Error(str(error)) from None


def find_model() -> tuple[str, str | None]:
    """Return the folder or Hub id of the model, and the commit of the latter.

    Raises:
        ValueError: There is no model, or its commit is missing.
    """
    if source := os.environ.get("MODEL_ID"):
        revision = os.environ.get("MODEL_REVISION", "")
        if Path(source).is_dir():
            return source, None
        if not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise ValueError(
                f"MODEL_ID={source!r} needs MODEL_REVISION, the 40 digits of a commit: the model "
                "comes with code, which another commit could replace. Set both in the settings of "
                "the Space."
            )
        return source, revision
    here = Path(__file__).resolve().parent
    for folder in (here, here.parent):
        if (folder / "config.json").is_file():
            return str(folder), None
    raise ValueError("There is no model. Set MODEL_ID and MODEL_REVISION, or put it beside app.py.")


def build_page(demo: Demo) -> gr.Blocks:
    """Build the page.

    Args:
        demo: The model.
    """
    with gr.Blocks(title=TITLE) as page:
        gr.Markdown(f"# {TITLE}")
        with gr.Tab("Labels"):
            with gr.Row():
                # Without a mode the file is taken as it is: the processor converts it.
                image = gr.Image(label="Image", type="filepath", image_mode=None, elem_id="image")
                scores = gr.Label(label="Labels", num_top_classes=10, elem_id="scores")
            labels = gr.Textbox("cat, dog", label="Labels, with commas between them")
            template = gr.Textbox(TEMPLATE, label="Sentence around a label")
            classify = gr.Button("Compare", variant="primary")
            inputs = [image, labels, template]
            classify.click(demo.classify, inputs, scores, api_name="classify")
        with gr.Tab("Search"):
            files = gr.File(label="Images", file_count="multiple", file_types=SUFFIXES)
            query = gr.Textbox(label="What to look for")
            search = gr.Button("Search", variant="primary")
            found = gr.Gallery(label="Best first", columns=4, object_fit="contain")
            search.click(demo.search, [files, query], found, api_name="search")
            query.submit(demo.search, [files, query], found, api_name=False)
    return page


def main() -> None:
    """Load the model and serve the page, on the address that a Space sets."""
    page = build_page(Demo(*find_model()))
    page.launch(theme=gr.themes.Base(font=["system-ui", "sans-serif"]), max_file_size="10mb")


if __name__ == "__main__":
    main()

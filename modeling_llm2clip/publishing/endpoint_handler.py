"""Serves this model on Inference Endpoints: embeddings of texts and images, and zero-shot labels.

The host imports this file as `handler.py`, creates `EndpointHandler(path)` once, and calls it for
every request. A ValueError becomes a response with status 400 and its message.

    {"inputs": "two red apples"}
    {"inputs": ["two red apples", {"text": "a dog"}, {"image": "<base64>"}]}
    {"inputs": "two red apples", "parameters": {"prompt_name": "query", "dimensions": 256}}
    {"inputs": {"image": "<base64>"}, "parameters": {"candidate_labels": ["cat", "dog"]}}

An image is sent as a base64-encoded file, with or without the prefix `data:image/…;base64,`, or as
the body of a request of type `image/…`. A string in `inputs` is an image if it has this prefix, or
if `candidate_labels` are set. Image URLs are not fetched.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoProcessor

MAX_INPUTS = 256
MAX_LABELS = 1000
MAX_MEGAPIXELS = 50
BATCH_SIZE = 16
HYPOTHESIS_TEMPLATE = "a photo of a {}."
_OF_EMBEDDINGS = {"dimensions", "prompt_name"}
_PARAMETERS = {"candidate_labels", "hypothesis_template", *_OF_EMBEDDINGS}
_DATA_URL = re.compile(r"data:(image/|[^,\s]*;base64,)", re.IGNORECASE)
_SHOWN = 40  # characters of an input in an error


class EndpointHandler:
    """Loads the model and answers requests.

    Args:
        path: Folder of the model, with its code and this file.
    """

    def __init__(self, path: str = "") -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # The code is in the same folder and revision as the weights.
        options: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
        model = AutoModel.from_pretrained(path or ".", dtype="auto", **options)
        self.model = model.to(device).eval()
        self.processor = AutoProcessor.from_pretrained(path or ".", **options)

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Answer one request.

        Args:
            data: `inputs`, a text, an image or a list of both, and `parameters`:
                `candidate_labels` to classify images, `hypothesis_template` for the sentence around
                a label, `dimensions` for the length of embeddings, and `prompt_name` for the
                instruction before texts, as in `encode` of sentence-transformers.

        Returns:
            For one input, its embedding of unit length as a list of numbers, or its labels as
            `[{"label": …, "score": …}]`, best first; for a list of inputs, a list of these.

        Raises:
            ValueError: There are no inputs or too many, or one cannot be read.
        """
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict) or not set(parameters) <= _PARAMETERS:
            shown = str(parameters)[:_SHOWN]
            raise ValueError(f"parameters: got {shown}; supported are {sorted(_PARAMETERS)}.")
        inputs = data.get("inputs")
        several = inputs if isinstance(inputs, list) else [inputs]
        if not 0 < len(several) <= MAX_INPUTS:
            raise ValueError(f"inputs: got {len(several)}; send 1 to {MAX_INPUTS}.")
        options = {name for name, value in parameters.items() if value is not None}
        if "candidate_labels" not in options:
            results = self._embed(several, parameters)
        elif options & _OF_EMBEDDINGS:
            raise ValueError(f"candidate_labels: cannot be used with {sorted(_OF_EMBEDDINGS)}.")
        else:
            results = self._classify(several, **{name: parameters[name] for name in options})
        return results if isinstance(inputs, list) else results[0]

    def _embed(self, inputs: Sequence[Any], parameters: dict[str, Any]) -> list[Any]:
        """Embed texts and images in batches, and return the embeddings in the original order."""
        instructions = {None: "", "query": "", "document": "", **self.model.config.instructions}
        name = parameters.get("prompt_name")
        if name not in list(instructions):  # a list, because the name may be unhashable
            raise ValueError(f"prompt_name: got {name!r}; available: {list(instructions)[1:]}.")
        instruction = str(instructions[name])
        width = self.model.config.projection_dim
        dimensions = parameters.get("dimensions")
        dimensions = width if dimensions is None else dimensions
        if type(dimensions) is not int or not 0 < dimensions <= width:  # True is also an int
            raise ValueError(f"dimensions: got {dimensions!r}; send an integer from 1 to {width}.")
        read = [self._read_input(content) for content in inputs]
        rows: dict[int, list[float]] = {}
        for modality in ("text", "image"):
            indices = [index for index, (kind, _) in enumerate(read) if kind == modality]
            if indices and not hasattr(self.model, f"get_{modality}_features"):
                raise ValueError(f"This model cannot encode {modality}s.")
            for start in range(0, len(indices), BATCH_SIZE):
                batch = indices[start : start + BATCH_SIZE]
                embeds = self._encode(modality, [read[index][1] for index in batch], instruction)
                shortened = F.normalize(embeds[:, :dimensions], dim=-1).tolist()
                rows |= dict(zip(batch, shortened, strict=True))
        return [rows[index] for index in range(len(read))]

    @torch.inference_mode()
    def _encode(self, modality: str, batch: list[Any], instruction: str = "") -> torch.Tensor:
        if modality == "text":
            texts = [instruction + text.strip() for text in batch]
            inputs = self.processor(text=texts).to(self.model.device)
            if instruction:  # counted like in sentence-transformers
                ids = self.processor.tokenizer(instruction)["input_ids"]
                ends_special = bool(self.model.config.prompt_suffix_ends_special)
                inputs["prompt_length"] = len(ids) - ends_special
            features = self.model.get_text_features(**inputs)
        else:
            inputs = self.processor(images=batch).to(self.model.device)
            features = self.model.get_image_features(**inputs)
        return F.normalize(features.pooler_output, dim=-1).cpu()

    @torch.inference_mode()
    def _classify(
        self,
        inputs: Sequence[Any],
        candidate_labels: Any,
        hypothesis_template: Any = HYPOTHESIS_TEMPLATE,
    ) -> list[list[dict[str, Any]]]:
        """Compare each image with the sentences of all labels."""
        if not hasattr(self.model, "compare"):
            raise ValueError("candidate_labels: need both towers, but this model has one.")
        values = candidate_labels if isinstance(candidate_labels, list) else []
        labels = [label.strip() for label in values if isinstance(label, str)]
        if not 0 < len(set(labels) - {""}) == len(values) <= MAX_LABELS:
            raise ValueError(
                f"candidate_labels: send a list of 1 to {MAX_LABELS} different non-blank labels."
            )
        template = str(hypothesis_template)
        if template.count("{}") != 1 or template.count("{") != 1:
            raise ValueError("hypothesis_template: send a sentence with {} for the label.")
        images = [self._read_input(content, is_image=True)[1] for content in inputs]
        sentences = [template.format(label) for label in labels]
        texts = torch.cat(
            [
                self._encode("text", sentences[start : start + BATCH_SIZE])
                for start in range(0, len(sentences), BATCH_SIZE)
            ]
        )
        results = []
        for image in images:
            logits = self.model.compare(self._encode("image", [image]), texts).logits_per_image
            scores = logits.softmax(dim=-1)[0]
            pairs = sorted(zip(labels, scores.tolist(), strict=True), key=lambda pair: -pair[1])
            results.append([{"label": label, "score": score} for label, score in pairs])
        return results

    def _read_input(self, content: Any, *, is_image: bool = False) -> tuple[str, Any]:
        """Return the modality of an input, and the text or image."""
        if isinstance(content, Image.Image):
            return "image", self._open(content)
        kind = "image" if is_image or _DATA_URL.match(str(content)) else "text"
        if isinstance(content, dict) and len(content) == 1:
            ((kind, content),) = content.items()
        if kind not in ("text", "image") or (is_image and kind == "text"):
            expected = "an image" if is_image else "an image or a text"
            raise ValueError(f"inputs: got {kind!r}; send {expected}.")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(
                f"inputs: got {str(content)[:_SHOWN]!r}; send a text, or an image in base64."
            )
        return kind, content if kind == "text" else self._open(_decode(content))

    def _open(self, image: Any) -> Any:
        """Open an image; too large ones are rejected by their header, before decoding."""
        return self.processor.open_image(image, name="An image", max_megapixels=MAX_MEGAPIXELS)


def _decode(text: str) -> io.BytesIO:
    if text[:8].lower().startswith(("http://", "https://")):
        raise ValueError("Image URLs are not fetched. Send the file in base64.")
    content = text.partition(",")[2] if _DATA_URL.match(text) else text
    try:
        return io.BytesIO(base64.b64decode("".join(content.split()), validate=True))
    except (binascii.Error, ValueError):
        raise ValueError(f"An image is not base64: {text[:_SHOWN]!r}.") from None

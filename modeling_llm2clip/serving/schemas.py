"""Requests and responses of the API, a superset of OpenAI's.

| field | sent by |
| --- | --- |
| `input` | OpenAI and Ollama clients; with `text` or `image` objects, Jina and SGLang clients |
| `messages` | vLLM clients: chat messages with `image_url` |
| `texts`, `images`, `inputs` | Cohere clients |

Unknown fields are refused, because ignoring one could change the meaning of a request.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from typing_extensions import Self

from .._suggestions import counted

T = TypeVar("T")

MOST_INPUTS = 2048  # texts and images per request, the same limit as OpenAI's
MOST_CHARACTERS = 100_000  # per text: no model reads that much, and tokenizing more takes seconds
MOST_HITS = 1000  # images per search query
MOST_RESULTS = 20_000  # total images of a search, or total labels of a classification
_DATA_URL = r"^data:image/[^,\s]+;base64,"


def _require_text(text: str) -> str:
    if not text.strip():
        raise ValueError("a text must not be blank")
    return text


# A text is blank if `str.strip` removes all of it, including characters that are not whitespace in
# a regular expression.
Text: TypeAlias = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MOST_CHARACTERS,
        json_schema_extra={"pattern": r"[^\s\x1c-\x1f]"},
    ),
    AfterValidator(_require_text),
]
ImageText: TypeAlias = Annotated[
    str, Field(min_length=1, description="Image as a data URL, http or https URL, or base64.")
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextInput(_Strict):
    """A text."""

    text: Text


class ImageInput(_Strict):
    """An image."""

    image: ImageText


class ImageUrl(_Strict):
    """The image in a chat message; `detail` has no effect."""

    url: ImageText
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(_Strict):
    """A text in `input`, in a chat message or in Cohere's `inputs`."""

    type: Literal["text"]
    text: Text


class ImagePart(_Strict):
    """An image in `input`, in a chat message or in Cohere's `inputs`."""

    type: Literal["image_url"]
    image_url: ImageUrl

    @property
    def image(self) -> str:
        """The image's URL, under the same attribute name as in `ImageInput`."""
        return self.image_url.url


Part: TypeAlias = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _read_string(value: str, read_text: Callable[[str], str]) -> str | ImageInput:
    """Return a data URL of an image as an image, and any other string as a text."""
    is_image = re.match(_DATA_URL, value, re.IGNORECASE)
    return ImageInput(image=value) if is_image else read_text(value)


def _tag_item(item: Any) -> str:
    if isinstance(item, dict) and "type" in item:
        return "[part]"
    for name, kind in (("text", TextInput), ("image", ImageInput)):
        if isinstance(item, kind) or (isinstance(item, dict) and [*item] == [name]):
            return f"[{name}]"
    return "[string]" if isinstance(item, str) else ""


def _tag_list(value: Any) -> str:
    return "[many]" if isinstance(value, list) else "[one]"


_StringItem: TypeAlias = Annotated[
    Text,
    WrapValidator(_read_string),
    WithJsonSchema(
        {"anyOf": [TypeAdapter(Text).json_schema(), {"type": "string", "pattern": _DATA_URL}]}
    ),
]
# Tags are in brackets so `_name_field` can leave them out of field names.
Item: TypeAlias = Annotated[
    Annotated[_StringItem, Tag("[string]")]
    | Annotated[Part, Tag("[part]")]
    | Annotated[TextInput, Tag("[text]")]
    | Annotated[ImageInput, Tag("[image]")],
    Discriminator(
        _tag_item,
        custom_error_type="item",
        custom_error_message='Send a string, {"text": …} or {"image": …}, not token ids.',
    ),
]
Items: TypeAlias = Annotated[list[Item], Field(min_length=1, max_length=MOST_INPUTS)]
ItemOrItems: TypeAlias = Annotated[
    Annotated[Item, Tag("[one]")] | Annotated[Items, Tag("[many]")], Discriminator(_tag_list)
]
Images: TypeAlias = Annotated[list[ImageText], Field(min_length=1, max_length=MOST_INPUTS)]
Texts: TypeAlias = Annotated[list[Text], Field(min_length=1, max_length=MOST_INPUTS)]


Parts: TypeAlias = Annotated[list[Part], Field(min_length=1, max_length=MOST_INPUTS)]


class Message(_Strict):
    """A chat message."""

    role: str
    content: Annotated[
        Annotated[Text, Tag("[one]")] | Annotated[Parts, Tag("[many]")], Discriminator(_tag_list)
    ]


class Content(_Strict):
    """One of Cohere's `inputs`: a text or an image, but not both."""

    content: Annotated[list[Part], Field(min_length=1, max_length=1)]


# An omitted field; OpenAPI shows no default, because an explicit null is refused.
_ABSENT: Any = Field(default_factory=lambda: None)


class _Options(_Strict):
    model: str | None = Field(None, description="Name of the served model; optional.")


class _TextOptions(_Options):
    prompt_name: str | None = Field(
        None,
        max_length=100,
        description="Name of the model's instruction to prepend to texts, such as query; like "
        "`encode_query` in sentence-transformers.",
    )


def _require_one(messages: list[Message]) -> list[Message]:
    count = sum(1 if isinstance(m.content, str) else len(m.content) for m in messages)
    if count != 1:
        raise ValueError(
            f"messages must contain exactly one text or image, not {count}. Send several in "
            "`input`, or one per request."
        )
    return messages


def _require_one_form(schema: dict[str, Any], model: Any) -> None:
    schema["oneOf"] = [{"required": [name]} for name in model.forms]


class _InputsRequest(_TextOptions):
    """Texts and images in exactly one of the fields listed in `forms`."""

    model_config = ConfigDict(json_schema_extra=_require_one_form)
    forms: ClassVar[tuple[str, ...]] = ("texts", "images", "inputs")

    texts: Texts = _ABSENT
    images: Images = _ABSENT
    inputs: Annotated[list[Content], Field(min_length=1, max_length=MOST_INPUTS)] = _ABSENT

    @model_validator(mode="before")
    @classmethod
    def _find_form(cls, body: Any) -> Any:
        if not isinstance(body, dict) or sum(name in body for name in cls.forms) != 1:
            raise ValueError(f"Send a JSON object with exactly one of {', '.join(cls.forms)}.")
        return body

    def list_items(self) -> list[Any]:
        """List the texts and images in order, as strings or objects with `text` or `image`."""
        if self.images:
            return [ImageInput.model_construct(image=image) for image in self.images]
        return self.texts or [part for content in self.inputs for part in content.content]


class EmbeddingRequest(_InputsRequest):
    """A request from an OpenAI, vLLM or Cohere client."""

    forms = ("input", "messages", *_InputsRequest.forms)

    input: ItemOrItems = _ABSENT
    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MOST_INPUTS), AfterValidator(_require_one)
    ] = _ABSENT
    dimensions: int | None = Field(
        None, ge=1, description="Keep the first dimensions of each embedding, renormalized."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="base64 encodes little-endian float32."
    )
    user: str | None = Field(None, description="Has no effect.")
    truncate: bool = Field(True, description="If false, texts that are too long are refused.")

    def list_items(self) -> list[Any]:
        content: Any = self.messages[0].content if self.messages else self.input
        if content is None:
            return super().list_items()
        return content if isinstance(content, list) else [content]


class CohereRequest(_InputsRequest):
    """A request in Cohere's format."""

    input_type: str | None = Field(
        None,
        description="Without `prompt_name`, search_query and search_document select the "
        "instructions query and document; other types have no effect.",
    )
    output_dimension: int | None = Field(None, ge=1)
    embedding_types: Annotated[
        list[Literal["float", "base64"]], Field(min_length=1, max_length=2)
    ] = Field(["float"])
    truncate: Literal["NONE", "END"] = "END"

    @model_validator(mode="after")
    def _name_prompt(self) -> Self:
        if self.prompt_name is None:
            names = {"search_query": "query", "search_document": "document"}
            self.prompt_name = names.get(self.input_type or "")
        return self


class OllamaRequest(_TextOptions):
    """A request in Ollama's format."""

    input: ItemOrItems
    dimensions: int | None = Field(None, ge=1)
    truncate: bool | None = True
    options: dict[str, Any] | None = Field(None, description="Has no effect.")
    keep_alive: float | str | None = Field(None, description="Has no effect.")

    def list_items(self) -> list[Any]:
        """List the texts and images in order."""
        return self.input if isinstance(self.input, list) else [self.input]


def _require_few(asking: str, count: int) -> None:
    if count > MOST_RESULTS:
        raise ValueError(
            f"{asking} would return {count:,} results; the maximum is {MOST_RESULTS:,}. Send "
            "fewer inputs, or a smaller top_k"
        )


class ClassifyRequest(_Options):
    """Images, and the labels to choose from."""

    images: Images
    candidate_labels: Texts
    templates: Annotated[list[Text], Field(min_length=1, max_length=100)] = Field(
        ["{}"], description="Prompts with {} for the label; the embeddings of several are averaged."
    )
    top_k: int | None = Field(None, ge=1, description="Labels per image; default: all.")

    @model_validator(mode="after")
    def _require_few_results(self) -> Self:
        most = min(self.top_k or MOST_INPUTS, len(self.candidate_labels))
        _require_few(counted(len(self.images), "image"), len(self.images) * most)
        return self


class SearchRequest(_TextOptions):
    """Texts and images to use as queries."""

    queries: Annotated[list[ItemOrItems], Field(min_length=1, max_length=MOST_INPUTS)] = Field(
        description="A nested list is a single query, whose embeddings are averaged."
    )
    negative: ItemOrItems = Field(
        default_factory=list,
        description="Half of the mean embedding of these is subtracted from every query.",
    )
    top_k: int = Field(6, ge=1, le=MOST_HITS, description="Images per query.")
    threshold: float | None = Field(None, ge=-1, le=1, description="Lowest cosine of a hit.")
    where: str | None = Field(
        None, min_length=1, description="SQL comparisons of columns, joined by AND and OR."
    )

    @model_validator(mode="after")
    def _require_few_results(self) -> Self:
        _require_few(counted(len(self.queries), "query"), len(self.queries) * self.top_k)
        return self


class Embedding(BaseModel):
    """One embedding."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class ListResponse(BaseModel, Generic[T]):
    """Results in the order of the inputs, images or queries."""

    object: Literal["list"]
    data: list[T]
    model: str
    usage: dict[Literal["prompt_tokens", "total_tokens"], int] = Field(
        description="Tokens of the texts after truncation, prompts included."
    )
    truncated: list[int] = Field(
        description="Positions of truncated texts, of candidate labels with a truncated prompt, or "
        "of queries with a truncated text."
    )


class CohereResponse(BaseModel):
    """Cohere's response."""

    id: str
    response_type: Literal["embeddings_by_type"]
    embeddings: dict[Literal["float", "base64"], list[list[float]] | list[str]]
    texts: list[str]
    meta: dict[str, Any]


class OllamaResponse(BaseModel):
    """Ollama's response."""

    model: str
    embeddings: list[list[float]]
    prompt_eval_count: int = Field(description="Tokens of the texts, prompts included.")


class ImmichResponse(BaseModel):
    """The response of immich's machine-learning service; the sizes are those of an image."""

    clip: str = Field(description="The embedding, as a JSON array.")
    imageHeight: int | None = None  # noqa: N815
    imageWidth: int | None = None  # noqa: N815


class LabelScore(BaseModel):
    """A label of an image."""

    label: str
    cosine: float
    probability: float


class ImageLabels(BaseModel):
    """The labels of an image, best first."""

    object: Literal["classification"]
    index: int
    labels: list[LabelScore]


class Hit(BaseModel):
    """An image found by a search, with its columns in the index."""

    model_config = ConfigDict(extra="allow")

    path: str
    cosine: float


class QueryHits(BaseModel):
    """The images found for a query, best first."""

    object: Literal["search_result"]
    index: int
    hits: list[Hit]
    best_cosine: float | None = Field(
        description="Cosine of the best image, even below the threshold; null if none was compared."
    )


class Health(BaseModel):
    """The state of the server."""

    status: Literal["ok", "degraded", "failed"] = Field(
        description="degraded: everything but search works; failed: no model is running."
    )
    working_routes: list[str]
    model: str
    modalities: list[str]
    embedding_dim: int
    max_text_length: int
    num_pending: int
    num_images: int | None = Field(description="Number of images in the index.")
    index_error: str | None = Field(description="Why the index cannot be searched.")
    far_images: bool = Field(
        description="True if the images in the index are unlike those the model was trained on; "
        "false also if that is unknown."
    )


class ErrorDetail(BaseModel):
    """Details of an error; `param` names the field of the request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """An error."""

    error: ErrorDetail

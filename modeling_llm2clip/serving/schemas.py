"""Requests and responses of the API: a superset of OpenAI's.

| field | who sends it |
| --- | --- |
| `input` | clients of OpenAI; with objects of `text` or `image`, those of Jina and SGLang |
| `messages` | clients of vLLM: chat messages with `image_url` |
| `texts`, `images`, `inputs` | clients of Cohere |

Unknown fields are refused: ignoring one could change the meaning of a request.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from typing_extensions import Self

from .._suggestions import counted

T = TypeVar("T")

MOST_INPUTS = 2048  # texts and images per request, as OpenAI's
MOST_CHARACTERS = 100_000  # of a text: no model reads as much, and tokenizing more takes seconds
MOST_HITS = 1000  # images per query of a search
MOST_RESULTS = 20_000  # images of all queries of a search, and labels of all images


def _require_text(text: str) -> str:
    if not text.strip():
        raise ValueError("a text must not be blank")
    return text


# Blank is whatever Python strips, some of which is not white space to a regular expression.
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
    str, Field(min_length=1, description="Data URL, http or https URL, or base64 of an image.")
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextInput(_Strict):
    """A text."""

    text: Text


class ImageInput(_Strict):
    """An image."""

    image: ImageText


def _tag_item(item: Any) -> str:
    for name, kind in (("text", TextInput), ("image", ImageInput)):
        if isinstance(item, kind) or (isinstance(item, dict) and [*item] == [name]):
            return f"[{name}]"
    return "[string]" if isinstance(item, str) else ""


def _tag_list(value: Any) -> str:
    return "[many]" if isinstance(value, list) else "[one]"


# Tags are in brackets, by which `_name_field` leaves them out of the names of fields.
Item: TypeAlias = Annotated[
    Annotated[Text, Tag("[string]")]
    | Annotated[TextInput, Tag("[text]")]
    | Annotated[ImageInput, Tag("[image]")],
    Discriminator(
        _tag_item,
        custom_error_type="item",
        custom_error_message='Give a string, {"text": …} or {"image": …}; token ids are not taken.',
    ),
]
Items: TypeAlias = Annotated[list[Item], Field(min_length=1, max_length=MOST_INPUTS)]
ItemOrItems: TypeAlias = Annotated[
    Annotated[Item, Tag("[one]")] | Annotated[Items, Tag("[many]")], Discriminator(_tag_list)
]
Images: TypeAlias = Annotated[list[ImageText], Field(min_length=1, max_length=MOST_INPUTS)]
Texts: TypeAlias = Annotated[list[Text], Field(min_length=1, max_length=MOST_INPUTS)]


class ImageUrl(_Strict):
    """The image of a chat message; `detail` changes nothing."""

    url: ImageText
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(_Strict):
    """A text of a chat message, or of Cohere's `inputs`."""

    type: Literal["text"]
    text: Text


class ImagePart(_Strict):
    """An image of a chat message, or of Cohere's `inputs`."""

    type: Literal["image_url"]
    image_url: ImageUrl

    @property
    def image(self) -> str:
        """The address, named as in `ImageInput`."""
        return self.image_url.url


Part: TypeAlias = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts: TypeAlias = Annotated[list[Part], Field(min_length=1, max_length=MOST_INPUTS)]


class Message(_Strict):
    """A chat message."""

    role: str
    content: Annotated[
        Annotated[Text, Tag("[one]")] | Annotated[Parts, Tag("[many]")], Discriminator(_tag_list)
    ]


class Content(_Strict):
    """One of Cohere's `inputs`: a text or an image; both together are no input of this model."""

    content: Annotated[list[Part], Field(min_length=1, max_length=1)]


# A field that is left out; without a default in the OpenAPI, where null is refused.
_ABSENT: Any = Field(default_factory=lambda: None)


class _Options(_Strict):
    model: str | None = Field(None, description="Name of the served model; it may be left out.")


class _TextOptions(_Options):
    prompt_name: str | None = Field(
        None,
        max_length=100,
        description="Name of the model's instruction that texts get, such as query, as with "
        "`encode_query` of sentence-transformers.",
    )


def _require_one(messages: list[Message]) -> list[Message]:
    count = sum(1 if isinstance(m.content, str) else len(m.content) for m in messages)
    if count != 1:
        raise ValueError(
            f"a conversation gives one embedding, of one text or one image; got {count}. Send "
            "several in `input`, or a request for each."
        )
    return messages


def _require_one_form(schema: dict[str, Any], model: Any) -> None:
    schema["oneOf"] = [{"required": [name]} for name in model.forms]


class _InputsRequest(_TextOptions):
    """Texts and images in exactly one of the fields that `forms` names."""

    model_config = ConfigDict(json_schema_extra=_require_one_form)
    forms: ClassVar[tuple[str, ...]] = ("texts", "images", "inputs")

    texts: Texts = _ABSENT
    images: Images = _ABSENT
    inputs: Annotated[list[Content], Field(min_length=1, max_length=MOST_INPUTS)] = _ABSENT

    @model_validator(mode="before")
    @classmethod
    def _find_form(cls, body: Any) -> Any:
        if not isinstance(body, dict) or sum(name in body for name in cls.forms) != 1:
            raise ValueError(f"Give a JSON object with exactly one of {', '.join(cls.forms)}.")
        return body

    def list_items(self) -> list[Any]:
        """List the texts and images in order: strings, or objects with `text` or `image`."""
        if self.images:
            return [ImageInput.model_construct(image=image) for image in self.images]
        return self.texts or [part for content in self.inputs for part in content.content]


class EmbeddingRequest(_InputsRequest):
    """A request of OpenAI's, vLLM's or Cohere's clients."""

    forms = ("input", "messages", *_InputsRequest.forms)

    input: ItemOrItems = _ABSENT
    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MOST_INPUTS), AfterValidator(_require_one)
    ] = _ABSENT
    dimensions: int | None = Field(
        None, ge=1, description="Keep the first numbers of an embedding, of unit length again."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="base64 is of little-endian float32."
    )
    user: str | None = Field(None, description="Changes nothing.")
    truncate: bool = Field(True, description="false refuses texts that would be truncated.")

    def list_items(self) -> list[Any]:
        content: Any = self.messages[0].content if self.messages else self.input
        if content is None:
            return super().list_items()
        return content if isinstance(content, list) else [content]


class CohereRequest(_InputsRequest):
    """A request of Cohere's API."""

    input_type: str | None = Field(
        None,
        description="search_query and search_document are the instructions query and document "
        "without `prompt_name`; other types change nothing.",
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


def _require_few(asking: str, count: int) -> None:
    if count > MOST_RESULTS:
        raise ValueError(
            f"{asking} ask for {count:,} results, the maximum is {MOST_RESULTS:,}. Send fewer, or "
            "a smaller top_k"
        )


class ClassifyRequest(_Options):
    """Images and the labels to choose from."""

    images: Images
    candidate_labels: Texts
    templates: Annotated[list[Text], Field(min_length=1, max_length=100)] = Field(
        ["{}"], description="Prompts with {} for the label; several are averaged."
    )
    top_k: int | None = Field(None, ge=1, description="Labels per image; all by default.")

    @model_validator(mode="after")
    def _require_few_results(self) -> Self:
        most = min(self.top_k or MOST_INPUTS, len(self.candidate_labels))
        _require_few(counted(len(self.images), "image"), len(self.images) * most)
        return self


class SearchRequest(_TextOptions):
    """Texts and images to find images for."""

    queries: Annotated[list[ItemOrItems], Field(min_length=1, max_length=MOST_INPUTS)] = Field(
        description="A list among them is one query, by the mean of its embeddings."
    )
    top_k: int = Field(6, ge=1, le=MOST_HITS, description="Images per query.")
    where: str | None = Field(
        None, min_length=1, description="Comparisons of columns, as in SQL, joined by AND and OR."
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
        description="Tokens of the texts as the model read them, prompts included."
    )
    truncated: list[int] = Field(
        description="Places of truncated texts; of candidate labels with a truncated prompt; or of "
        "queries with a truncated text."
    )


class CohereResponse(BaseModel):
    """Cohere's response."""

    id: str
    response_type: Literal["embeddings_by_type"]
    embeddings: dict[Literal["float", "base64"], list[list[float]] | list[str]]
    texts: list[str]
    meta: dict[str, Any]


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
    """An image that was found, and its columns of the index."""

    model_config = ConfigDict(extra="allow")

    path: str
    cosine: float


class QueryHits(BaseModel):
    """The images of a query, best first."""

    object: Literal["search_result"]
    index: int
    hits: list[Hit]


class Health(BaseModel):
    """State of the server."""

    status: Literal["ok", "degraded", "failed"] = Field(
        description="degraded: everything works but searches; failed: no model is running."
    )
    working_routes: list[str]
    model: str
    modalities: list[str]
    embedding_dim: int
    max_text_length: int
    num_pending: int
    num_images: int | None = Field(description="Images of the index.")
    index_error: str | None = Field(description="Why the index cannot be searched.")
    far_images: bool = Field(
        description="Whether the images of the index are unlike all that the model was trained on; "
        "false also where that is not known."
    )


class ErrorDetail(BaseModel):
    """Message, type and place of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """An error."""

    error: ErrorDetail

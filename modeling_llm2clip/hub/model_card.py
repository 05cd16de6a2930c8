"""The README.md of an exported folder, filled from what is in the folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..configuration_llm2clip import LLM2CLIPConfig

_BODY = """
# {title}

An LLM2CLIP model ([arXiv:2411.04997](https://arxiv.org/abs/2411.04997)): a vision encoder and a
language model whose captions share one space of {projection_dim} dimensions.

| part | what |
| --- | --- |
| vision tower | `{vision}` |
| language model | `{text}`, {direction}, pooling `{pooling}` |
| texts | at most {max_text_length} tokens, prompt included |

## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{title}", trust_remote_code=True)  # or import modeling_llm2clip first
captions = model.encode(["a red apple", "a sleeping cat"])
pictures = model.encode(["path/to/picture.png"])
print(model.similarity(pictures, captions))
```

`AutoModel`, `AutoProcessor` and `pipeline("zero-shot-image-classification")` load the same folder.

{scores}## Licence

Weights derive from both towers; the licence of each applies: vision tower `{vision_source}`,
language model `{text_source}`.
"""


def write_model_card(
    folder: Path,
    config: LLM2CLIPConfig,
    *,
    license_id: str | None,
    scores: Mapping[str, float],
) -> None:
    """Write `README.md` with the Hub's metadata."""
    data = ModelCardData(
        license=license_id,
        library_name="sentence-transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["llm2clip", "sentence-transformers", "image-text-retrieval"],
    )
    rows = "".join(f"| {name} | {value:.4f} |\n" for name, value in scores.items())
    body = _BODY.format(
        title=folder.name.lstrip(".").rsplit("-", 1)[0],
        projection_dim=config.projection_dim,
        vision=config.vision_config.model_type,
        text=config.text_config.model_type,
        direction="bidirectional" if config.bidirectional else "causal",
        pooling=config.text_pooling,
        max_text_length=config.max_text_length,
        scores=f"## Scores\n\n| measure | value |\n| --- | --- |\n{rows}\n" if rows else "",
        vision_source=config.vision_config._name_or_path or "not recorded",
        text_source=config.text_config._name_or_path or "not recorded",
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(folder / "README.md")

"""The prompt around every caption, written into the saved tokenizer.

A prompt is chosen explicitly, never guessed from a model's name: the official code chose it by the
model's path, so renaming a folder changed the embeddings.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .._suggestions import counted, list_first
from ..configs.build_config import CHAT_TEMPLATE, PROMPT_NAMES, PROMPT_PRESETS

# Captions of several forms; the prompt's ids must be the same around all of them.
_SAMPLE_CAPTIONS = (
    "A dog.",
    "two cats on a mat",
    "Édouard, 1862 (oil on canvas)",
    "東京の夜景",
    "7 a",
)
# Further captions, for prompts of plain text.
_OWN_SAMPLES = ("(a)", '"Look!"', "-", "'s", "été")


@dataclass(frozen=True)
class Prompt:
    """Token ids around every caption.

    Attributes:
        prefix_ids: Ids before the caption; attended to, but not pooled.
        suffix_ids: Ids after the caption; attended to and pooled, like the end-of-turn token in the
            official code.
        joined: Text between prefix and caption, tokenized together with the caption.
    """

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    joined: str = ""


def resolve_template(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | None,
    *,
    prefix: str | None = None,
    suffix: str | None = None,
) -> str:
    """Return the template of a prompt, which contains `{text}`.

    The prompt is a name in `PROMPT_PRESETS`, `"chat-template"` for the tokenizer's own, or None if
    there is a prefix or suffix.
    """
    if prefix is not None or suffix is not None:
        if prompt is not None:
            raise ValueError(f"prompt={prompt!r} cannot be combined with a prefix or suffix.")
        return f"{prefix or ''}{{text}}{suffix or ''}"
    if prompt == CHAT_TEMPLATE:
        return _render_chat_template(tokenizer)
    if prompt not in PROMPT_PRESETS:
        raise ValueError(
            f"prompt={prompt!r} must be one of {PROMPT_NAMES}. Or set prompt_prefix and "
            "prompt_suffix. A prompt is never guessed, because the embeddings depend on it."
        )
    return PROMPT_PRESETS[prompt]


def derive_prompt(tokenizer: PreTrainedTokenizerBase, template: str) -> Prompt:
    """Find the ids that a template puts around any caption, and verify them on sample captions."""
    looking_special = re.findall(r"<[^<>]+>", template.replace("{text}", ""))
    unknown = [
        token
        for token in looking_special
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1
    ]
    if unknown:
        raise ValueError(
            f"The prompt contains {unknown}, which are not special tokens of this tokenizer: the "
            "prompt belongs to another model family. Choose another prompt."
        )
    splits = {c: _split_around_caption(tokenizer, template, c) for c in _SAMPLE_CAPTIONS}
    if merged := [caption for caption, places in splits.items() if not places]:
        raise ValueError(
            f"With the template {template!r}, this tokenizer merges the caption {merged[0]!r} with "
            "the prompt. Put a special token or a newline next to {text}."
        )
    if not (common := set.intersection(*splits.values())):
        raise ValueError(
            f"With the template {template!r}, the prompt's token ids depend on the caption: "
            f"{list_first(sorted(set.union(*splits.values())))}. Put a special token or a newline "
            "next to {text}."
        )
    return Prompt(*min(common))


def derive_own_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, is_pooled: bool) -> Prompt:
    """Find the ids that an embedder puts around any caption after a plain-text prompt.

    The prompt's last word stays text, because its end may share a token with the caption, such as
    the space in " a". A prompt that is not pooled is converted to ids completely, because the model
    needs the number of its tokens.
    """
    # Start of each word but the first, including the space before it; the last word comes first.
    words = [match.start() for match in re.finditer(r"(?<=\S)\s+(?=\S)", text)][::-1]
    for start in (*words, 0) if is_pooled else (len(text),):
        joined = text[start:]
        common = set.intersection(
            *(
                _split_around_caption(tokenizer, f"{text}{{text}}", caption, joined=joined)
                for caption in (*_SAMPLE_CAPTIONS, *_OWN_SAMPLES)
            )
        )
        if common:
            return Prompt(*min(common), joined=joined)
    raise ValueError(
        f"With the prompt {text!r}, the prompt's token ids depend on the caption, so the prompt "
        "cannot be saved in a tokenizer. Choose another prompt of the embedder."
    )


def write_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, max_length: int
) -> PreTrainedTokenizerFast:
    """Return a tokenizer that strips each text, puts the prompt around it, and pads right.

    The tokenizer has transformers' generic fast class, because the classes of some families rebuild
    their post-processor on loading and would lose the prompt.

    A tokenizer strips each piece between added tokens, not the whole text: whitespace next to an
    added token in a caption is lost, and whitespace that is an added token is not stripped. So
    added whitespace tokens become ordinary tokens if that changes nothing else.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["normalized"] = False  # otherwise, the normalizers below change the token itself
    backend = _without_added_whitespace(Tokenizer.from_str(json.dumps(content)))
    stripped: list[Any] = [normalizers.Strip()]
    if prompt.joined:
        stripped.append(normalizers.Prepend(prompt.joined))
        _warn_of_added_tokens(backend, prompt)
    if backend.normalizer is not None:
        stripped.append(backend.normalizer)
    backend.normalizer = normalizers.Sequence(stripped)
    backend.post_processor = _enclose(backend, prompt)
    backend.no_padding()
    backend.no_truncation()
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
        **_named_special_tokens(tokenizer),
    )
    result.model_input_names = ["input_ids", "attention_mask"]
    return result


def _warn_of_added_tokens(backend: Tokenizer, prompt: Prompt) -> None:
    added = [t["content"] for t in json.loads(backend.to_str())["added_tokens"] if not t["special"]]
    if added:
        warnings.warn(
            f"The end of the prompt, {prompt.joined!r}, is repeated after any of "
            f"{counted(len(added), 'added token')} in a caption (such as {added[0]!r}), unlike in "
            "sentence-transformers. Remove such tokens from captions.",
            stacklevel=2,
        )


def _without_added_whitespace(backend: Tokenizer) -> Tokenizer:
    """Remove added whitespace tokens, such as Gemma's line breaks, if the ids stay the same."""
    content = json.loads(backend.to_str())
    added = content["added_tokens"]
    spaces = [t["content"] for t in added if t["content"].isspace() and not t["special"]]
    if not spaces:
        return backend
    content["added_tokens"] = [t for t in added if t["content"] not in spaces]
    plain = Tokenizer.from_str(json.dumps(content))
    signs = set("".join(spaces))
    # Some texts could yield tokens that mix whitespace and letters, which the samples may not show.
    is_mixed = any(signs & set(p) and not p.isspace() for p in plain.get_vocab())
    samples = [f"A dog.{space}{other}two" for space in spaces for other in ("", *spaces)]
    same = all(
        plain.encode(sample, add_special_tokens=False).ids
        == backend.encode(sample, add_special_tokens=False).ids
        for sample in samples
    )
    return plain if same and not is_mixed else backend


def _enclose(backend: Tokenizer, prompt: Prompt) -> TemplateProcessing:
    pieces = {"prompt_prefix": prompt.prefix_ids, "prompt_suffix": prompt.suffix_ids}
    special = [
        {"id": name, "ids": list(ids), "tokens": [backend.id_to_token(i) for i in ids]}
        for name, ids in pieces.items()
        if ids
    ]
    single = [name for name in ("prompt_prefix", "$A", "prompt_suffix") if pieces.get(name, True)]
    return TemplateProcessing(single=single, pair=[*single, "$B"], special_tokens=special)


def _named_special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    named = {
        name: str(token)
        for name in ("bos_token", "eos_token", "unk_token")
        if (token := getattr(tokenizer, name, None)) is not None
    }
    # Without a padding token, the end token is used, as in the official code; it is masked.
    padding = tokenizer.pad_token or tokenizer.eos_token
    if padding is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has neither a padding nor an end token. Set "
            "tokenizer.pad_token, or pad_token in its tokenizer_config.json, to a token in its "
            "vocabulary."
        )
    return {**named, "pad_token": str(padding)}


def _split_around_caption(
    tokenizer: PreTrainedTokenizerBase, template: str, caption: str, *, joined: str = ""
) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the possible ids before and after a caption; none if a token spans prompt and caption.

    There are several possibilities if the caption, such as "-", also occurs in the prompt.
    """
    whole = tokenizer(template.replace("{text}", caption), verbose=False)["input_ids"]
    if len(whole) > 1 and whole[0] == whole[1] == tokenizer.bos_token_id:
        whole = whole[1:]  # both the template and the tokenizer add the beginning token
    inner = tokenizer(joined + caption, add_special_tokens=False)["input_ids"]
    return {
        (tuple(whole[:start]), tuple(whole[start + len(inner) :]))
        for start in range(len(whole) - len(inner) + 1)
        if whole[start : start + len(inner)] == inner
    }


def _render_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ValueError("prompt=chat-template: the tokenizer has no chat template.")
    marker = "CAPTION-GOES-HERE"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=False
    )
    if not isinstance(rendered, str) or rendered.count(marker) != 1:
        raise ValueError("The tokenizer's chat template does not contain the text exactly once.")
    return rendered.replace(marker, "{text}")

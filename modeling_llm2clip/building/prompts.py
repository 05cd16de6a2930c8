"""The prompt around every caption, written into the tokenizer that is saved.

A prompt is chosen explicitly and never guessed from a model's name: the official code chose it by
the path of the model, and a renamed folder gave other embeddings.
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

# Captions of several forms on which the prompt's ids must come out the same.
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
    """Token ids that enclose every caption.

    Attributes:
        prefix_ids: Attended to, not pooled.
        suffix_ids: Attended to and pooled, as the official code pools its end-of-turn token.
        joined: Text between prefix and caption that is tokenized with the caption.
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
    """Turn a choice of prompt into a template with `{text}` in it.

    The choice is a name in `PROMPT_PRESETS`, `"chat-template"` for the tokenizer's own, or None
    with prefix or suffix.
    """
    if prefix is not None or suffix is not None:
        if prompt is not None:
            raise ValueError(f"Give a prompt name ({prompt!r}) or prefix and suffix, not both.")
        return f"{prefix or ''}{{text}}{suffix or ''}"
    if prompt == CHAT_TEMPLATE:
        return _render_chat_template(tokenizer)
    if prompt not in PROMPT_PRESETS:
        raise ValueError(
            f"prompt={prompt!r} must be one of {PROMPT_NAMES}, or give prompt_prefix and "
            "prompt_suffix. It is never guessed: the embeddings depend on it."
        )
    return PROMPT_PRESETS[prompt]


def derive_prompt(tokenizer: PreTrainedTokenizerBase, template: str) -> Prompt:
    """Find the ids that a template puts around any caption, and verify them on several."""
    looking_special = re.findall(r"<[^<>]+>", template.replace("{text}", ""))
    unknown = [
        token
        for token in looking_special
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1
    ]
    if unknown:
        raise ValueError(
            f"The prompt has {unknown}, which this tokenizer does not know as special tokens: "
            "the prompt belongs to another family of models. Choose another prompt."
        )
    splits = {c: _split_around_caption(tokenizer, template, c) for c in _SAMPLE_CAPTIONS}
    if merged := [caption for caption, places in splits.items() if not places]:
        raise ValueError(
            f"With the template {template!r} this tokenizer merges the caption {merged[0]!r} with "
            "its prompt. Put a special token or a newline next to {text}."
        )
    if not (common := set.intersection(*splits.values())):
        raise ValueError(
            f"With the template {template!r} this tokenizer gives no fixed ids around a caption, "
            f"but {list_first(sorted(set.union(*splits.values())))}. Put a special token or a "
            "newline next to {text}."
        )
    return Prompt(*min(common))


def derive_own_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, is_pooled: bool) -> Prompt:
    """Find the ids that an embedder puts around any caption after a prompt of plain text.

    The prompt's last word stays text, because it may share a token with the caption, such as " a"
    after a space. A prompt that is not pooled becomes ids entirely, because the model counts them.
    """
    # Where the words after the first begin, with the space before them; the last first.
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
        f"With the prompt {text!r} this tokenizer puts no fixed tokens around a caption, so the "
        "prompt cannot be saved in a tokenizer. Choose another prompt of the embedder."
    )


def write_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, max_length: int
) -> PreTrainedTokenizerFast:
    """Return a tokenizer that strips each text, encloses it in the prompt, and pads right.

    The generic fast class is returned, because the classes of some families rebuild their
    post-processor on loading and would lose the prompt.

    A tokenizer strips each piece between added tokens, not the whole text: whitespace beside an
    added token inside a caption is lost, and whitespace that is an added token stays at the ends.
    So added tokens of whitespace become ordinary ones where that changes nothing else.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["normalized"] = False  # or the normalizers below would change the token itself
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
            f"In captions that contain one of {counted(len(added), 'added token')} (such as "
            f"{added[0]!r}), the end of the prompt, {prompt.joined!r}, is repeated after it, which "
            "sentence-transformers does not do. Remove such tokens from captions.",
            stacklevel=2,
        )


def _without_added_whitespace(backend: Tokenizer) -> Tokenizer:
    """Leave added tokens of whitespace, such as Gemma's line breaks, to the model if it can."""
    content = json.loads(backend.to_str())
    added = content["added_tokens"]
    spaces = [t["content"] for t in added if t["content"].isspace() and not t["special"]]
    if not spaces:
        return backend
    content["added_tokens"] = [t for t in added if t["content"] not in spaces]
    plain = Tokenizer.from_str(json.dumps(content))
    signs = set("".join(spaces))
    # Some texts would give a token of whitespace and letters, which no sample would show.
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
    # A decoder without a padding token uses its end token, as the official code does: it is masked.
    padding = tokenizer.pad_token or tokenizer.eos_token
    if padding is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has neither a padding nor an end token. Set "
            "tokenizer.pad_token, or pad_token in its tokenizer_config.json, to a token of its "
            "vocabulary first."
        )
    return {**named, "pad_token": str(padding)}


def _split_around_caption(
    tokenizer: PreTrainedTokenizerBase, template: str, caption: str, *, joined: str = ""
) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the ids before and after a caption; nothing if a token spans prompt and caption.

    A caption that the prompt repeats, such as "-", splits it in several places.
    """
    whole = tokenizer(template.replace("{text}", caption), verbose=False)["input_ids"]
    if len(whole) > 1 and whole[0] == whole[1] == tokenizer.bos_token_id:
        whole = whole[1:]  # the template's own beginning token doubled the tokenizer's
    inner = tokenizer(joined + caption, add_special_tokens=False)["input_ids"]
    return {
        (tuple(whole[:start]), tuple(whole[start + len(inner) :]))
        for start in range(len(whole) - len(inner) + 1)
        if whole[start : start + len(inner)] == inner
    }


def _render_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ValueError("prompt='chat-template', but the tokenizer has no chat template.")
    marker = "CAPTION-GOES-HERE"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=False
    )
    if not isinstance(rendered, str) or rendered.count(marker) != 1:
        raise ValueError("The tokenizer's chat template does not show the text exactly once.")
    return rendered.replace(marker, "{text}")

"""A prompt written into a tokenizer gives the ids of the formatted string, for every caption."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY_SIZE, tiny_llm, tiny_model, tiny_tokenizer, tiny_vision
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_llm2clip.building.build_model import join_towers
from modeling_llm2clip.building.prompts import (
    PROMPT_PRESETS,
    Prompt,
    derive_own_prompt,
    derive_prompt,
    resolve_template,
    write_prompt,
)
from modeling_llm2clip.configs.build_config import BuildConfig
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor

CAPTIONS = [
    "a dog", "Two red apples lie on a wooden table.", "  spaces around \n", "東京の夜景 \U0001f5fc",
    "7 [cats] & <dogs>", "line\nbreak", "!",
]  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>{% endfor %}"
)
_TEXTS = ["▁a▁dog", "▁two▁red▁apples▁on▁a▁table", "user", "▁[INST]", "▁[/INST]"]


def sentencepiece_tokenizer(
    normalizer: normalizers.Normalizer, special_tokens: list[str]
) -> PreTrainedTokenizerFast:
    """Build a BPE of characters and bytes with spaces as "▁", as SentencePiece makes them."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    begin, end = special_tokens[:2]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    special = ["<unk>", *special_tokens, *bytes_]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    # One word a text, so that no merge runs across words.
    tokenizer.train_from_iterator(
        ["▁" + word for text in _TEXTS for word in text.split("▁") if word], trainer
    )
    tokenizer = as_ordinary(tokenizer, ordinary=bytes_)
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, unk_token="<unk>"
    )


def as_ordinary(tokenizer: Tokenizer, *, ordinary: list[str]) -> Tokenizer:
    """Take the special mark from some tokens, which keep their ids."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in ordinary]
    return Tokenizer.from_str(json.dumps(content))


def llama2_tokenizer() -> PreTrainedTokenizerFast:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return sentencepiece_tokenizer(normalizer, ["<s>", "</s>"])


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    return sentencepiece_tokenizer(
        normalizers.Replace(" ", "▁"), ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    )


def add_tokens(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> PreTrainedTokenizerFast:
    """Add tokens that are not special, as Gemma's line breaks and Phi's runs of spaces."""
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in tokens])
    return tokenizer


def gemma_tokenizer_with_line_breaks() -> PreTrainedTokenizerFast:
    """Line breaks are pieces of the model, and added tokens at the same ids."""
    bare = gemma_tokenizer()
    content = json.loads(bare.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {"\n": len(vocabulary), "\n\n": len(vocabulary) + 1}
    content["model"]["merges"].append(["\n", "\n"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), **bare.special_tokens_map
    )
    return add_tokens(tokenizer, "\n", "\n\n")


def beginless_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level without a beginning token, as Qwen's."""
    return tiny_tokenizer(begins=False)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama-3": tiny_tokenizer,
    "chatml": beginless_tokenizer,
    "phi-3": tiny_tokenizer,
    "mistral": llama2_tokenizer,
    "llama-2": llama2_tokenizer,
    "gemma": gemma_tokenizer,
}
PRESETS_AND_TOKENIZERS = [*TOKENIZERS.items()] + [
    ("none", make) for make in dict.fromkeys(TOKENIZERS.values())
]
every_preset = pytest.mark.parametrize(("preset", "make"), PRESETS_AND_TOKENIZERS)


@cache
def write(
    preset: str, make: Callable[[], PreTrainedTokenizerFast]
) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast, Prompt]:
    """The bare tokenizer, the one with the prompt in it (at most 24 tokens), the prompt."""
    bare = make()
    prompt = derive_prompt(bare, resolve_template(bare, preset))
    return bare, write_prompt(bare, prompt, max_length=24), prompt


def ids_of_formatted(bare: PreTrainedTokenizerFast, preset: str, caption: str) -> list[int]:
    ids: list[int] = bare(PROMPT_PRESETS[preset].replace("{text}", caption.strip()))["input_ids"]
    return ids


def test_every_preset_is_tried() -> None:
    assert {preset for preset, _ in PRESETS_AND_TOKENIZERS} == set(PROMPT_PRESETS)


@every_preset
def test_the_ids_are_those_of_the_formatted_string(
    preset: str, make: Callable[[], PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    bare, written, prompt = write(preset, make)
    for caption in CAPTIONS:
        assert written(caption)["input_ids"] == ids_of_formatted(bare, preset, caption)
    inner = bare("a dog", add_special_tokens=False)["input_ids"]
    assert written("a dog")["input_ids"] == [*prompt.prefix_ids, *inner, *prompt.suffix_ids]
    assert written("a dog", add_special_tokens=False)["input_ids"] == inner
    begins = make is not beginless_tokenizer
    assert (bare.bos_token_id in prompt.prefix_ids) is begins
    assert bool(prompt.suffix_ids) == (preset != "none")
    assert preset != "none" or len(prompt.prefix_ids) == begins
    truncated = tuple(written("dog " * 100, truncation=True)["input_ids"])
    assert len(truncated) == 24
    assert truncated[: len(prompt.prefix_ids)] == prompt.prefix_ids
    assert truncated[24 - len(prompt.suffix_ids) :] == prompt.suffix_ids
    written.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 24 and loaded.padding_side == "right"
    settings_ = {"padding": True, "truncation": True}
    texts = [*CAPTIONS, "dog " * 100]
    assert dict(loaded(texts, **settings_)) == dict(written(texts, **settings_))
    assert set(loaded("a dog")) == {"input_ids", "attention_mask"}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(loaded, name) == getattr(written, name)


@given(st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), min_size=1))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("preset", ["llama-3", "gemma", "llama-2"])
def test_any_letters_digits_and_marks_give_the_ids_of_the_formatted_string(
    preset: str, caption: str
) -> None:
    bare, written, _ = write(preset, TOKENIZERS[preset])
    if caption.strip():
        assert written(caption)["input_ids"] == ids_of_formatted(bare, preset, caption)


def test_line_breaks_that_are_added_tokens_give_the_ids_of_the_formatted_string() -> None:
    bare, written, _ = write("gemma", gemma_tokenizer_with_line_breaks)
    assert bare.convert_tokens_to_ids("\n\n") in bare.added_tokens_decoder
    assert len(bare("\n\n", add_special_tokens=False)["input_ids"]) == 1
    for caption in ("a dog. \n\n a table", "a \n\n\n dog", "\n\na dog", " a dog\n"):
        assert written(caption)["input_ids"] == ids_of_formatted(bare, "gemma", caption)


def test_whitespace_that_the_model_would_tokenize_otherwise_is_kept_and_stripped() -> None:
    bare = add_tokens(tiny_tokenizer(), "\n\n", "<h1>")
    prompt = derive_prompt(bare, PROMPT_PRESETS["llama-3"])
    written = write_prompt(bare, prompt, max_length=24)
    processor = LLM2CLIPProcessor(tiny_vision()[1], written, 24)
    for caption in ("a dog.\n\na cat", "\n\n a dog\n\n", "a dog<h1>cat"):
        ids = processor(text=caption)["input_ids"][0].tolist()
        assert ids == ids_of_formatted(bare, "llama-3", caption)
    # The limit: beside an added token inside a caption, whitespace is lost, everywhere alike.
    spaced, tight = ("a dog <h1> cat", "a dog<h1>cat")
    assert written(spaced)["input_ids"] == ids_of_formatted(bare, "llama-3", tight)
    assert processor(text=spaced)["input_ids"][0].tolist() == written(spaced)["input_ids"]


def test_the_given_tokenizer_is_left_as_it_was() -> None:
    bare = tiny_tokenizer()
    before = bare("  a dog")["input_ids"]
    write_prompt(bare, derive_prompt(bare, PROMPT_PRESETS["llama-3"]), max_length=24)
    assert bare("  a dog")["input_ids"] == before


@pytest.mark.parametrize(
    ("template", "ends_special"),
    [
        ({"prompt": "llama-3"}, False),
        ({"prompt": "none"}, False),
        ({"prompt_suffix": "<|eot_id|>"}, False),
        ({"prompt_suffix": "<|end|>"}, True),
    ],
)
def test_a_model_knows_whether_its_suffix_ends_in_a_token_that_its_tokenizer_names(
    template: dict[str, str], ends_special: bool
) -> None:
    # sentence-transformers leaves such a token out when it measures an instruction. `<|end|>` is
    # the end token; `<|eot_id|>` is special too, but none of the named ones.
    model, processor = tiny_model(**template)
    suffix_ids = model.config.prompt_suffix_ids
    ends = bool(suffix_ids) and suffix_ids[-1] in processor.tokenizer.all_special_ids
    assert model.config.prompt_suffix_ends_special is ends is ends_special


def test_a_tokenizer_larger_than_the_embedding_table_builds_no_model() -> None:
    tokenizer = tiny_tokenizer(vocabulary_size=VOCABULARY_SIZE + 10)
    with pytest.raises(ValueError, match=r"ids up to 329, but the embedding table only 320 rows"):
        join_towers(tiny_vision(), (tiny_llm(), tokenizer), BuildConfig(prompt="llama-3"))


def test_extra_special_tokens_of_the_bare_tokenizer_do_not_mislead() -> None:
    bare = tiny_tokenizer()
    bare.add_special_tokens({"extra_special_tokens": ["<|eot_id|>"]})
    assert "<|eot_id|>" in bare.all_special_tokens
    model, processor = tiny_model(tokenizer=bare)
    ends = model.config.prompt_suffix_ids[-1] in processor.tokenizer.all_special_ids
    assert model.config.prompt_suffix_ends_special is ends


# Choosing a prompt


@pytest.mark.parametrize("prompt", ["llama3", None])
def test_an_unknown_or_missing_prompt_is_answered_with_the_known(prompt: str | None) -> None:
    with pytest.raises(ValueError, match=rf"prompt={prompt!r} must be one of .*'llama-3'.*'chat-"):
        resolve_template(tiny_tokenizer(), prompt)


def test_prefix_and_suffix_make_a_template_and_are_no_second_prompt() -> None:
    bare = tiny_tokenizer()
    assert resolve_template(bare, None, prefix="<|user|>") == "<|user|>{text}"
    assert resolve_template(bare, None, prefix="<|user|>\n", suffix="<|end|>") == (
        "<|user|>\n{text}<|end|>"
    )
    for piece in ({"prefix": "x "}, {"suffix": "x"}, {"prefix": ""}):
        with pytest.raises(
            ValueError, match=r"llama-3.*cannot be combined with a prefix or suffix"
        ):
            resolve_template(bare, "llama-3", **piece)


@pytest.mark.parametrize(
    ("preset", "make", "unknown"),
    [
        ("chatml", llama2_tokenizer, r"'<\|im_start\|>', '<\|im_end\|>'"),
        ("llama-3", gemma_tokenizer, r"'<\|start_header_id\|>', '<\|end_header_id\|>'"),
        ("gemma", llama2_tokenizer, r"'<start_of_turn>', '<end_of_turn>'"),
        ("phi-3", llama2_tokenizer, r"'<\|user\|>', '<\|end\|>'"),
    ],
)
def test_a_prompt_of_another_family_is_refused_with_its_unknown_tokens(
    preset: str, make: Callable[[], PreTrainedTokenizerFast], unknown: str
) -> None:
    with pytest.raises(ValueError, match=rf"{unknown}.*which are not special tokens"):
        derive_prompt(make(), PROMPT_PRESETS[preset])


@pytest.mark.parametrize("template", ["a photo of {text}", "{text}s", "t{text}"])
def test_a_prompt_that_merges_with_captions_is_refused_with_the_way_out(template: str) -> None:
    texts = ("a photo of two cats on a mat", "two mats of A dog", "mats mats ttwo ttwo")
    bare = tiny_tokenizer(texts=texts)
    with pytest.raises(ValueError, match=r"this tokenizer (merges|gives no fixed ids).*newline"):
        derive_prompt(bare, template)


# The tokenizer's own chat template


def test_the_chat_template_gives_the_ids_of_the_rendered_chat() -> None:
    bare = tiny_tokenizer()
    bare.chat_template = CHAT_TEMPLATE
    prompt = derive_prompt(bare, resolve_template(bare, "chat-template"))
    written = write_prompt(bare, prompt, max_length=64)
    for caption in ("a dog", "Two red apples."):
        rendered = bare.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=True, return_dict=True
        )["input_ids"]
        assert written(caption)["input_ids"] == rendered
    assert not written.chat_template  # with it and the processor, a prompt would stand twice
    assert prompt.prefix_ids.count(bare.bos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (None, "no chat template"),
        ("nothing", "exactly once"),
        ("{{ messages[0].content }}" * 2, "exactly once"),
    ],
)
def test_a_chat_template_that_is_not_there_or_does_not_show_the_text_once_is_refused(
    template: str | None, error: str
) -> None:
    bare = tiny_tokenizer()
    bare.chat_template = template
    with pytest.raises(ValueError, match=error):
        resolve_template(bare, "chat-template")


# Padding


def test_padding_is_the_tokenizers_own_or_its_end_token_or_refused() -> None:
    bare, written, _ = write("llama-3", tiny_tokenizer)
    assert written.pad_token == bare.pad_token == "<|pad|>"
    bare, written, _ = write("llama-2", llama2_tokenizer)
    assert bare.pad_token is None
    assert written.pad_token == bare.eos_token == "</s>"
    bare = tiny_tokenizer()
    prompt = derive_prompt(bare, PROMPT_PRESETS["llama-3"])
    bare.pad_token = bare.eos_token = None
    bare.name_or_path = "a/tokenizer"
    with pytest.raises(ValueError, match="'a/tokenizer' has neither a padding nor an end token"):
        write_prompt(bare, prompt, max_length=24)


def test_added_tokens_of_whitespace_do_not_tear_texts_apart() -> None:
    tokenizer = tiny_tokenizer()
    spaces = [AddedToken(" " * n, normalized=True, special=False) for n in (2, 3)]
    tokenizer.add_tokens(spaces)
    written = write_prompt(tokenizer, Prompt((5,), (6,)), max_length=32)
    for caption in ("a dog", "two red apples", "Édouard, 1862"):
        own = tokenizer(caption, add_special_tokens=False)["input_ids"]
        assert written(caption)["input_ids"] == [5, *own, 6]


@pytest.mark.parametrize("text", ["query - ", "doc-", "x 's y - "])
def test_a_prompt_that_repeats_a_caption_is_found_in_front_of_every_caption(text: str) -> None:
    tokenizer = tiny_tokenizer()
    prompt = derive_own_prompt(tokenizer, text, is_pooled=False)
    ids = tokenizer(f"{text}-", verbose=False)["input_ids"]
    assert [*prompt.prefix_ids, *tokenizer("-", add_special_tokens=False)["input_ids"]] == ids

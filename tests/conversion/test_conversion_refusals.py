"""What cannot be converted rightly is refused by name, with a way out, and leaves nothing."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import (
    FORMAT_OF,
    LLM,
    LLM2VEC,
    convert,
    copy_llm,
    plan,
    read_checkpoint,
    save_checkpoint,
)
from safetensors.torch import load_file, save_file
from tiny import tiny_llm, tiny_tokenizer
from transformers import AutoModel, CLIPTextConfig, CLIPTextModel

from modeling_llm2clip.__main__ import main
from modeling_llm2clip.configs.source_format import SOURCE_FORMATS
from modeling_llm2clip.conversion.source_checkpoint import (
    CheckpointSource,
    open_checkpoint,
    split_revision,
)
from modeling_llm2clip.conversion.source_llm import LLMSource, open_language_model
from modeling_llm2clip.model_folders.weights import open_weights

ROOT = Path(__file__).parents[2]


def refuse(family: str, folder: Path, match: str, **settings: Any) -> None:
    """Plan a conversion of a family's checkpoint, which must be refused in these words."""
    state = settings.pop("state", None)
    settings.setdefault("source_format", FORMAT_OF[family])
    source = save_checkpoint(family, folder / "source", state)
    with pytest.raises(ValueError, match=match):
        plan(source, **settings)


def test_an_llm_of_another_width_than_the_adapters(tmp_path) -> None:
    llm = tmp_path / "wide"
    tiny_llm(vocabulary_size=320).save_pretrained(llm)
    tiny_tokenizer().save_pretrained(llm)
    state = {k: v for k, v in read_checkpoint("openai").items() if "text_adaptor" not in k}
    wide = {"0.fn.0.weight": (128, 64), "0.fn.0.bias": (128,), "0.fn.3.weight": (64, 128),
            "0.fn.3.bias": (64,), "0.ln.weight": (64,), "0.ln.bias": (64,), "1.weight": (64,),
            "1.bias": (64,), "2.weight": (20, 64), "2.bias": (20,)}  # fmt: skip
    state |= {f"text.text_adaptor.{k}": torch.zeros(shape) for k, shape in wide.items()}
    refuse("openai", tmp_path, "takes embeddings of 64, but .*wide gives 32",
           state=state, llm=LLMSource(llm))  # fmt: skip


def test_the_refusal_of_a_width_names_llms_that_have_it(tmp_path) -> None:
    state = {f"text.text_adaptor.{k}": torch.zeros(shape) for k, shape in {
        "0.fn.0.weight": (4096, 2048), "2.weight": (20, 2048)}.items()}  # fmt: skip
    state |= {k: v for k, v in read_checkpoint("openai").items() if "text_adaptor" not in k}
    refuse(
        "openai", tmp_path, r"takes embeddings of 2048, .*gives 32.*\n?.*Llama-3\.2-1B", state=state
    )


def test_a_clip_text_tower_where_an_llm_belongs(tmp_path) -> None:
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=320,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    refuse("openai", tmp_path, "is a 'clip_text_model'; LLM2CLIP needs a decoder",
           llm=LLMSource(tmp_path / "text"))  # fmt: skip


@pytest.mark.parametrize("where", ["checkpoint", "llm"])
def test_truncated_safetensors(tmp_path, where) -> None:
    llm = copy_llm(tmp_path / "llama")
    source = save_checkpoint("hub_clip", tmp_path / "source")
    path = (source if where == "checkpoint" else llm) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged .*SHA-256"):
        plan(source, source_format=FORMAT_OF["hub_clip"], llm=LLMSource(llm))


@pytest.mark.parametrize("content", [b"", b"hello", b"version https://git-lfs.github.com/spec/v1"])
def test_a_file_that_is_no_pytorch_file(tmp_path, content) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    error = f"c.pt is not a PyTorch file of weights: it begins with {content[:40]!r}"
    with pytest.raises(ValueError, match=re.escape(error)):
        open_weights(tmp_path / "c.pt")


@pytest.mark.parametrize("content", [b"PK\x03\x04 broken zip", b"\x80\x02 broken pickle"])
def test_a_broken_pytorch_file(tmp_path, content) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.pt (is not a whole|holds more than)"):
        open_weights(tmp_path / "c.pt")


def test_a_truncated_training_checkpoint(tmp_path) -> None:
    source = save_checkpoint("openai", tmp_path)
    source.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="is not a whole PyTorch file"):
        open_weights(source)


class _Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(tmp_path, legacy) -> None:
    mark = tmp_path / "was-run"
    content = {"state_dict": read_checkpoint("openai"), "hook": _Payload(str(mark))}
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"holds more than weights .*run code from the file"):
        open_weights(tmp_path / "c.pt")
    assert not mark.exists()
    with (tmp_path / "plain.pt").open("wb") as file:
        pickle.dump(_Payload(str(mark)), file)
    with pytest.raises(ValueError, match=r"plain\.pt (holds more than|is not a whole)"):
        open_weights(tmp_path / "plain.pt")
    assert not mark.exists()


def test_arguments_of_a_training_run_are_more_than_weights(tmp_path) -> None:
    content = {"state_dict": read_checkpoint("openai"), "args": Namespace(lr=1e-5)}
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"argparse\.Namespace.*Save its state dict alone"):
        open_weights(tmp_path / "c.pt")


def test_an_older_pytorch_file_of_weights_alone_is_read(tmp_path) -> None:
    state = read_checkpoint("openai")
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    assert set(open_weights(tmp_path / "c.pt")) == set(state)


def test_a_file_without_weights(tmp_path) -> None:
    torch.save({"epoch": 3, "lr": 1e-5}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"wanted a state dict.*other entries \['epoch', 'lr'\]"):
        open_weights(tmp_path / "c.pt")


def test_names_of_which_only_some_are_wrapped(tmp_path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"1 of 2 names begin with 'module\.'"):
        open_weights(tmp_path / "c.pt")


def test_a_lora_for_another_base_by_name(tmp_path) -> None:
    llm = copy_llm(tmp_path / "Llama-3.1-8B")
    source = LLMSource(llm, loras=(LLM2VEC / "llama_lora",))
    refuse("openai", tmp_path, r"is for the base 'llama', but the LLM is .*Llama-3\.1-8B'",
           llm=source)  # fmt: skip
    accepted = replace(source, accept_lora_base="llama")
    assert plan(tmp_path / "source" / "epoch_3.pt", source_format=FORMAT_OF["openai"], llm=accepted)


def test_a_lora_for_another_base_by_shape(tmp_path) -> None:
    adapter = Path(shutil.copytree(LLM2VEC / "llama_lora", tmp_path / "lora"))
    factors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in factors if name.endswith("q_proj.lora_A.weight"))
    factors[name] = torch.ones(4, 48)
    save_file(factors, adapter / "adapter_model.safetensors")
    refuse("openai", tmp_path, r"is for another LLM: .*q_proj\.lora_A.*Give the LLM that it was",
           llm=LLMSource(LLM, loras=(adapter,)))  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lora_bias", True),
        ("bias", "all"),
        ("modules_to_save", ["norm"]),
        ("init_lora_weights", "pissa_niter_4"),
    ],
)
def test_a_lora_that_is_more_than_a_lora(tmp_path, setting, value) -> None:
    adapter = Path(shutil.copytree(LLM2VEC / "llama_lora", tmp_path / "lora"))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    refuse("openai", tmp_path, f"more than the low-rank matrices of a LoRA .*{setting}",
           llm=LLMSource(LLM, loras=(adapter,)))  # fmt: skip


@pytest.mark.parametrize("family", FORMAT_OF)
@pytest.mark.parametrize("chosen", FORMAT_OF)
def test_keys_of_another_family(tmp_path, family, chosen) -> None:
    source = save_checkpoint(family, tmp_path)
    if family == chosen:
        assert plan(source, source_format=FORMAT_OF[chosen])
        return
    with pytest.raises(ValueError, match=f"of the family '{family}', the source format is for"):
        plan(source, source_format=FORMAT_OF[chosen])


def test_keys_of_no_family_are_shown(tmp_path) -> None:
    state = {"encoder.weight": torch.ones(2)}
    refuse("openai", tmp_path, r"0 known families.*encoder\.weight.*llm2clip build", state=state)


def test_keys_without_an_account_are_all_printed(tmp_path) -> None:
    extra = {f"visual.extra_{i}": torch.ones(i) for i in range(1, 30)}
    source = save_checkpoint("eva02", tmp_path, {**read_checkpoint("eva02"), **extra})
    with pytest.raises(ValueError, match="29 of 114 keys that are neither used") as refused:
        plan(source, source_format=FORMAT_OF["eva02"])
    assert all(f"{name} ({i},)" in str(refused.value) for i, name in enumerate(extra, 1))


def test_a_missing_weight_is_named(tmp_path) -> None:
    state = read_checkpoint("openai")
    del state["visual.ln_post.bias"]
    refuse("openai", tmp_path, r"(?s)1 missing:\s+vision_model\.post_layernorm\.bias", state=state)


def test_an_unknown_weight_of_a_timm_tower_is_named_as_it_was(tmp_path) -> None:
    state = {**read_checkpoint("siglip2"), "visual.trunk.extra": torch.ones(1)}
    refuse("siglip2", tmp_path, r"(?s)1 without a place:\s+visual\.trunk\.extra", state=state)


def test_both_layouts_of_one_bias_are_a_mixture(tmp_path) -> None:
    state = read_checkpoint("eva02")
    state["visual.blocks.0.attn.q_bias"] = state["visual.blocks.0.attn.q_proj.bias"]
    refuse("eva02", tmp_path, "would both become .*q_proj.bias", state=state)


def test_an_llm_of_another_size_than_its_configuration(tmp_path) -> None:
    llm = copy_llm(tmp_path / "llama")
    path = llm / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 40}))
    refuse("openai", tmp_path, r"(?s)6 of another shape:.*mlp\.down_proj", llm=LLMSource(llm))


def test_a_checkpoint_without_its_adapter(tmp_path) -> None:
    state = {k: v for k, v in read_checkpoint("eva02").items() if not k.startswith("text.")}
    refuse("eva02", tmp_path, "has no text adapter .*a bare vision tower", state=state)


def test_a_lora_where_its_base_belongs(tmp_path) -> None:
    refuse("openai", tmp_path, "is a LoRA, not a whole LLM. Give its base",
           llm=LLMSource(LLM2VEC / "llama_lora"))  # fmt: skip


def test_a_lora_beside_an_llm_that_the_checkpoint_holds(tmp_path) -> None:
    refuse("siglip2", tmp_path, "holds the LLM's weights, merged",
           llm=LLMSource(LLM, loras=(LLM2VEC / "llama_lora",)))  # fmt: skip


def test_a_temperature_that_no_training_leaves(tmp_path) -> None:
    state = {**read_checkpoint("openai"), "logit_scale": torch.tensor(9.0)}
    refuse("openai", tmp_path, "logit_scale 9, but training keeps it between 0 and ln 100",
           state=state)  # fmt: skip


def test_preprocessing_that_nobody_chose(tmp_path) -> None:
    source_format = replace(FORMAT_OF["siglip2"], preprocessing=None)
    refuse(
        "siglip2",
        tmp_path,
        "Choose the preprocessing .*'openai'.*'half'",
        source_format=source_format,
    )
    assert SOURCE_FORMATS["siglip2"].preprocessing is None


def test_a_head_width_that_does_not_divide_the_tower(tmp_path) -> None:
    source_format = replace(FORMAT_OF["openai"], head_width=7)
    refuse(
        "openai", tmp_path, "24 wide, which heads of 7 do not divide", source_format=source_format
    )


def test_an_activation_that_contradicts_the_repository(tmp_path) -> None:
    source_format = replace(FORMAT_OF["hub_clip"], activation="gelu")
    refuse("hub_clip", tmp_path, "hidden_act='quick_gelu', the source format has activation='gelu'",
           source_format=source_format)  # fmt: skip


def test_a_prompt_of_another_familys_tokens(tmp_path) -> None:
    source_format = replace(FORMAT_OF["openai"], prompt=None, prompt_prefix="<|no such token|>")
    refuse("openai", tmp_path, "does not know as special tokens", source_format=source_format)


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(ValueError, match="no such folder, and no Hub id"):
        open_checkpoint(CheckpointSource(tmp_path / "c.pt"))
    with pytest.raises(ValueError, match=r"c\.pt: no such file"):
        open_checkpoint(CheckpointSource(tmp_path, file="c.pt"))
    with pytest.raises(ValueError, match="the weight file itself"):
        open_checkpoint(CheckpointSource(tmp_path))


def test_a_lost_shard_is_named(tmp_path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00001-of-00002"):
        open_weights(tmp_path)


def test_an_existing_target_is_not_touched(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        convert(tmp_path / "no-such.pt", tmp_path / "model", source_format=FORMAT_OF["openai"])
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine"]


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch) -> None:
    source = save_checkpoint("openai", tmp_path / "source")
    usage = shutil.disk_usage(tmp_path)._replace(free=60 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"has 0\.06 GB free, the model takes 0\.07 GB"):
        convert(source, tmp_path / "model", source_format=FORMAT_OF["openai"])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


CONVERT_UNDER_A_LIMIT = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from modeling_llm2clip.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
FLAGS = ["--recipe", "openai", "--llm", str(LLM), "--head-width", "12", "--max-text-length", "200"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of POSIX")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path) -> None:
    source = save_checkpoint("openai", tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "-c", CONVERT_UNDER_A_LIMIT, "convert", str(source),
         str(tmp_path / "model"), *FLAGS],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "model.safetensors could not be written" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def kill_conversion(tmp_path: Path, at: str) -> Path:
    """Kill a conversion once a file of the unfinished folder is there; return that folder."""
    source = save_checkpoint("openai", tmp_path / "source")
    command = [sys.executable, "-m", "modeling_llm2clip", "convert", str(source)]
    with subprocess.Popen(
        [*command, str(tmp_path / "model"), *FLAGS], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob(f".model-*/model/{at}")) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "model").exists()
    (left,) = tmp_path.glob(".model-*/model")
    return left


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
def test_a_conversion_killed_in_its_weights_leaves_nothing_that_loads(tmp_path) -> None:
    left = kill_conversion(tmp_path, at="*")
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(left)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX")
def test_a_conversion_killed_before_its_examination_has_no_target(tmp_path) -> None:
    left = kill_conversion(tmp_path, at="config.json")
    assert (left / "config.json").exists()


def test_a_bad_source_is_one_line_and_exit_code_2(tmp_path, capsys) -> None:
    source = save_checkpoint("eva02", tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "model"), *FLAGS]) == 2
    assert "Choose the source format 'eva02'" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "model"), "--recipe", "eva02"]) == 2
    assert "give --llm" in capsys.readouterr().err


LLM2VEC_FLAGS = ["--recipe", "llm2vec", "--vision", "no-such-tower", "--prompt", "llama-3"]


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--license", "Apache 2"], "--license 'Apache 2' must be an identifier"),
        (["--license", "other"], "needs --license-name and --license-link"),
        (["--license", "mit", "--push", "bad name"], "--push 'bad name' must be 'owner/name'"),
    ],
)
@pytest.mark.parametrize("recipe", [FLAGS, LLM2VEC_FLAGS], ids=["checkpoint", "llm2vec"])
def test_what_cannot_be_published_is_refused_before_a_source_is_opened(
    tmp_path, capsys, recipe, flags, match
) -> None:
    # There is no source: whatever opened it would complain of that.
    command = ["convert", str(tmp_path / "no-such.pt"), str(tmp_path / "model"), *recipe, *flags]
    assert main(command) == 2
    assert match in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "flags", "match"),
    [
        (FLAGS, [], "states no license"),
        # With a license too: what is built is untrained.
        (LLM2VEC_FLAGS, ["--license", "mit"], "makes an untrained model, and none is published"),
    ],
    ids=["checkpoint", "llm2vec"],
)
def test_a_model_that_may_not_be_published_is_not_pushed(
    tmp_path, capsys, recipe, flags, match
) -> None:
    command = ["convert", str(tmp_path / "no-such.pt"), str(tmp_path / "model"), *recipe, *flags]
    assert main([*command, "--push", "me/model"]) == 2
    assert match in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-text-length", "77"],
        ["--text-pooling", "mean"],
        ["--preprocessing", "half"],
        ["--components", "text"],
        ["--revision", "main"],
        ["--file", "a.pt"],
        ["--llm-revision", "main"],
        ["--llm-lora", "a/lora"],
        ["--activation", "gelu"],
        ["--head-width", "64"],
        ["--rope-reference-size", "16"],
    ],
    ids=lambda flags: flags[0],
)
def test_a_flag_that_llm2vec_has_no_use_for_is_named(tmp_path, capsys, flags) -> None:
    command = ["convert", str(LLM), str(tmp_path / "model"), *LLM2VEC_FLAGS, *flags]
    assert main(command) == 2
    assert f"has no use for {flags[0]}:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "flag"), [("openai-hub", "--head-width"), ("openai", "--rope-reference-size")]
)
def test_a_flag_of_another_recipe_is_named(tmp_path, capsys, recipe, flag) -> None:
    command = ["convert", "no-such.pt", str(tmp_path / "model"), "--recipe", recipe]
    assert main([*command, "--llm", str(LLM), flag, "8"]) == 2
    assert f"{flag} goes with the recipes" in capsys.readouterr().err


def test_a_local_source_has_no_revision(tmp_path) -> None:
    file = save_checkpoint("openai", tmp_path)
    for source in (CheckpointSource(file, revision="deadbeef"),
                   CheckpointSource(tmp_path, file.name, "deadbeef")):  # fmt: skip
        with pytest.raises(ValueError, match="has no revision 'deadbeef'"):
            open_checkpoint(source)
    with pytest.raises(ValueError, match="has no revision 'deadbeef'"):
        open_language_model(LLMSource(LLM, "deadbeef"))


def test_the_revision_of_a_lora_stands_behind_its_hub_id(tmp_path) -> None:
    assert split_revision("me/lora@abc") == ("me/lora", "abc")
    assert split_revision("me/lora") == ("me/lora", None)
    (tmp_path / "a@b").mkdir()
    assert split_revision(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), None)
    with pytest.raises(ValueError, match="no revision after its '@'"):
        split_revision("me/lora@")
    with pytest.raises(ValueError, match="has no revision 'abc'"):
        split_revision(f"{tmp_path}@abc")


def test_a_repository_of_bin_files_alone_is_told_to_be_downloaded(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"\.bin files are not fetched: download"):
        open_weights(tmp_path)

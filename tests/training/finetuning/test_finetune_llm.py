"""Stage 1: the files of a run, its start and resumption, and the merged LoRA."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from aligning import read_losses
from safetensors.torch import load_file
from tiny import tiny_model
from tuning import FLAGS, RECORDS, SHORT, Tuned, hold_out_short, tune, write_captions, write_pairs

from modeling_llm2clip import LLM2CLIPConfig
from modeling_llm2clip.__main__ import main
from modeling_llm2clip.base_llm2clip import read_instructions
from modeling_llm2clip.data.captions.text_pairs import TextPair
from modeling_llm2clip.encoding.encode import encode_texts
from modeling_llm2clip.evaluation.tasks.retrieval import measure_caption_retrieval
from modeling_llm2clip.model_folders.model_card import CardData, read_card_data
from modeling_llm2clip.model_folders.model_loading import load_model
from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor
from modeling_llm2clip.publishing.export_model import export_model, save_model
from modeling_llm2clip.training.finetuning import finetune_llm as stage
from modeling_llm2clip.training.finetuning.finetune_llm import (
    WORSE,
    WORSE_BY_MERGING,
    describe_finetuning,
    finetune_llm,
)
from modeling_llm2clip.training.run_folder import add_results, read_results


def test_a_run_leaves_lora_record_and_metrics(tuned):
    lora = json.loads((tuned.lora / "adapter_config.json").read_text())
    # peft writes a set of strings, whose order differs between processes.
    assert lora["target_modules"] == sorted(lora["target_modules"])
    assert any(name.endswith("q_proj") for name in lora["target_modules"])
    record = json.loads((tuned.output / "run.json").read_text())
    assert record["parameters"]["all"]["trainable"] > 0
    assert record["config"]["lora_rank"] == 16
    assert set(record["parameters"]) > {"text_model", "all"}
    losses = read_losses(tuned.output)
    assert len(losses) == 6 and losses[6] < losses[1]
    assert record["results"] == tuned.results and tuned.results["num_trained"] == 20
    assert 0 <= tuned.results["cra_before"] <= tuned.results["cra_after"] <= 1


@pytest.mark.parametrize(("after", "is_worse"), [(0.4, True), (0.5, False), (0.6, False)])
def test_a_lower_accuracy_triggers_a_warning(after, is_worse, tuned, tmp_path):
    output = Path(shutil.copytree(tuned.output, tmp_path / "run"))
    add_results(output, cra_before=0.5, cra_after=after)
    assert (WORSE in describe_finetuning(output)) == is_worse
    add_results(output, cra_unmerged=0.6)
    lines = describe_finetuning(output)
    assert WORSE not in lines and (WORSE_BY_MERGING in lines) == is_worse
    add_results(output, cra_unmerged=0.4)  # merging may also help
    lines = describe_finetuning(output)
    assert WORSE_BY_MERGING not in lines and (WORSE in lines) == is_worse


def require_same_weights(first: Tuned, second: Tuned) -> None:
    ours, theirs = (load_file(run.weights) for run in (first, second))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_hard_batches_start_from_a_lora_and_resume_bit_for_bit(tuned, tmp_path):
    hard = replace(
        SHORT, num_hard_negatives=3, learning_rate=1e-3, init_lora=tuned.lora, logging_steps=4
    )
    first = tune(tmp_path / "first", hard)
    assert first.results["cra_before"] == tuned.results["cra_after"]
    nearest = np.load(first.output / "nearest_groups.npy")
    assert nearest.shape == (20, 6)  # twice the sampled number, for each trained image
    assert first.results["hard_negatives"] == {"method": "exact"}
    again = first.copy_unfinished(tmp_path / "again")
    resumed = tune(again, hard, resume=True)
    require_same_weights(resumed, first)
    assert resumed.results == first.results
    assert read_losses(again) == read_losses(first.output)  # a logging window spans the checkpoint
    with pytest.raises(ValueError, match="init_lora: '"):
        tune(again, replace(hard, init_lora=None), resume=True)


def test_a_run_deletes_only_its_own_temporary_files(tmp_path):
    output = tmp_path / "run[12]"  # a name that is also a glob pattern
    foreign = [tmp_path / ".run1-pairs-x", tmp_path / ".run[12]-pairs-mine"]
    left = output / "pairs-0.tmp" / "left"  # left by a killed run
    for folder in (*foreign, left):
        folder.mkdir(parents=True)
    stage.check_finetuning(RECORDS, SHORT)
    assert left.is_dir()
    with stage._open_scratch(output) as scratch:
        assert scratch == left.parent and not left.exists()
    assert sorted(tmp_path.iterdir()) == sorted([*foreign, output])
    assert not list(output.iterdir())


def test_the_folder_of_another_run_is_refused_with_the_differences(tuned):
    with pytest.raises(ValueError, match=r"another run: learning_rate: 0\.01 then, 0\.02 now\. C"):
        tune(tuned.output, replace(SHORT, learning_rate=2e-2), resume=True)
    with pytest.raises(ValueError, match="--resume"):
        tune(tuned.output)
    with pytest.raises(ValueError, match="data: '"):
        finetune_llm(tiny_model(), RECORDS[1:], tuned.output, SHORT, resume=True)


def test_a_card_that_cannot_be_kept_is_refused_before_training(tmp_path):
    source = save_model(*tiny_model(), tmp_path / "base")
    (source / "README.md").write_text("---\nlicense: [mit, cc-by-4.0]\n---\n")
    with pytest.raises(ValueError, match=r"base/README\.md: .*license=\['mit', 'cc-by-4\.0'\] is"):
        finetune_llm(source, RECORDS, tmp_path / "run", replace(SHORT, merge=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_merged_model_equals_the_lora_and_keeps_instructions_and_conversion_record(tmp_path):
    from peft import PeftModel

    instructions = {"query": "Find the image: "}
    card = CardData(caution="Near chance.", training_data=("first",), kept_texts="1 name (red)")
    source = save_model(*tiny_model(), tmp_path / "base", instructions=instructions, card=card)
    (source / "conversion.json").write_text("{}")
    config = replace(SHORT, merge=True)
    folder = finetune_llm(source, RECORDS, tmp_path / "run", config, data_name="second")
    assert read_card_data(folder) == CardData(
        training_data=("first", "second"), text_training_data=("second",)
    )
    assert read_instructions(folder) == instructions
    assert LLM2CLIPConfig.from_pretrained(folder).instructions == instructions
    assert (folder / "conversion_before_training.json").read_text() == "{}"
    assert not (folder / "conversion.json").exists()
    again = export_model(folder, tmp_path / "again")
    assert (again / "conversion_before_training.json").is_file()

    merged, unmerged = map(LLM2CLIPModel.from_pretrained, (folder, source))
    inputs = LLM2CLIPProcessor.from_pretrained(source)(text=["a of 3", "b of 4 five"])
    before = unmerged.get_caption_embeds(**inputs)
    PeftModel.from_pretrained(unmerged.text_model, str(tmp_path / "run" / "lora"))  # in place
    with torch.no_grad():
        adapted = unmerged.get_caption_embeds(**inputs)
        # Sums in another order over two layers, for values of about one.
        assert torch.allclose(merged.get_caption_embeds(**inputs), adapted, atol=1e-4)
    assert not torch.allclose(before, adapted, atol=1e-2)


@pytest.mark.slow
def test_a_loaded_pair_is_fine_tuned_like_its_folder_and_stays_unchanged(tuned, tmp_path):
    """The shared run started from a loaded pair."""
    model, processor = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folder = save_model(model, processor, tmp_path / "base")
    finetune_llm(folder, RECORDS, tmp_path / "folder", SHORT)
    require_same_weights(Tuned(tmp_path / "folder"), tuned)
    finetune_llm((model, processor), RECORDS, tmp_path / "pair", replace(SHORT, max_steps=1))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


LONG = "a text that has more words than a model of so few tokens can take, of which there are "


@pytest.mark.slow
def test_the_command_merges_skips_single_captions_and_counts_truncated_texts(tmp_path, capsys):
    folder = save_model(*tiny_model(max_text_length=32), tmp_path / "base")
    data = write_captions(tmp_path / "captions.jsonl", "lone", "lonely")
    with data.open("a") as file:
        for number in range(8):
            line = {"group_id": f"long {number}", "captions": [f"{number}", f"{LONG}{number}"]}
            file.write("\n" + json.dumps(line))
    pairs = [TextPair(f"q{n}", f"q{n}", f"p{n}") for n in range(4)]
    file = write_pairs(tmp_path / "pairs.jsonl", [*pairs, TextPair("q", "q", LONG * 2)])
    output = tmp_path / "tuned"
    command = ["finetune-llm", str(folder), str(data), str(output), *FLAGS]
    command += ["--text-pairs", str(file), "1"]
    assert main(command) == 2
    shown = capsys.readouterr().err
    assert "2 of 34 images have only one caption" in shown and "--skip-single" in shown
    assert "lonely (captions.jsonl line 26)" in shown
    assert main([*command, "--skip-single-captions"]) == 0
    shown = capsys.readouterr().out
    assert "Next: llm2clip extract" in shown
    assert (output / "model" / "model.safetensors").is_file()
    assert "Skipped 2 images with only one caption." in shown
    record = json.loads((output / "run.json").read_text())
    assert record["inputs"]["num_single_captions_skipped"] == 2
    # Five captions of each of 24 images, two of each of eight, and five other pairs.
    num_texts = 5 * 24 + 2 * 8 + 10
    assert record["results"]["num_texts"] == num_texts
    assert record["results"]["num_truncated"] == 8 + 1
    assert f"Truncated 9 of {num_texts} texts to 32 tokens." in shown


@pytest.fixture(scope="module")
def in_half(tmp_path_factory):
    return save_model(*tiny_model(dtype=torch.bfloat16), tmp_path_factory.mktemp("half") / "base")


@pytest.fixture
def measured(monkeypatch):
    """Embeddings of a text by each model whose accuracy is measured."""
    found = []

    def measure(encode, groups):
        found.append(encode(["a of 3"]))
        return measure_caption_retrieval(encode, groups)

    monkeypatch.setattr(stage, "measure_caption_retrieval", measure)
    return found


@pytest.mark.slow
def test_the_final_accuracy_is_measured_on_the_merged_folder(in_half, tmp_path, measured):
    # A learning rate so small that bfloat16 rounds most of the LoRA away.
    config = replace(SHORT, merge=True, learning_rate=3e-5)
    with pytest.warns(UserWarning, match=r"changes \d.*% of the entries .*bfloat16"):
        folder = finetune_llm(in_half, RECORDS, tmp_path / "run", config)
    results = read_results(tmp_path / "run")
    model, processor = load_model(folder, device="cpu")
    assert model.dtype == torch.bfloat16
    encode = partial(encode_texts, model, processor, project=False)
    assert results["cra_after"] == measure_caption_retrieval(encode, hold_out_short())
    assert torch.equal(measured[-1], encode(["a of 3"]))
    assert not torch.equal(measured[-1], measured[-2])  # before merging
    before, after = (load_file(path / "model.safetensors") for path in (in_half, folder))
    lora = load_file(tmp_path / "run" / "lora" / "adapter_model.safetensors")
    changed = [name for name in before if name.removeprefix("text_model.") in {
        key.removeprefix("base_model.model.").replace(".lora_A", "") for key in lora
    }]  # fmt: skip
    num_entries = sum(before[name].numel() for name in changed)
    num_changed = sum(int((before[name] != after[name]).sum()) for name in changed)
    # Entries whose change is below the resolution of float32 do not count.
    wanted = pytest.approx(num_changed / num_entries, rel=1e-3)
    assert num_changed / num_entries <= results["share_changed_by_merging"] == wanted
    assert results["share_changed_by_merging"] < 0.5


@pytest.mark.slow
def test_the_accuracy_of_a_lora_is_measured_in_its_written_dtype(tmp_path, measured):
    config = replace(SHORT, lora_dtype="bfloat16", max_steps=2)
    tuned = tune(tmp_path / "run", config)
    tune(tmp_path / "again", replace(config, init_lora=tuned.lora))
    _, after, before_again, _ = measured
    assert torch.equal(after, before_again)


@pytest.mark.slow
def test_float32_precision_also_applies_to_a_folder_in_half_precision(in_half, tmp_path):
    model, processor = load_model(in_half, device="cpu")
    exact = save_model(model.float(), processor, tmp_path / "exact")
    for source, name in ((in_half, "half"), (exact, "float32")):
        finetune_llm(source, RECORDS, tmp_path / name, SHORT)
    assert read_losses(tmp_path / "half") == read_losses(tmp_path / "float32")

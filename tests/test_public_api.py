"""The whole method is one script of public names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from tiny_folders import save_captioned_squares, save_tiny_llm, save_tiny_vision

ROOT = Path(__file__).parents[1]
# Small numbers where a user would leave the defaults.
SCRIPT = """
import modeling_llm2clip as llm2clip
from sentence_transformers import SentenceTransformer

if __name__ == "__main__":
    records = llm2clip.load_records("my-images")
    train, test = llm2clip.split_records(records, test_size=0.1, seed=0)
    base = llm2clip.build_model(
        "vision", "llm", "runs/base", llm2clip.BuildConfig(prompt="none", projection_dim=16)
    )
    tuned = llm2clip.finetune_llm(
        base, train, "runs/tuned",
        llm2clip.FinetuneConfig(max_steps=2, per_device_train_batch_size=8, num_held_out=4),
    )
    captions = llm2clip.extract(tuned, train, "runs/captions", modality="text")
    images = llm2clip.extract(tuned, train, "runs/images", modality="image")
    model = llm2clip.align(
        tuned, train, "runs/aligned",
        llm2clip.AlignConfig(max_steps=2, global_batch_size=16, held_out_ratio=0),
        caption_store=captions, image_store=images,
    )
    print(llm2clip.evaluate(
        model, test, llm2clip.EvaluationConfig(output="runs/scores"), tasks=["retrieval"]
    ))
    report = llm2clip.check_model(model)
    assert report.healthy, report
    encoder = SentenceTransformer(str(model))
    text_embeds, image_embeds = encoder.encode(["number 3"]), encoder.encode(["my-images/3.png"])
    print(encoder.similarity(text_embeds, image_embeds))
    index = llm2clip.ImageIndex.build(model, "my-images", "my-index")
    print(index.search("number 3", top_k=5))
    print(llm2clip.push_to_hub(model, "me/my-model", license="apache-2.0"))
"""


@pytest.mark.slow
def test_the_whole_method_is_one_script(tmp_path: Path) -> None:
    save_tiny_vision(tmp_path / "vision")
    save_tiny_llm(tmp_path / "llm")
    save_captioned_squares(tmp_path / "my-images", count=60)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    with HubServer() as hub:
        environment = {**hub.environment(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, str(script)], cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "me/my-model" in done.stdout

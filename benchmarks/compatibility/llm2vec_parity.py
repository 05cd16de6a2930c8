"""Whether the embedded SmolLM2 gives LLM2Vec's ids, pooled spans and embeddings on real captions.

    python -m benchmarks.compatibility.llm2vec_parity --captions coco.jsonl \
        --llm2vec-python /path/to/another/venv/bin/python

The other environment has llm2vec 0.2.3 with transformers 4.44.2. The prompt is ChatML; every
caption is encoded alone and behind an instruction. `--golden FILE` records LLM2Vec's embeddings of
the captions that the tests have.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shared.provenance import describe_run, write_result

_INSTRUCTION = "Given a caption, retrieve a similar relevant caption: "
# LLM2Vec chooses its template by this name; this one is ChatML's.
_CHATML_NAME = "Qwen/Qwen2-1.5B-Instruct"
_OWN_CAPTIONS = (
    Path(__file__).resolve().parents[2] / "conversion" / "golden" / "llm2vec" / "captions.json"
)


def main() -> None:
    """Encode on both sides, compare, and write the result; or be LLM2Vec's side."""
    if sys.argv[1:2] == ["--llm2vec-side"]:
        _encode_with_llm2vec(*map(Path, sys.argv[2:5]))
        return
    arguments = _parse()
    from benchmarks.speed.encoding_speed import rewrite_for_old_readers, sample_captions
    from modeling_llm2clip.building.pretrained_towers import SMOLLM2, fetch_tower

    llm = fetch_tower(SMOLLM2)
    captions = sample_captions(arguments.captions, arguments.count)
    if arguments.golden:
        captions = json.loads(_OWN_CAPTIONS.read_text(encoding="utf-8"))["captions"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = rewrite_for_old_readers(llm, Path(temporary))
        theirs = _run_llm2vec(arguments.llm2vec_python, folder, captions, Path(temporary))
    if arguments.golden:
        _write_golden(theirs, arguments.golden)
        return
    record = {
        "command": f"python -m benchmarks.compatibility.llm2vec_parity --count {arguments.count}",
        **(run := describe_run("torch", "transformers")),
        "versions": {**run["versions"], "llm2vec": "0.2.3 with transformers 4.44.2"},
        "captions": f"{len(captions)} from {[path.parent.name for path in arguments.captions]}",
        "instruction": _INSTRUCTION,
        **_compare(str(llm), captions, theirs),
    }
    write_result(arguments.output, record)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--captions", type=Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--llm2vec-python", required=True)
    parser.add_argument("--golden", type=Path, help="record embeddings for the tests, and stop")
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "llm2vec_parity.json")
    return parser.parse_args()


def _run_llm2vec(
    python: str, llm: Path, captions: list[str], temporary: Path
) -> dict[str, np.ndarray]:
    texts, embeddings = temporary / "captions.json", temporary / "embeddings.npz"
    texts.write_text(json.dumps(captions), encoding="utf-8")
    module = "benchmarks.compatibility.llm2vec_parity"
    side = [python, "-m", module, "--llm2vec-side", str(llm), str(texts), str(embeddings)]
    subprocess.run(side, check=True)
    with np.load(embeddings) as stored:
        return dict(stored)


def _encode_with_llm2vec(llm: Path, texts: Path, embeddings: Path) -> None:
    import torch
    from llm2vec import LLM2Vec

    captions = json.loads(texts.read_text(encoding="utf-8"))
    model = LLM2Vec.from_pretrained(
        str(llm), torch_dtype=torch.float32, pooling_mode="mean", max_length=512, doc_max_length=512
    )
    model.model.config._name_or_path = _CHATML_NAME
    recorded = {}
    for name, instruction in (("plain", ""), ("instructed", _INSTRUCTION)):
        pairs = [[instruction, caption] for caption in captions]
        recorded[name] = model.encode(pairs, show_progress_bar=False, convert_to_numpy=True)
        prepared = [model.prepare_for_tokenization(model._convert_to_str(*pair)) for pair in pairs]
        features = model.tokenize(prepared)
        mask = features["attention_mask"]
        recorded[f"{name}_ids"] = torch.where(mask.bool(), features["input_ids"], -1).numpy()
        recorded[f"{name}_spans"] = features["embed_mask"].sum(dim=1).numpy()
    np.savez(embeddings, **recorded)


def _compare(
    llm: str, captions: list[str], theirs: dict[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Encode with the package; each instructed caption has its own pooled span, as theirs has."""
    import torch

    from benchmarks.speed.encoding_worker import build_model

    model, processor = build_model(llm, prompt="chatml")
    config, tokenizer = model.config, processor.tokenizer
    alone = len(tokenizer(_INSTRUCTION)["input_ids"])
    num_before = {
        "plain": len(config.prompt_prefix_ids),
        "instructed": alone - len(config.prompt_suffix_ids),
    }
    results = {}
    for name, start in num_before.items():
        texts = captions if name == "plain" else [_INSTRUCTION + caption for caption in captions]
        same_ids, same_spans, cosines, cosines_of_other_spans = 0, 0, [], []
        for row, text in enumerate(texts):
            ids = tokenizer(text)["input_ids"]
            recorded = theirs[f"{name}_ids"][row]
            same_ids += ids == recorded[recorded >= 0].tolist()
            extra = len(ids) - start - int(theirs[f"{name}_spans"][row])
            length = None if name == "plain" else alone - config.prompt_suffix_ends_special + extra
            with torch.inference_mode():
                embedding = model.get_caption_embeds(torch.tensor([ids]), prompt_length=length)[0]
            expected = torch.from_numpy(theirs[name][row])
            cosine = float(torch.cosine_similarity(embedding, expected, dim=0))
            (cosines_of_other_spans if extra else cosines).append(cosine)
            same_spans += not extra
        results[name] = {
            "same_ids": same_ids,
            "same_spans": same_spans,
            "smallest_cosine": round(min(cosines), 7),
            "smallest_cosine_given_their_span": round(min(cosines_of_other_spans, default=1.0), 7),
        }
    return results


def _write_golden(theirs: dict[str, np.ndarray], path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file(
        {
            "caption_embeds": torch.from_numpy(theirs["plain"]),
            "caption_embeds_with_instruction": torch.from_numpy(theirs["instructed"]),
        },
        path,
    )
    path.chmod(0o644)


if __name__ == "__main__":
    main()

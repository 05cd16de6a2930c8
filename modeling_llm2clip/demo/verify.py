"""Loads an exported folder in a clean process and compares its embeddings with recorded ones.

Run as `python -m modeling_llm2clip.demo.verify FOLDER RECORD`; exits non-zero on a difference.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# Same code, same weights, same machine; only the batch a row was computed in may differ.
_TOLERANCE = 1e-5


def verify_in_clean_process(
    folder: Path, *, texts: list[str], text_embeds: list[list[float]],
    images: list[str], image_embeds: list[list[float]], record: Path,
) -> dict[str, float]:  # fmt: skip
    """Compare AutoModel's and sentence-transformers' embeddings with those given.

    Args:
        text_embeds, image_embeds: unit-length embeddings of `texts` and of the `images`' paths.
        record: file to write them to, for the other process.
    Returns: the largest difference for each way of loading and kind of input.
    Raises: RuntimeError when a difference exceeds 1e-5, or loading fails.
    """
    content = {"texts": texts, "text_embeds": text_embeds}
    content |= {"images": images, "image_embeds": image_embeds}
    record.write_text(json.dumps(content), encoding="utf-8")
    command = [sys.executable, "-m", __name__, str(folder), str(record)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{folder} does not give the same embeddings again:\n{result.stderr}")
    differences: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return differences


def _compare(folder: str, record: str) -> dict[str, float]:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoProcessor

    expected = json.loads(Path(record).read_text(encoding="utf-8"))
    wanted = {kind: torch.tensor(expected[f"{kind}_embeds"]) for kind in ("text", "image")}
    model = AutoModel.from_pretrained(folder, trust_remote_code=False)
    inputs = AutoProcessor.from_pretrained(folder, trust_remote_code=False)(
        text=expected["texts"], images=expected["images"]
    )
    with torch.inference_mode():
        output = model(**inputs)
    sentence_model = SentenceTransformer(folder, device="cpu", trust_remote_code=False)
    found = {
        ("AutoModel", "text"): output.text_embeds,
        ("AutoModel", "image"): output.image_embeds,
        ("sentence-transformers", "text"): torch.tensor(sentence_model.encode(expected["texts"])),
        ("sentence-transformers", "image"): torch.tensor(sentence_model.encode(expected["images"])),
    }
    return {
        f"{way}: {kind}": float((embeddings.cpu() - wanted[kind]).abs().max())
        for (way, kind), embeddings in found.items()
    }


if __name__ == "__main__":
    differences = _compare(*sys.argv[1:3])
    print(json.dumps(differences))
    too_large = {name: value for name, value in differences.items() if not value <= _TOLERANCE}
    if too_large:
        sys.exit(f"differences over {_TOLERANCE}: {too_large}")

"""Time and memory of converting a checkpoint of real size: OpenAI L/14-336 with a 1B LLM.

    python -m benchmarks.compatibility.conversion

Writes random values in the real shapes and layouts: a training checkpoint with vision tower and
adapter, and a folder of Llama-3.2-1B's shapes, both float32, 6.4 GB. Then converts them in a
process of its own, with all that the command does: reading, writing, golden embeddings, reloading,
`doctor`. Peak memory is the largest resident set, pages of mapped files included. Everything is
in a temporary folder of `--folder`, which needs twice the size, and is removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaModel

from benchmarks.shared.provenance import describe_run, run_process, write_result

_TOKENIZER = Path(__file__).resolve().parents[2] / "conversion" / "golden" / "llm2vec" / "llama"
_MOST_MEMORY = 1.3  # times the checkpoint's size
_LLM_WIDTH, _PROJECTION, _VISION_WIDTH, _VISION_LAYERS = 2048, 1280, 1024, 24
# Llama-3.2-1B's config.json.
_LLM_SIZES: dict[str, Any] = {
    "hidden_size": _LLM_WIDTH,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def main() -> None:
    """Write the sources, convert, and write the result."""
    arguments = _parse()
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=arguments.folder) as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        checkpoint = _write_checkpoint(folder / "checkpoint.pt", arguments.vision_layers)
        llm = _write_llm(folder / "llm", arguments.llm_layers)
        source_bytes = checkpoint.stat().st_size + _count_bytes(llm)
        figures = _convert(checkpoint, llm, folder / "model", arguments.dtype)
        figures["written_gb"] = round(_count_bytes(folder / "model") / 1e9, 2)
    figures["source_gb"] = round(source_bytes / 1e9, 2)
    figures["times_the_source"] = round(figures["peak_rss_gb"] * 1e9 / source_bytes, 3)
    figures["within_the_bound"] = figures["times_the_source"] <= _MOST_MEMORY
    record = {
        "command": "python -m benchmarks.compatibility.conversion "
        f"--vision-layers {arguments.vision_layers} --llm-layers {arguments.llm_layers} "
        f"--dtype {arguments.dtype}",
        **describe_run("torch", "transformers", "safetensors"),
        "bound": _MOST_MEMORY,
        **figures,
    }
    write_result(arguments.output, record)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--vision-layers", type=int, default=_VISION_LAYERS)
    parser.add_argument("--llm-layers", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results / "conversion.json")
    return parser.parse_args()


def _write_checkpoint(path: Path, num_layers: int) -> Path:
    """Write vision tower and adapter as the official training code names and nests them."""
    state = {
        name: torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.02)
        for name, shape in _list_shapes(num_layers).items()
    }
    for name in state:
        if ".ln" in name and name.endswith("weight"):
            state[name] += 1
    state["logit_scale"] = torch.tensor(4.6)
    torch.save({"epoch": 4, "state_dict": state}, path)
    return path


def _list_shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    width, inner, wide = _VISION_WIDTH, 4 * _VISION_WIDTH, 2 * _LLM_WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (577, width),
        "visual.conv1.weight": (width, 3, 14, 14),
        "visual.proj": (width, _PROJECTION),
        **_pair("visual.ln_pre", width),
        **_pair("visual.ln_post", width),
    }
    for number in range(num_layers):
        block = f"visual.transformer.resblocks.{number}."
        shapes |= {
            **_pair(f"{block}ln_1", width),
            **_pair(f"{block}ln_2", width),
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
            **_pair(f"{block}attn.out_proj", width, width),
            **_pair(f"{block}mlp.c_fc", inner, width),
            **_pair(f"{block}mlp.c_proj", width, inner),
        }
    for number in range(4):
        block = f"text.text_adaptor.{number}."
        shapes |= {
            **_pair(f"{block}fn.0", wide, _LLM_WIDTH),
            **_pair(f"{block}fn.3", _LLM_WIDTH, wide),
            **_pair(f"{block}ln", _LLM_WIDTH),
        }
    last = _pair("text.text_adaptor.5", _PROJECTION, _LLM_WIDTH)
    return {**shapes, **_pair("text.text_adaptor.4", _LLM_WIDTH), **last}


def _pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _write_llm(folder: Path, num_layers: int) -> Path:
    """Write an LLM's folder, one file a few layers, with a small tokenizer."""
    folder.mkdir()
    config = LlamaConfig(num_hidden_layers=num_layers, **_LLM_SIZES)
    config.architectures = ["LlamaModel"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy2(_TOKENIZER / name, folder / name)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaModel(config).state_dict().items()}
    places, names = {}, list(shapes)
    for start in range(0, len(names), 40):
        file = f"model-{start:05}.safetensors"
        chosen = names[start : start + 40]
        save_file(
            {
                name: torch.ones(shapes[name])
                if len(shapes[name]) == 1
                else torch.randn(shapes[name]) * shapes[name][-1] ** -0.5
                for name in chosen
            },
            folder / file,
            metadata={"format": "pt"},
        )
        places |= dict.fromkeys(chosen, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _convert(checkpoint: Path, llm: Path, output: Path, dtype: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "modeling_llm2clip", "convert", str(checkpoint), str(output)]
    command += ["--source-format", "openai", "--text-model", str(llm), "--dtype", dtype]
    root = Path(__file__).resolve().parents[2]
    usage = run_process(command, cwd=root)
    if usage.exit_code:
        raise SystemExit(f"The conversion failed with exit code {usage.exit_code}.")
    return {
        "seconds": round(usage.seconds, 1),
        "cpu_seconds": round(usage.cpu_seconds, 1),
        "peak_rss_gb": round(usage.peak_bytes / 1e9, 2),
    }


def _count_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


if __name__ == "__main__":
    main()

"""CPU time beside the networks, by this checkout and one from before: batches, and tokenizing.

    python benchmarks/batch_pairs.py --before ../another-checkout

Batches of `align` are read from stores of the embedded towers, with and without noise. Captions are
encoded as `evaluate` does by a tower so small that tokenizing them takes most of the time. Both
checkouts run in turns, each in a process of its own, on the same emoji. Reported are the medians of
the milliseconds of CPU time, and of their ratios.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from checkouts import HERE, measure_in_turns
from command_pairs import TASKS, write_data
from provenance import describe_run, read_commit, write_result

QUESTIONS = (
    "512 pairs", "512 pairs with noise", "4096 pairs", "4096 pairs with noise", "2000 captions",
)  # fmt: skip
# Both checkouts have these names; each reads a folder that its own commands wrote.
CODE = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests/helpers")
import numpy as np
from tiny import tiny_model
from modeling_llm2clip import EmbeddingStore, LLM2CLIPProcessor, load_records
from modeling_llm2clip.configs.evaluation_config import EncoderConfig
from modeling_llm2clip.evaluation.encoders.llm2clip import LLM2CLIPEncoder
from modeling_llm2clip.publishing.export_model import save_model
from modeling_llm2clip.training.alignment.alignment_data import AlignmentDataset
folder = Path(sys.argv[1]) / Path.cwd().name
records = load_records(folder / "data")
stores = [EmbeddingStore.open(folder / name) for name in ("captions", "images")]
datasets = [
    AlignmentDataset(records, None, caption_store=stores[0], image_store=stores[1],
                     image_noise=noise, caption_noise=noise / 2)
    for noise in (0.0, 1.0)
]
save_model(*tiny_model(), folder / "tiny")
encoder = LLM2CLIPEncoder(folder / "tiny", EncoderConfig(device="cpu", show_progress=False),
                          source="tiny")
encoder.encode_texts(["a first text"])
random, texts = np.random.default_rng(0), 0
def encode(count):
    global texts
    texts += 1
    encoder.encode_texts([f"a photo of {n} things of kind {texts}" for n in range(count)])
print("ready", flush=True)
for line in sys.stdin:
    count, what = int(line.split()[0]), line.split()[1]
    items = random.integers(0, len(records), count)
    samples = np.stack([np.arange(count), items], axis=1)
    begin = time.process_time()
    encode(count) if what == "captions" else datasets["noise" in line].__getitems__(samples)
    print(1000 * (time.process_time() - begin), flush=True)
"""


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--before", type=Path, required=True, help="another checkout")
    parser.add_argument("--rounds", type=int, default=15)
    output = Path(__file__).parent / "results" / "batch_pairs.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for checkout in (HERE, arguments.before.resolve()):
            prepare(checkout, Path(scratch) / checkout.name)
        found = measure_in_turns(
            arguments.before, CODE, [scratch], questions=QUESTIONS, rounds=arguments.rounds
        )
    frame = describe_run("torch", "transformers")
    before = read_commit(arguments.before)
    write_result(
        arguments.output, frame | {"before": before, "rounds": arguments.rounds, "cpu_ms": found}
    )


def prepare(checkout: Path, folder: Path) -> None:
    """Write data and stores by the commands of a checkout."""
    folder.mkdir()
    places = {name: str(folder / name) for name in ("data", "model")}
    write_data(Path(places["data"]), folder / "texts.jsonl")
    commands = [["build", "embedded", "embedded", places["model"]]]
    for task, store in (("extract 900 captions", "captions"), ("extract 300 images", "images")):
        words = [str(folder / store) if word == "out" else word for word in TASKS[task]]
        commands.append([word.format(**places) for word in words])
    for command in commands:
        subprocess.run(
            [sys.executable, "-m", "modeling_llm2clip", *command], cwd=checkout, check=True
        )


if __name__ == "__main__":
    main()

"""The process of `gpu_proxies.py`: it measures the package that it can import, and prints JSON.

Each part takes the way of a GPU, on a CPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.gpu.full_width import WIDTHS, draw_lengths, make_config
from benchmarks.gpu.gpu_branches import gpu_branches, replaced
from benchmarks.gpu.transfers import Crossings, Transfers

_BATCH_TOKENS, _CAPTION_TOKENS = 16_384, 40
_IMAGES, _PAIRS, _ALIGNED = 64, 64, 4096
_SHARD = 2**16
_FINETUNE_BATCHES = 400
_STEPS = 6


class Kernels(TorchDispatchMode):
    """Counts the operators that compute, by name; those that give another view do not."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one operator."""
        schema = func._schema
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
        )
        if not is_view and schema.name not in ("prim::device", "aten::_unsafe_view"):
            self.counts[schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def _count_padded(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _count_padded_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    return 5 * int(sdpa_flop_count(query, key, value)) // 2


# What torch does not count on a CPU.
_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_padded,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_padded_backward,
}


@contextmanager
def _counted(figures: dict[str, Any], *, per: int, unit: str) -> Iterator[None]:
    """Count operations and kernels, the operations per token, image or step."""
    with FlopCounterMode(display=False, custom_mapping=_FLOPS) as flops, Kernels() as kernels:
        yield
    attention = {n: c for n, c in kernels.counts.items() if "attention" in n or "attn" in n}
    figures |= {
        f"gflop_per_{unit}": round(flops.get_total_flops() / per / 1e9, 3),
        "kernels": sum(kernels.counts.values()),
        "attention": attention,
    }


def count_full_width() -> dict[str, Any]:
    """Count operations and kernels in the sizes of the paper, on tensors without content."""
    from modeling_llm2clip.modeling_llm2clip import LLM2CLIPModel

    figures: dict[str, Any] = {}
    lengths = [_CAPTION_TOKENS] * (_BATCH_TOKENS // _CAPTION_TOKENS)
    mixed = draw_lengths("mixed", _PAIRS)
    with FakeTensorMode():
        for llm in ("1B", "8B"):
            # As a GPU runs the towers.
            model = LLM2CLIPModel._from_config(make_config(llm), dtype=torch.bfloat16).eval()
            of_llm = figures[f"captions {llm}, {_BATCH_TOKENS} tokens"] = {}
            with torch.no_grad(), _counted(of_llm, per=sum(lengths), unit="token"):
                _run_llm(model, lengths)
            figures[f"align step {llm}, {_ALIGNED} pairs"] = _count_align_step(llm)
            name = f"finetune-llm {llm}, {_PAIRS} mixed captions with backward"
            figures[name] = _count_finetuning(model, mixed)
        model = LLM2CLIPModel._from_config(make_config("tiny"), dtype=torch.bfloat16).eval()
        pixels = torch.zeros(_IMAGES, 3, 336, 336, dtype=torch.bfloat16)
        of_images = figures[f"images L/14-336, {_IMAGES}"] = {}
        with torch.no_grad(), _counted(of_images, per=_IMAGES, unit="image"):
            model.get_vision_embeds(pixels)
    return figures


def _run_llm(model: Any, lengths: Sequence[int]) -> Tensor:
    """Run texts through the LLM as a GPU does: in one pack, or in earlier versions padded."""
    if not hasattr(model, "varlen_kernel"):
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        output = model._pool_batch(ids, torch.ones_like(ids), num_unpooled=0)
        return output.last_hidden_state  # type: ignore[no-any-return]
    from torch.nn.attention.varlen import varlen_attn

    from modeling_llm2clip.attention_llm2clip import VarlenKernel
    from modeling_llm2clip.packing_llm2clip import _run_pack

    ids = torch.zeros(sum(lengths), dtype=torch.long)
    return _run_pack(model.text_model, ids, ids, [*lengths], VarlenKernel(varlen_attn, 256))


def _count_finetuning(model: Any, lengths: Sequence[int]) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    from modeling_llm2clip.training import trainer_mixins

    add_lora = getattr(trainer_mixins, "add_lora", get_peft_model)  # earlier versions use peft's
    model.requires_grad_(False)
    # Modules of tensors without content cannot be moved, and need not.
    with replaced(torch.nn.Module, "to", lambda module, *_, **__: module):
        add_lora(model.text_model, LoraConfig(r=16, target_modules="all-linear"))
    figures: dict[str, Any] = {}
    with _counted(figures, per=sum(lengths), unit="token"):
        with torch.autocast("cpu", torch.bfloat16):
            states = _run_llm(model, lengths)
        states.float().sum().backward()
    return figures


def _count_align_step(llm: str) -> dict[str, Any]:
    from modeling_llm2clip.training.alignment.alignment_model import AlignmentModel
    from modeling_llm2clip.training.losses.pairs import ContrastiveLoss

    model = AlignmentModel(make_config(llm), with_llm=False, with_vision_tower=False)
    model.loss = ContrastiveLoss()
    optimizer = _make_optimizer([p for p in model.parameters() if p.requires_grad])
    inputs = {
        "vision_embeds": torch.zeros(_ALIGNED, WIDTHS["L/14-336"]),
        "caption_embeds": torch.zeros(_ALIGNED, WIDTHS[llm]),
        "group_ids": torch.zeros(_ALIGNED, dtype=torch.long),
        "text_keys": torch.zeros(_ALIGNED, dtype=torch.long),
    }
    figures: dict[str, Any] = {}
    with _counted(figures, per=1, unit="step"):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model(inputs)
        loss.backward()
    with Kernels() as kernels:
        optimizer.step()
    return figures | {"optimizer_kernels": sum(kernels.counts.values())}


def _make_optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Make the optimizer of `align`, which is fused where steps run ahead of the host.

    Earlier versions left the choice to torch, which on a GPU takes lists of tensors.
    """
    is_fused = find_spec("modeling_llm2clip.training.finite_steps") is not None
    return torch.optim.AdamW(parameters, fused=is_fused, foreach=not is_fused)


def count_shapes(folder: Path) -> dict[str, Any]:
    """Count real tokens and shapes of batches; each new shape may cost a plan of the attention."""
    from modeling_llm2clip.modeling_llm2clip import LLM2CLIPTextModel
    from modeling_llm2clip.packing_llm2clip import plan_token_batches

    model = LLM2CLIPTextModel.from_pretrained(folder / "model").eval()
    figures: dict[str, Any] = {}
    with gpu_branches(), torch.no_grad():
        for kind in ("short", "mixed"):
            lengths = draw_lengths(kind, _SHARD)
            plan = plan_token_batches(lengths, token_budget=_BATCH_TOKENS)
            planned = [[lengths[number] for number in rows] for rows in plan]
            figures[f"extract, {kind}"] = _run_shapes(model, planned)
            lengths = draw_lengths(kind, _PAIRS * _FINETUNE_BATCHES)
            batches = [lengths[n : n + _PAIRS] for n in range(0, len(lengths), _PAIRS)]
            figures[f"finetune-llm, {kind}"] = _run_shapes(model, batches)
    return figures


def _run_shapes(model: Any, batches: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Run batches through a model whose LLM looks its tokens up alone, and note what reaches it."""
    from transformers.modeling_outputs import BaseModelOutput

    shapes: list[tuple[int, ...]] = []
    table = model.text_model.get_input_embeddings()

    def look_up(input_ids: Tensor, **_: Any) -> BaseModelOutput:
        shapes.append(tuple(input_ids.shape))
        return BaseModelOutput(last_hidden_state=table(input_ids))

    config = model.config
    prefix, suffix = config.prompt_prefix_ids, config.prompt_suffix_ids
    model.text_model.forward = look_up
    model.get_caption_embeds(torch.tensor([[*prefix, 50, *suffix]]))  # with its check
    shapes.clear()
    for lengths in batches:
        ids = torch.full((len(lengths), max(lengths)), 50)
        mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
        ids[:, : len(prefix)] = torch.tensor(prefix)
        for row, length in enumerate(lengths):
            ids[row, length - len(suffix) : length] = torch.tensor(suffix)
        model.get_caption_embeds(ids, mask)
    computed = sum(rows * length for rows, length in shapes)
    # A pack has one row, and needs no plan for its shape.
    return {
        "real_tokens": round(sum(map(sum, batches)) / computed, 4),
        "batches": len(batches),
        "shapes": len({shape for shape in shapes if shape[0] > 1}),
    }


def count_transfers(folder: Path) -> dict[str, Any]:
    """Count what one batch or step makes a host and its GPU exchange."""
    with gpu_branches():
        return {
            "extract texts, a batch": _count_texts(folder),
            "embed images, a batch": _count_images(folder),
            "align, a step": _widen(_count_steps(folder, _align)),
            "finetune-llm, a step": _count_steps(folder, _finetune),
        }


def _count_texts(folder: Path) -> dict[str, float]:
    from modeling_llm2clip.configs.encoding_config import ExtractConfig
    from modeling_llm2clip.embedding.shard_encoding import load_shard_encoder

    cpu = torch.device("cpu")
    encoder = load_shard_encoder(folder / "model", "text", ExtractConfig(), cpu)
    encoder.token_budget = 256
    texts = [f"{'a dog and a cat ' * (1 + number % 4)}{number}" for number in range(256)]
    return _count_batches(encoder, texts)


def _count_images(folder: Path) -> dict[str, float]:
    from PIL import Image

    from modeling_llm2clip.configs.encoding_config import EmbedConfig
    from modeling_llm2clip.embedding.shard_encoding import load_shard_encoder

    config = EmbedConfig(batch_size=8)
    encoder = load_shard_encoder(folder / "model", "image", config, torch.device("cpu"))
    images = folder / "small"
    images.mkdir(exist_ok=True)
    files = [images / f"{number}.png" for number in range(64)]
    for number, file in enumerate(files):
        Image.new("RGB", (40, 40), (number, 90, 200)).save(file)
    return _count_batches(encoder, files)


def _count_batches(encoder: Any, inputs: Sequence[Any]) -> dict[str, float]:
    """Count the batches of a shard, and divide; a first round, with checks, does not count."""
    prepared = encoder.prepare(list(inputs))
    for _ in encoder.encode(prepared):
        pass
    with Transfers() as transfers:
        for model in encoder.encoder._models.values():
            for buffer in model.buffers():
                transfers.place(buffer)
        for _ in encoder.encode(prepared):
            pass
    return Crossings().per(transfers.crossings, len(prepared.batches))


def _count_steps(folder: Path, train: Callable[[Path, Path, int], None]) -> dict[str, float]:
    """Count two runs, whose difference is the steps that the longer one has more."""
    counts = []
    for steps in (1, _STEPS, 2 * _STEPS):  # the first one imports and compiles
        with tempfile.TemporaryDirectory() as output, Transfers() as transfers:
            train(folder, Path(output) / "run", steps)
        counts.append(transfers.crossings)
    return counts[1].per(counts[2], _STEPS)


def _widen(figures: dict[str, float]) -> dict[str, float]:
    """Add the megabytes of 4,096 pairs of the paper's widths; numbers of a pair have no width."""
    matrices, narrow = figures["matrix_bytes_in"], 64 + 32
    wide = matrices * (WIDTHS["8B"] + WIDTHS["L/14-336"]) / narrow
    of_pair = (figures["bytes_in"] - matrices + wide) / _PAIRS
    return figures | {"megabytes_in_at_full_width": round(_ALIGNED * of_pair / 1e6, 1)}


def _align(folder: Path, output: Path, steps: int) -> None:
    from modeling_llm2clip.configs.align_config import AlignConfig
    from modeling_llm2clip.data.records.record_loading import load_records
    from modeling_llm2clip.training.alignment.align import align

    config = AlignConfig(
        max_steps=steps, global_batch_size=_PAIRS, held_out_ratio=0.0, projection_init="model",
        logging_steps=10**6, save_steps=10**6, warmup_steps=0, device="cpu",
        precision="float32", report_to=("none",),
    )  # fmt: skip
    records = load_records(folder / "1024", require_images=False)
    stores = {f"{name}_store": folder / f"{name}s-1024" for name in ("caption", "image")}
    align(folder / "model", records, output, config, **stores)


def _finetune(folder: Path, output: Path, steps: int) -> None:
    from modeling_llm2clip.configs.finetune_config import FinetuneConfig
    from modeling_llm2clip.data.records.record_loading import load_records
    from modeling_llm2clip.training.finetuning.finetune_llm import finetune_llm

    config = FinetuneConfig(
        max_steps=steps, per_device_train_batch_size=16, num_held_out=16, merge=False,
        logging_steps=10**6, save_steps=10**6, warmup_steps=0, device="cpu",
        precision="float32", report_to=("none",),
    )  # fmt: skip
    records = load_records(folder / "1024", require_images=False)
    finetune_llm(folder / "model", records, output, config)


def measure_cpu(folder: Path) -> dict[str, float]:
    """Measure CPU time of what a host does beside its GPU, of one thread, in milliseconds."""
    return {
        f"align batch of {_ALIGNED} x (4096 + 1024)": _time_align_batches(folder),
        "tokenize 1,000 captions": _time_tokens(folder),
        "prepare 16 images of 640 x 480 for 336 pixels": _time_images(folder),
        "ranks of 2,000 x 10,000 of width 512": _time_ranks(),
        "fit_temperature of 2,000 pairs of width 512": _time_temperature(),
    }


def _time(work: Callable[[], object], rounds: int) -> float:
    """Return the median CPU milliseconds of this process, all threads together."""
    work()
    times = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        times.append(1000 * (time.process_time() - started))
    return round(float(np.median(times)), 1)


def _time_align_batches(folder: Path) -> float:
    from modeling_llm2clip.configs.align_config import AlignConfig
    from modeling_llm2clip.data.records.record_loading import load_records
    from modeling_llm2clip.data.store.embedding_store import EmbeddingStore
    from modeling_llm2clip.training.alignment.alignment_data import AlignmentDataset

    count = 2 * _ALIGNED
    records = load_records(folder / "wide" / str(count), require_images=False)
    stores = {
        f"{name}_store": EmbeddingStore.open(folder / "wide" / f"{name}s-{count}")
        for name in ("caption", "image")
    }
    dataset = AlignmentDataset(records, None, AlignConfig(), **stores)  # type: ignore[arg-type]
    order = np.random.default_rng(0)

    def read() -> None:
        items = order.permutation(count)[:_ALIGNED]
        dataset.__getitems__(np.stack([np.zeros_like(items), items], axis=1))

    for _ in range(4):  # of rows that are read for the first time, the checksums are compared
        read()
    return _time(read, 15)


def _time_tokens(folder: Path) -> float:
    from modeling_llm2clip.encoding.tokenized_texts import TokenizedTexts
    from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor

    processor = LLM2CLIPProcessor.from_pretrained(folder / "model")
    texts = [f"two red apples on a wooden table beside number {number}" for number in range(1000)]
    return _time(lambda: TokenizedTexts(processor, texts), 9)


def _time_images(folder: Path) -> float:
    from PIL import Image
    from transformers import CLIPImageProcessor

    from modeling_llm2clip.encoding.batches import prepare_images
    from modeling_llm2clip.processing_llm2clip import LLM2CLIPProcessor

    photographs = folder / "photographs"
    photographs.mkdir()
    files = [photographs / f"{number}.jpg" for number in range(16)]
    generator = np.random.default_rng(0)
    for file in files:  # smooth, as photographs are
        coarse = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(file, quality=90)
    processor = LLM2CLIPProcessor.from_pretrained(folder / "model")
    processor.image_processor = CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    return _time(lambda: prepare_images(processor, files), 9)


def _time_ranks() -> float:
    from modeling_llm2clip.evaluation.metrics.correspondence import Correspondence
    from modeling_llm2clip.evaluation.metrics.ranking import rank_retrieval

    images, texts = _draw_pairs(2000, 512, texts=5)
    owners = np.repeat(np.arange(2000), 5).tolist()
    pairs = Correspondence.from_group_ids(list(range(2000)), owners)
    return _time(lambda: rank_retrieval(images, texts, pairs), 5)


def _draw_pairs(count: int, width: int, *, texts: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)
    noise = torch.randn(count * texts, width, generator=generator) / 16
    found = images.repeat_interleave(texts, dim=0) + noise
    return images, torch.nn.functional.normalize(found, dim=1)


def _time_temperature() -> float:
    from modeling_llm2clip.heads_llm2clip import LogitRule
    from modeling_llm2clip.training.alignment.held_out import fit_temperature
    from modeling_llm2clip.training.losses.loss import LossInputs
    from modeling_llm2clip.training.losses.pairs import ContrastiveLoss

    images, texts = _draw_pairs(2000, 512)
    ids = torch.arange(2000)
    inputs = LossInputs(images, texts, LogitRule(torch.ones(1)), ids, ids, is_whole=True)
    return _time(lambda: fit_temperature(ContrastiveLoss(), inputs), 5)


def prepare(folder: Path) -> None:
    """Write records, a small model, and stores in its widths and in those of the paper."""
    from benchmarks.scale.scale_records import write_records
    from benchmarks.scale.scale_stages import prepare_stage, write_stores

    write_records(folder / "1024", 1024)
    prepare_stage("align", folder, 1024)
    wide, count = folder / "wide", 2 * _ALIGNED
    write_records(wide / str(count), count)
    (wide / "model").symlink_to(folder / "model")
    widths = {"caption_embeds": WIDTHS["8B"], "vision_embeds": WIDTHS["L/14-336"]}
    write_stores(wide, count, widths)


def main() -> None:
    """Measure everything, and print one object."""
    torch.set_num_threads(1)
    quiet = sys.stdout
    sys.stdout = sys.stderr
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        figures = {
            "full_width": count_full_width(),
            "shapes": count_shapes(folder),
            "transfers": count_transfers(folder),
            "cpu_ms": measure_cpu(folder),
        }
    print(json.dumps(figures), file=quiet)


if __name__ == "__main__":
    main()

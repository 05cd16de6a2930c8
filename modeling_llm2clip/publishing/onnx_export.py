"""Exports a model to ONNX: one graph per tower, plus files for ONNX Runtime and transformers.js.

The folder appears only when it is complete and every graph has reproduced the model's embeddings in
ONNX Runtime.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from .. import image_loading_llm2clip
from .._extras import ONNX_EXPORT, require
from .._suggestions import counted
from ..configs.encoding_config import TextWeights
from ..configs.export_config import ExportConfig
from ..configuration_llm2clip import LLM2CLIPConfig
from ..data.atomic_files import atomic_folder
from ..encoding.onnx_encoding import (
    IMAGE_INPUT,
    TEXT_INPUTS,
    TEXT_ONLY_OUTPUT,
    TEXT_OUTPUT,
    OnnxEncoder,
)
from ..image_cropping_llm2clip import LLM2CLIPImageProcessor
from ..model_folders.fingerprint import fingerprint_embeddings
from ..model_folders.golden_embeddings import GOLDEN_FILE, require_golden
from ..model_folders.model_card import (
    CardData,
    find_name,
    format_rows,
    name_base_models,
    read_card_data,
    update_card_data,
)  # fmt: skip
from ..model_folders.model_folder import ONNX_RECORD, read_json_object
from ..model_folders.model_loading import CLASS_OF_COMPONENTS, MODEL_CLASSES, find_model_class
from ..model_folders.model_writing import require_inside
from ..model_folders.onnx_folder import (
    DTYPES,
    GRAPHS,
    data_file,
    graph_file,
    open_session,
)
from ..processing_llm2clip import LLM2CLIPProcessor
from ..vision_llm2clip import find_fixed_size
from .onnx_checks import (
    Reference,
    check_image_graph,
    check_script,
    check_text_graph,
    compare_rounded_texts,
    load_check_inputs,
    require_near_texts,
    require_recall,
)
from .onnx_graphs import (
    name_vision_tower,
    write_image_graph,
    write_rounded_graph,
    write_text_graph,
)

SCRIPT = "encode.py"
_RECORD_FORMAT = 1
_TOWERS = {"text": "text", "image": "vision"}
_ANY_POOLING = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
_EXAMPLES: dict[tuple[str, ...], str] = {
    ("text", "image"): '"a dog" dog.jpg',
    ("text",): '"a dog" "a cat"',
    ("image",): "dog.jpg cat.jpg",
}
_SCRIPT_USE = f"""\
`python {SCRIPT} {{example}}` prints the cosine of its two arguments; it needs only `onnxruntime`,
`tokenizers`, `pillow` and `numpy`. """
_LOADERS: dict[tuple[str, ...], str] = {
    ("text", "image"): """\
transformers.js loads the graphs as `CLIPTextModelWithProjection` and
`CLIPVisionModelWithProjection`.""",
    ("image",): "transformers.js loads the graph as `CLIPVisionModelWithProjection`.",
    ("text",): """\
`AutoModel` of transformers.js loads this folder. If it has `onnx/model.onnx`,
Text Embeddings Inference 1.9 serves it on a CPU.""",
}
_CARD = """
# {title}

ONNX graphs of an LLM2CLIP model ([arXiv:2411.04997](https://arxiv.org/abs/2411.04997)), which map
{inputs} to unit-length embeddings in one space. Opset {opset}, IR {ir_version}.

{files}

{use} `{record}` records how each graph was checked.
"""


def export_onnx(folder: Path, output: str | Path, config: ExportConfig) -> Path:
    """Export a model folder; write nothing unless every graph passes its check.

    Writes `onnx/text_model.onnx`, `onnx/vision_model.onnx`, graphs with quantized weights,
    tokenizer, processor, configuration, golden embeddings, script, record and card. A text-only
    export has `onnx/model.onnx` and the files with which TEI serves it.
    """
    require(*ONNX_EXPORT)
    _require_parts(folder, config)
    with atomic_folder(Path(output)) as unfinished:
        (unfinished / GRAPHS).mkdir()
        writer = _OnnxWriter(folder, unfinished, config)
        if "text" in _list_modalities(config):
            writer.write_text_graphs()
        if "image" in _list_modalities(config):
            writer.write_image_graph()
        writer.write_other_files(name=Path(output).name)
    return Path(output)


def _require_parts(folder: Path, config: ExportConfig) -> None:
    """Raise ValueError if the model is quantized, or lacks a tower that `config` asks for."""
    settings = read_json_object(folder / "config.json") or {}
    parts = (settings, settings.get("text_config") or {}, settings.get("vision_config") or {})
    quantized = [part["quantization_config"] for part in parts if "quantization_config" in part]
    if quantized:
        method = quantized[0].get("quant_method", "an unknown method")
        raise ValueError(
            f"{folder} is quantized ({method}), so the graph would get rounded weights. Export the "
            "original model, and quantize the graph with onnx_weights."
        )
    available = find_model_class(folder).input_modalities
    modalities = _list_modalities(config)
    if missing := [modality for modality in modalities if modality not in available]:
        has, lacks = (_TOWERS[modality] for modality in (available[0], missing[0]))
        raise ValueError(
            f"{folder} is a {has}-only model without a {lacks} tower. Export it with "
            f"components={has}."
        )
    if "text" not in modalities:
        if config.onnx_weights != ("float32",):
            raise ValueError(
                "onnx_weights quantizes the language model, so it cannot be combined with "
                "components=vision. Remove one of the two."
            )
    elif "int4" in config.onnx_weights and len(available) < 2:
        raise ValueError(
            f"{folder} is a text-only model, so the recall lost to int4 weights cannot be "
            "measured. Export the whole model with components=text, or remove int4 from "
            "onnx_weights."
        )


def _list_modalities(config: ExportConfig) -> list[Literal["text", "image"]]:
    """List the modalities to write graphs for, texts first."""
    return sorted(
        MODEL_CLASSES[CLASS_OF_COMPONENTS[config.components]].input_modalities, reverse=True
    )


class _OnnxWriter:
    """Writes ONNX graphs into an unfinished folder and records what was written."""

    def __init__(self, source: Path, folder: Path, config: ExportConfig) -> None:
        self.folder, self.config = folder, config
        self.is_text_only = config.components == "text"
        self.graphs: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, int] = {}  # of ONNX's operators and of its file format
        model_class = MODEL_CLASSES[CLASS_OF_COMPONENTS[config.components]]
        if "int4" in config.onnx_weights:  # recall is measured on both towers
            model_class = find_model_class(source)
        model = model_class.from_pretrained(source, dtype=torch.float32, local_files_only=True)
        processor = LLM2CLIPProcessor.from_pretrained(source, local_files_only=True)
        stated = LLM2CLIPConfig.from_pretrained(source, local_files_only=True).dtype
        dtype = stated if isinstance(stated, torch.dtype) else torch.float32
        require_golden(source, model.eval(), processor, dtype=dtype)
        inputs = load_check_inputs(config.onnx_data)
        self.reference = Reference(model, processor, inputs, source, dtype)

    def write_text_graphs(self) -> None:
        """Write and check the text tower in float32, then each requested quantized version."""
        file = graph_file(self.folder, "text", is_only=self.is_text_only)
        texts = self.reference.inputs.texts
        short_and_long = self.reference.processor(text=[texts[0], *texts[-2:]])
        inputs: Mapping[str, Tensor] = {name: short_and_long[name] for name in TEXT_INPUTS}
        output = TEXT_ONLY_OUTPUT if self.is_text_only else TEXT_OUTPUT
        graph = write_text_graph(self.reference.model, inputs, file, output=output)
        figures = check_text_graph(self._encoder(text=file), self.reference)
        self._record(graph, file, figures)
        for weights in (name for name in self.config.onnx_weights if name != "float32"):
            self._write_rounded(file, weights)
        if "float32" not in self.config.onnx_weights:
            for unwanted in (file, data_file(file)):
                unwanted.unlink(missing_ok=True)
            del self.graphs[_name(file)]

    def _write_rounded(self, source: Path, weights: TextWeights) -> None:
        file = graph_file(self.folder, "text", weights, is_only=self.is_text_only)
        num_rounded = write_rounded_graph(source, file, bits=8 if weights == "int8" else 4)
        check = compare_rounded_texts(self._encoder(text=file), self.reference)
        if weights == "int8":
            require_near_texts(check)
        else:
            max_loss = self.config.max_recall_loss
            require_recall(check, self.reference.inputs, max_loss=max_loss)
        self.graphs[_name(file)] = {
            **self.graphs[_name(source)],
            "weights": weights,
            "rounded_layers": num_rounded,
            "check": check,
            "size_mb": _measure_mb(file),
        }

    def write_image_graph(self) -> None:
        """Write the vision tower as a graph, for images of any size if that passes its check."""
        model, file = self.reference.model, graph_file(self.folder, "image")
        inputs = self.reference.processor(images=list(self.reference.inputs.images[:2]))
        if set(inputs) != {IMAGE_INPUT} or inputs[IMAGE_INPUT].ndim != 4:
            raise ValueError(
                f"The {name_vision_tower(model)} takes patches of images of any shape "
                f"({', '.join(sorted(inputs))}), which ONNX export does not support. Export only "
                "the text tower (components=text), or build the model with a tower for one size."
            )
        reason = None
        if find_fixed_size(model.vision_model) is None:  # otherwise other sizes need an option
            try:
                self._write_image_graph(inputs[IMAGE_INPUT], file, any_size=True)
                return
            except ValueError as error:
                reason = str(error)
        self._write_image_graph(inputs[IMAGE_INPUT], file, any_size=False)
        if reason is not None:
            self.graphs[_name(file)]["fixed_size_because"] = reason

    def _write_image_graph(self, pixel_values: Tensor, file: Path, *, any_size: bool) -> None:
        graph = write_image_graph(self.reference.model, pixel_values, file, any_size=any_size)
        figures = check_image_graph(self._encoder(image=file), self.reference, any_size=any_size)
        self._record(graph, file, figures)

    def _encoder(self, **graphs: Path | None) -> OnnxEncoder:
        """Open the graphs `text` and `image`, except those that are None."""
        sessions = {name: open_session(file) for name, file in graphs.items() if file is not None}
        return OnnxEncoder(self.reference.processor, sessions)

    def _record(self, graph: dict[str, Any], file: Path, figures: dict[str, Any]) -> None:
        self.versions = {name: graph.pop(name) for name in ("opset", "ir_version")}
        self.graphs[_name(file)] = {
            "weights": "float32",
            **graph,
            "size_mb": _measure_mb(file),
            "check": figures,
        }

    def write_other_files(self, *, name: str) -> None:
        reference, folder = self.reference, self.folder
        reference.processor.save_pretrained(folder)
        _name_prompt_tokens(folder / "tokenizer.json")
        _write_image_settings(reference.processor, folder)
        self._write_config()
        if (reference.folder / GOLDEN_FILE).is_file():
            require_inside(reference.folder, [reference.folder / GOLDEN_FILE])
            shutil.copyfile(reference.folder / GOLDEN_FILE, folder / GOLDEN_FILE)
        script = self._write_script()
        head = getattr(reference.model, "logit_head", None)  # a single tower has none
        record = {
            "format": _RECORD_FORMAT,
            **self.versions,
            "graphs": self.graphs,
            "logit_scale": None if head is None else round(float(head.plain_rule().scale), 6),
            "script": script,
            "checked_on": reference.inputs.data,
            "source": {
                modality: fingerprint_embeddings(reference.folder, modality)
                for modality in _list_modalities(self.config)
            },
            "versions": {
                package: version(package)
                for package in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
            },
        }
        (folder / ONNX_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        card = update_card_data(read_card_data(reference.folder), self.config)
        _write_card(folder, card, record, name=name, base=find_name(reference.folder))

    def _write_script(self) -> str | None:
        """Write the encoding script, and the module that the script imports, as standalone files.

        The script is tested on the new folder. If its image embeddings are wrong, the script is
        removed, and the reason is returned.
        """
        from ..encoding import encode_onnx  # imports onnxruntime

        loader = Path(image_loading_llm2clip.__file__)
        content = Path(encode_onnx.__file__).read_text(encoding="utf-8")
        modalities = tuple(_list_modalities(self.config))
        content = (  # with one tower, the script compares two of its inputs
            content.replace(f"from ..{loader.stem} import", f"from {loader.stem} import")
            .replace(_EXAMPLES["text", "image"], _EXAMPLES[modalities])
            .replace("encode_images(sys.argv[2:])", f"encode_{modalities[-1]}s(sys.argv[2:])")
            .replace("encode_texts(sys.argv[1:2])", f"encode_{modalities[0]}s(sys.argv[1:2])")
        )
        script, copy = self.folder / SCRIPT, self.folder / loader.name
        files = [self.folder / name for name in self.graphs]
        text = next((file for file in files if file.stem.startswith(("text", "model"))), None)
        if text is not None:  # the text graph that encode_texts runs by default
            content = content.replace('"text_model"', f'"{text.stem}"')
        script.write_text(content, encoding="utf-8")
        shutil.copyfile(loader, copy)
        image = next((file for file in files if file.stem.startswith("vision")), None)
        reason = check_script(self.folder, self._encoder(text=text, image=image), text)
        if reason is not None:
            script.unlink()
            copy.unlink()
        return reason

    def _write_config(self) -> None:
        """Write the model's configuration, with the files that transformers.js loads by default."""
        config = self.reference.model.config.to_dict()
        config.pop("auto_map", None)
        config["dtype"] = "float32"
        config["max_text_length"] = self.reference.processor.longest_text
        graphs = sorted((self.folder / GRAPHS).glob("*.onnx"))
        config["transformers.js_config"] = {
            "dtype": {
                Path(name).stem.removesuffix("_quantized").removesuffix("_q4"): DTYPES[
                    about["weights"]
                ]
                for name, about in reversed(self.graphs.items())
            },
            "use_external_data_format": {
                graph.name: int(data_file(graph).is_file()) for graph in graphs
            },
        }
        if self.is_text_only:
            text_config = self.reference.model.config.text_config
            # TEI does not start without these, although the graph pools by itself.
            config.update(
                max_position_embeddings=config["max_text_length"],
                hidden_size=config["projection_dim"],
                num_hidden_layers=getattr(text_config, "num_hidden_layers", 1),
            )
            pooling = self.folder / "1_Pooling" / "config.json"
            pooling.parent.mkdir()
            pooling.write_text(json.dumps(_ANY_POOLING, indent=2) + "\n", encoding="utf-8")
        (self.folder / "config.json").write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )


def _name(file: Path) -> str:
    return f"{GRAPHS}/{file.name}"


def _measure_mb(file: Path) -> float:
    return round(
        sum(part.stat().st_size for part in (file, data_file(file)) if part.is_file()) / 1e6, 1
    )


def _name_prompt_tokens(file: Path) -> None:
    """Write each token of the prompt under its own name, by which transformers.js looks up tokens.

    The tokenizers library would also accept one arbitrary name for all ids of the prefix.
    """
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    processor = tokenizer["post_processor"] or {}
    for part in processor.get("processors", [processor]):
        if part.get("type") != "TemplateProcessing":
            continue
        known = part["special_tokens"]
        for template in ("single", "pair"):
            part[template] = [
                {"SpecialToken": {**item["SpecialToken"], "id": token}} if token else item
                for item in part[template]
                for token in (
                    known[item["SpecialToken"]["id"]]["tokens"] if "SpecialToken" in item else [""]
                )
            ]
        part["special_tokens"] = {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for entry in known.values()
            for number, token in zip(entry["ids"], entry["tokens"], strict=True)
        }
    file.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")


def _write_image_settings(processor: LLM2CLIPProcessor, folder: Path) -> None:
    """Write the image processor's settings in the form that transformers.js and the script read."""
    settings = processor.image_processor.to_dict()
    settings.pop("auto_map", None)
    name = str(settings["image_processor_type"]).removesuffix("Pil").removesuffix("Fast")
    if name == LLM2CLIPImageProcessor.__name__:  # unknown to transformers.js
        name, settings["crop_rounding"] = "CLIPImageProcessor", "torchvision"
    settings["image_processor_type"] = name
    (folder / "preprocessor_config.json").write_text(
        json.dumps(settings, indent=2, sort_keys=True, default=int) + "\n", encoding="utf-8"
    )


def _write_card(
    folder: Path, card: CardData, record: dict[str, Any], *, name: str, base: str
) -> None:
    data = ModelCardData(
        license=card.license,
        license_name=card.license_name,
        license_link=card.license_link,
        library_name="transformers.js",
        pipeline_tag="feature-extraction",
        tags=["llm2clip", "onnx"],
        **name_base_models(base, relation="quantized"),
    )
    rows: list[tuple[str, ...]] = [("graph", "weights", "size", "checked"), ("---",) * 4]
    for file, about in record["graphs"].items():
        checked = describe_check(about["check"])
        rows.append((f"`{file}`", about["weights"], f"{about['size_mb']} MB", checked))
    modalities = tuple(record["source"])
    script = "" if record["script"] else _SCRIPT_USE.format(example=_EXAMPLES[modalities])
    body = _CARD.format(
        title=name,
        files=format_rows(rows),
        inputs=" or ".join(f"{modality}s" for modality in modalities),
        use=script + _LOADERS[modalities],
        record=ONNX_RECORD,
        opset=record["opset"],
        ir_version=record["ir_version"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(folder / "README.md")


def describe_check(check: dict[str, Any]) -> str:
    kind = "text" if "texts" in check else "image"
    count = counted(check[f"{kind}s"], kind)
    if "max_distance" in check:
        return f"{count}, at most {check['max_distance']:g} from the model's embeddings"
    description = f"{count}, cosine at least {check['min_cosine']:.4f}"
    if "recall_at_1" in check:
        before, after = check["recall_at_1_of_the_model"], check["recall_at_1"]
        description += f", text to image R@1 {100 * after:.1f} % (model: {100 * before:.1f} %)"
    return description

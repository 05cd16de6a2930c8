"""`llm2clip evaluate`."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._extras import CLIP_TOKENS, PLOTS, require
from .extras import list_needs_of_data, list_needs_of_evaluated
from .parser import add_device_flag, choose_device
from .pick import pick

if TYPE_CHECKING:
    from ..evaluation.arguments import EvaluatedModel, EvaluationArguments
    from ..evaluation.results import Result

_EXAMPLES = (
    "llm2clip evaluate my-model --data emoji --tasks cross-lingual",
    "llm2clip evaluate my-model openai/clip-vit-base-patch16 --data coco=FOLDER "
    "--tasks retrieval cra",
    "llm2clip evaluate ours=my-model theirs=other --data folder=my-images --tasks length",
    "llm2clip evaluate --table --output evaluation",
)
# What models and embeddings without a config.json of transformers have.
_OTHERS = ("open_clip_config.json", "modules.json", "texts.safetensors", "images.safetensors")
_FLAGS_OF_FILES = ("architecture", "activation")


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure models on data sets, side by side",
        examples=_EXAMPLES,
    )
    evaluate.add_argument(
        "models", nargs="*", metavar="MODEL",
        help="[NAME=]SOURCE: a folder or Hub id of ours, CLIP, SigLIP, SigLIP2, an open_clip or "
        "sentence-transformers model; a folder of embeddings",
    )  # fmt: skip
    evaluate.add_argument("--tasks", nargs="+", default=[], help="default: what suits each set")
    evaluate.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="SET[=FOLDER]",
        help="datasets, see --list; or a FOLDER; no default",
    )
    evaluate.add_argument(
        "--output", type=Path, default=Path("evaluation"), help="folder of the results"
    )
    evaluate.add_argument("--list", action="store_true", help="list sets and tasks, and end")
    evaluate.add_argument(
        "--table", nargs="?", const="text", choices=("text", "markdown"),
        help="draw the results in --output, without MODEL those that are there; default: as text",
    )  # fmt: skip
    evaluate.add_argument(
        "--details", action="store_true",
        help="also show what the scores depend on: models, prompts, data, how they were scored",
    )  # fmt: skip
    evaluate.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="R@1 against length (PNG, SVG, PDF); default: none",
    )
    _add_data_flags(evaluate.add_argument_group("data"))
    _add_model_flags(evaluate.add_argument_group("models"))
    evaluate.set_defaults(run=run)


def _add_data_flags(group: Any) -> None:
    group.add_argument(
        "--image-dir",
        nargs="+",
        default=[],
        metavar="SET=FOLDER",
        help="images that lie apart; default: beside the data",
    )
    group.add_argument(
        "--languages", nargs="+", default=[], help="of sets in several languages; default: all"
    )
    group.add_argument(
        "--captions-only", action="store_true", help="read no images; for text encoders alone"
    )
    group.add_argument(
        "--skip-invalid", action="store_true", help="leave invalid samples out, and count them"
    )
    group.add_argument(
        "--no-image-check", dest="check_images", action="store_false",
        help="do not decode every image before a model is loaded",
    )  # fmt: skip
    group.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="one a line, in the order of the classes; default: those of the data",
    )
    group.add_argument(
        "--templates",
        type=Path,
        metavar="FILE",
        help="prompts with one {}, one a line; default: those of the dataset",
    )
    group.add_argument(
        "--allow-repeated-class-names", action="store_true",
        help="keep classes of one name, as ImageNet has some; their images count as wrong",
    )  # fmt: skip
    group.add_argument(
        "--ignore-fields",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="fields of your own in the data, which are not read; default: none",
    )


def _add_model_flags(group: Any) -> None:
    group.add_argument(
        "--kind",
        nargs="+",
        default=[],
        help="kind of all models, or one for each; default: told from the files",
    )
    group.add_argument(
        "--revision", help="branch, tag or commit of every model on the Hub; default: main"
    )
    group.add_argument(
        "--architecture", nargs="+",
        help="open_clip's name of what a weights file holds; of all such files, or one for each; "
        "no default, and needed for such files",
    )  # fmt: skip
    group.add_argument(
        "--activation", nargs="+", metavar="{gelu,quick_gelu}",
        help="of a weights file whose architecture is published with both; as --architecture; "
        "default: the one that it is published with",
    )  # fmt: skip
    group.add_argument(
        "--head", help="model whose projections stored embeddings go through; default: none"
    )
    group.add_argument(
        "--extracted-from",
        metavar="DATA",
        help="captioned data of the stores; no default, and needed for stores",
    )
    add_device_flag(group)
    group.add_argument(
        "--dtype",
        choices=("saved", "float32", "bfloat16", "float16"),
        default="saved",
        help="dtype of the weights; saved: as they are",
    )
    group.add_argument(
        "--batch-size", type=int, help="texts or images of a batch; default: by device"
    )
    group.add_argument(
        "--max-memory-mb", type=float, default=256, metavar="MB",
        help="working memory of the ranks beyond the embeddings, 10^6 bytes; moves no score. The "
        "command runs in one process, not under torchrun: rank_retrieval(…, over_processes=True) "
        "shares the ranks of embeddings that lie there",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    if arguments.list:
        _print_lists()
        return 0
    _require_extras(arguments)
    if arguments.plot is not None:
        from ..evaluation.plots import require_plot_file

        require_plot_file(arguments.plot)
    if arguments.models:
        _require_models(arguments)
        choose_device(arguments)
        from ..evaluation.evaluate import evaluate

        chosen = _build_arguments(arguments)
        if arguments.plot is not None:
            _require_lengths(chosen)
        evaluate(chosen, on_result=_print_result)
    elif arguments.table is None and arguments.plot is None:
        raise ValueError("Name a MODEL and --data, or --list, or --table.")
    from ..evaluation.results import read_results
    from ..evaluation.tables import render_results

    results = read_results(arguments.output)
    if arguments.plot is not None:
        from ..evaluation.plots import plot_lengths

        plot_lengths([result for result in results if result.task == "length"], arguments.plot)
        print(f"Wrote {arguments.plot}.", file=sys.stderr)
    print()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    style = arguments.table or "text"
    print(render_results(results, style=style, width=width, details=arguments.details))
    if not arguments.details:
        again = f"llm2clip evaluate --table --details --output {arguments.output}"
        print(f"What the scores depend on: {again}", file=sys.stderr)
    return 0


def _require_extras(arguments: argparse.Namespace) -> None:
    """Raise MissingExtraError for what models, data and tasks need, before anything is read."""
    needs = [PLOTS] if arguments.plot is not None else []
    needs += [CLIP_TOKENS] if "length" in arguments.tasks else []
    for data in arguments.data:
        needs += list_needs_of_data(data.rpartition("=")[2])
    require(*needs)
    for number, source in enumerate(arguments.models):
        kind = arguments.kind[number % len(arguments.kind)] if arguments.kind else None
        require(*list_needs_of_evaluated(source, kind=kind, revision=arguments.revision))


def _require_models(arguments: argparse.Namespace) -> None:
    """Raise ValueError for models that cannot be evaluated, before anything is imported."""
    from ..model_folders.model_folder import find_model_folder, is_hub_id
    from ..model_folders.model_types import find_model_type

    if not arguments.data:
        raise ValueError("Evaluation needs at least one model and one set (--data).")
    for _, source in map(_read_model, arguments.models):
        path = Path(source)
        if not path.exists() and not is_hub_id(source):
            find_model_folder(source)  # raises
        if not path.is_dir() or arguments.kind or any((path / name).exists() for name in _OTHERS):
            continue
        found = find_model_type(path)
        if found is not None and found.content in ("above", "lora", "text", "vision"):
            raise ValueError(f"{found.advice} There is nothing in it to evaluate.")


def _require_lengths(chosen: EvaluationArguments) -> None:
    """Raise ValueError when what is evaluated, with what lies there, makes no plot of lengths."""
    from ..evaluation.datasets.dataset_registry import find_dataset
    from ..evaluation.results import read_results
    from ..evaluation.tasks.task_registry import find_task

    there = read_results(chosen.output) if any(chosen.output.glob("*/*.length.json")) else []
    sets = {result.set for result in there if result.task == "length"}
    if "length" in chosen.tasks:
        kinds = find_task("length").kinds
        sets |= {data.name for data in chosen.data if find_dataset(data.name).kind in kinds}
    if len(sets) != 1:
        raise ValueError(
            "--plot draws results of the task length (--tasks length) on one set; with what lies "
            f"in {chosen.output} there would be results on {sorted(sets) or 'none'}. Evaluate "
            "other sets into another --output."
        )


def _build_arguments(arguments: argparse.Namespace) -> EvaluationArguments:
    from ..evaluation.arguments import EvaluatedDataset, EvaluatedModel, EvaluationArguments
    from ..evaluation.encoders.encoder import EncoderSettings

    images = dict(_split(text, flag="--image-dir") for text in arguments.image_dir)
    data = tuple(
        EvaluatedDataset(name, folder, image_dir=images.pop(name, None))
        for name, folder in map(_read_data, arguments.data)
    )
    if images:
        raise ValueError(f"--image-dir names sets that --data does not: {sorted(images)}.")
    kinds = arguments.kind or [None]
    if len(kinds) not in (1, len(arguments.models)):
        raise ValueError(
            f"--kind has {len(kinds)} values for {len(arguments.models)} models; give one, or one "
            "for each."
        )
    kinds = kinds * len(arguments.models) if len(kinds) == 1 else kinds
    named = [_read_model(text) for text in arguments.models]
    sources = [source for _, source in named]
    of_files = {flag: _spread(arguments, flag, sources) for flag in _FLAGS_OF_FILES}
    models = tuple(
        EvaluatedModel(
            source,
            name,
            kind,
            **_choose_flags(arguments, source, kind),
            **{flag: values[number] for flag, values in of_files.items()},
        )
        for number, ((name, source), kind) in enumerate(zip(named, kinds, strict=True))
    )
    _refuse_unused_flags(arguments, models)
    settings = pick(EncoderSettings, argparse.Namespace(**vars(arguments), show_progress=True))
    return EvaluationArguments(
        models=models,
        data=data,
        tasks=tuple(arguments.tasks),
        output=arguments.output,
        languages=tuple(arguments.languages),
        captions_only=arguments.captions_only,
        skip_invalid=arguments.skip_invalid,
        check_images=arguments.check_images,
        class_names=_read_lines(arguments.class_names, flag="--class-names"),
        templates=_read_lines(arguments.templates, flag="--templates"),
        allow_repeated_class_names=arguments.allow_repeated_class_names,
        ignore_fields=tuple(arguments.ignore_fields),
        encoder=settings,
        max_memory_mb=arguments.max_memory_mb,
    )


def _choose_flags(
    arguments: argparse.Namespace, source: str, kind: str | None
) -> dict[str, str | None]:
    """The flags that suit one model; what a mixture of models is given is for some of them."""
    from ..evaluation.encoders.auto import detect_model_type

    path = Path(source)
    if kind is None and path.is_dir():
        kind = detect_model_type(path)
    suits = {
        "revision": not path.exists(),
        "head": kind == "embeddings",
        "extracted_from": kind == "embeddings",
    }
    return {flag: getattr(arguments, flag) for flag, is_for_it in suits.items() if is_for_it}


def _spread(arguments: argparse.Namespace, flag: str, sources: Sequence[str]) -> list[str | None]:
    """The value of a flag of weights files for each source: one for all files, or one for each."""
    values = getattr(arguments, flag) or []
    files = [number for number, source in enumerate(sources) if Path(source).is_file()]
    if len(values) not in (0, 1) and len(values) != len(files):
        raise ValueError(
            f"--{flag} has {len(values)} values for {len(files)} weights files; give one, or one "
            "for each, in their order."
        )
    of_file = dict(zip(files, values * len(files) if len(values) == 1 else values, strict=False))
    return [of_file.get(number) for number in range(len(sources))]


def _refuse_unused_flags(arguments: argparse.Namespace, models: Sequence[EvaluatedModel]) -> None:
    wanted = {
        "revision": "a model on the Hub",
        "architecture": "a weights file",
        "activation": "a weights file",
        "head": "a folder of embeddings",
        "extracted_from": "a folder of embeddings",
    }
    for flag, what in wanted.items():
        is_used = any(getattr(model, flag) is not None for model in models)
        if getattr(arguments, flag) is not None and not is_used:
            raise ValueError(
                f"--{flag.replace('_', '-')} is for {what}, and none of the models is one: "
                f"{[model.source for model in models]}. Leave it out."
            )


def _read_model(text: str) -> tuple[str, str]:
    """Name and source; a source that exists is never taken apart."""
    if Path(text).exists() or "=" not in text:
        return "", text
    return _split(text, flag="MODEL")


def _read_data(text: str) -> tuple[str, str | None]:
    """Name of a set and its folder; a folder alone is one's own data, unless a set is called so."""
    from ..evaluation.datasets.dataset_registry import list_datasets

    if Path(text).exists() and text not in {card.name for card in list_datasets()}:
        return "folder", text
    return _split(text, flag="--data") if "=" in text else (text, None)


def _split(text: str, *, flag: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise ValueError(f"{flag} {text!r} is not NAME=FOLDER.")
    return name, value


def _read_lines(file: Path | None, *, flag: str) -> tuple[str, ...] | None:
    if file is None:
        return None
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()  # some editors write the mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {file} is no text file in UTF-8: {error}.") from error
    return tuple(line.strip() for line in lines if line.strip())


def _print_lists() -> None:
    from ..evaluation.datasets.dataset_registry import list_datasets
    from ..evaluation.tasks.task_registry import TASKS

    print("Sets (--data NAME=FOLDER):")
    for card in list_datasets():
        print(f"  {card.describe()}")
        print(f"      license {card.license}; from {card.source}; files: {card.files}")
    print("Tasks (--tasks NAME):")
    for task in TASKS.values():
        print(f"  {task.name}: {task.title}; on sets of kind {' or '.join(task.kinds)}")


def _print_result(result: Result) -> None:
    from ..evaluation.tables import write_headline

    print(
        f"{result.model}: {result.task} on {result.set}: {write_headline(result)}; "
        f"{result.seconds:.1f} s",
        file=sys.stderr,
    )

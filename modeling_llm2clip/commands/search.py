"""`llm2clip search`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._extras import require
from .extras import list_needs_of_model

if TYPE_CHECKING:
    from ..search.kept_vectors import KeptVectors

_NOTE = "The number under a picture is its cosine with the sentence."


def add_parser(commands: Any) -> None:
    """Add the command and its flags."""
    search = commands.add_parser("search", help="the pictures of a folder that fit a sentence best")
    search.add_argument("model", help="Hub id or folder of a whole model")
    search.add_argument("pictures", type=Path, help="folder; those below it are searched too")
    search.add_argument("sentences", nargs="+", metavar="sentence")
    search.add_argument("--count", type=int, default=6, help="pictures a sentence")
    search.add_argument("--output", type=Path, help="new folder for search.png and search.html")
    search.add_argument(
        "--vectors",
        type=Path,
        metavar="FILE",
        help="keeps the pictures' vectors, so that the next search encodes new ones only",
    )
    search.add_argument(
        "--exclude-faults", action="store_true", help="leave broken pictures out, and count them"
    )
    search.add_argument("--batch-size", type=int, help="pictures of a batch")
    search.add_argument("--num-workers", type=int, default=1, help="threads that decode pictures")
    search.add_argument("--device", default="cpu")
    search.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run it and return the exit code."""
    require(*list_needs_of_model(arguments.model))
    from ..encoding.devices import require_device
    from ..hub.doctor.patient import find_folder
    from ..hub.new_folder import require_new_folder
    from ..modeling_llm2clip import LLM2CLIPModel
    from ..processing_llm2clip import LLM2CLIPProcessor, clean_list
    from ..search.gallery import find_pictures, list_pictures, make_gallery

    clean_list(arguments.sentences)  # before what takes long
    require_device(arguments.device)
    if arguments.output is not None:
        require_new_folder(arguments.output)
    paths = list_pictures(arguments.pictures)
    folder = find_folder(arguments.model)
    kept = _open_vectors(arguments.vectors, folder)
    paths = _leave_out_faults(paths, kept, allowed=arguments.exclude_faults)
    processor = LLM2CLIPProcessor.from_pretrained(folder)
    model = LLM2CLIPModel.from_pretrained(folder).to(arguments.device)
    vision_embeds = kept.encode(
        model,
        processor,
        paths,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        show_progress=True,
    )
    gallery = make_gallery(model, paths, vision_embeds)
    found = find_pictures(model, processor, gallery, arguments.sentences, count=arguments.count)
    for result in found:
        print(result.sentence)
        for path, cosine in result.found:
            print(f"  {cosine:.3f}  {path}")
    if arguments.output is not None:
        _write(found, arguments.output)
    return 0


def _open_vectors(file: Path | None, model_folder: Path) -> KeptVectors:
    from ..encoding.fingerprint import fingerprint_vision
    from ..search.kept_vectors import KeptVectors

    if file is None:
        return KeptVectors()
    return KeptVectors(file, fingerprint_vision(model_folder))


def _leave_out_faults(paths: list[Path], kept: KeptVectors, *, allowed: bool) -> list[Path]:
    from ..data.picture_checks import find_unreadable

    new = [path for path in paths if path not in kept]
    if len(new) < len(paths):
        print(f"Known from earlier searches: {len(paths) - len(new):,} of {len(paths):,} pictures.")
    unreadable = find_unreadable(new, show_progress=True)
    if not unreadable:
        return paths
    faults = list(unreadable.values())
    shown = "\n".join(faults[:8]) + ("\n…" if len(faults) > 8 else "")
    readable = [path for path in paths if path not in unreadable]
    if not allowed or not readable:
        raise ValueError(
            f"{len(faults)} of {len(paths)} pictures cannot be read:\n{shown}\nMend or remove "
            "them, or leave them out with --exclude-faults."
        )
    print(f"Left out {len(faults)} of {len(paths)} pictures:\n{shown}")
    return readable


def _write(found: Any, output: Path) -> None:
    from ..search.contact_sheet import write_contact_sheet, write_page

    output.mkdir(parents=True, exist_ok=True)
    write_contact_sheet(found, output / "search.png")
    write_page(found, output / "search.html", title="Pictures by sentence", note=_NOTE)
    print(f"Wrote {output / 'search.png'} and {output / 'search.html'}.")

"""Find a model's folder by path or Hub id, and detect what it contains from small files.

Needs neither torch nor weights, so a wrong folder is reported immediately, with the command that
accepts such a folder. huggingface_hub retries many times without a network. Here, the Hub is tried
once, so a misspelled folder is reported within seconds.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from .._suggestions import list_first
from ..configs.build_config import EMBEDDED, EMBEDDED_VISION
from ..configs.encoding_config import DUAL_ENCODERS
from ..data.sources.json_files import read_json

# Sources of a converted model, written by the conversion.
RECORD_FILE = "conversion.json"
# The same record after training: the weights no longer match the listed files.
RECORD_BEFORE_TRAINING = "conversion_before_training.json"
# peft's files of a LoRA.
LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = "adapter_model.safetensors"
_DEMO_MODEL = Path("..") / "llm2clip-demo" / "model"  # relative to a notebook in examples/
# Other formats of the same weights, only downloaded when requested by name.
_NOT_DOWNLOADED = [
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "onnx/*",
    "openvino/*",
]  # fmt: skip
_NAME = r"\w[\w.-]*"
_SECONDS = 5.0
# Record of a folder of ONNX graphs: the export, its checks and their results.
ONNX_RECORD = "onnx_export.json"
_VISION_FIELDS = ("image_size", "patch_size", "num_channels", "hidden_sizes")


def find_model_folder(
    source: str | Path, *, revision: str | None = None, only: Sequence[str] | None = None
) -> Path:
    """Return a local folder, or download a Hub repository and return the snapshot's folder.

    With `only`, just the files that match these patterns are downloaded, whatever their format.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(
                f"{source} is a local folder, so it has no revision {revision!r}. Omit the "
                "revision."
            )
        return Path(source)
    require_there(source)
    try:
        return Path(
            snapshot_download(
                str(source),
                revision=revision,
                allow_patterns=None if only is None else list(only),
                ignore_patterns=_NOT_DOWNLOADED if only is None else None,
            )
        )
    except LocalEntryNotFoundError as error:  # does not name the repository
        raise FileNotFoundError(f"{source} cannot be downloaded: {error}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{source}: no such local folder, and the repository is not on the Hub or is private. "
            "Correct the name, or log in (hf auth login)."
        ) from error


def require_there(source: str | Path) -> None:
    """Refuse a source that is neither a local folder nor a reachable Hub repository."""
    if not Path(source).is_dir() and (missing := explain_missing(source)):
        raise ValueError(f"{source}: {missing}. Correct the path or id.")


def find_demo_model() -> str:
    """Find the notebooks' model: `LLM2CLIP_MODEL`, or the folder written by the demo."""
    source = os.environ.get("LLM2CLIP_MODEL") or str(_DEMO_MODEL)
    if not is_hub_id(source) and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(
            f"There is no model in {source}. Run `llm2clip demo` at the root of the repository; it "
            "writes llm2clip-demo/model in a few minutes. Or set LLM2CLIP_MODEL to another model "
            "folder or a Hub id."
        )
    return source


def is_inside(file: Path, folder: Path) -> bool:
    """Return whether a file belongs to a folder after following all links.

    For a snapshot in huggingface_hub's cache, the blobs of its repository also belong to it.
    """
    content, root = file.resolve(), folder.resolve()
    in_snapshots = root.parent.name == "snapshots"
    return content.is_relative_to(root) or (
        in_snapshots and content.parent == root.parent.parent / "blobs"
    )


def list_uploaded_files() -> list[Path]:
    package = Path(__file__).parents[1]
    return sorted(path for path in package.glob("*.py") if not path.name.startswith("_"))


def is_hub_id(source: str | Path) -> bool:
    """Return whether a source can only be a Hub id: `owner/name`, without a local folder `owner`.

    A `Path` is never a Hub id.
    """
    return (
        isinstance(source, str)
        and re.fullmatch(f"{_NAME}/{_NAME}", source) is not None
        and not Path(source).parent.is_dir()
    )


def explain_missing(source: str | Path, *, may_lack_owner: bool = False) -> str | None:
    """Explain why a source is neither a local folder nor a reachable Hub repository.

    None if the source may be on the Hub or in its cache. Older repositories have no owner ("gpt2").
    """
    is_short = may_lack_owner and re.fullmatch(_NAME, str(source)) is not None
    if is_short or is_hub_id(source):
        name = repo_folder_name(repo_id=str(source), repo_type="model")
        is_cached = (Path(constants.HF_HUB_CACHE) / name / "snapshots").is_dir()
        if is_cached or (reason := _try_hub()) is None:
            return None
        return (
            "no such local folder, and the Hub, which may have a repository with this name, cannot "
            f"be reached ({reason}: check the network)"
        )
    above = next((parent for parent in Path(source).parents if parent.is_dir()), Path())
    if above in (Path(), Path("/")):
        return "no such folder, and not a Hub id like 'owner/name'"
    names = sorted(path.name for path in above.iterdir() if path.is_dir())
    shown = f"the folders {list_first(names)}" if names else "no folder"
    return f"no such folder, and not a Hub id: {above} exists, but has {shown}"


def fetch_hub_file(source: str | Path, name: str, *, revision: str | None = None) -> Path | None:
    """Fetch a small file from a Hub repository, or from the cache if the Hub cannot be reached.

    None if there is no such file.
    """
    try:
        return Path(
            hf_hub_download(
                str(source), name, revision=revision, local_files_only=_try_hub() is not None
            )
        )
    except (OSError, ValueError):  # no such file, not in the cache, or not a Hub id
        return None


def _try_hub() -> str | None:
    """Return why the Hub cannot be reached; None if it can be, or if there is a proxy."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    scheme = urlsplit(constants.ENDPOINT).scheme
    return None if getproxies().keys() & {scheme, "all"} else _connect(constants.ENDPOINT)


@cache
def _connect(endpoint: str) -> str | None:
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_SECONDS).close()
    except OSError as error:
        return f"{address.hostname}: {error.strerror or error}"
    return None


def require_sources(
    *,
    vision: Sequence[str | Path] = (),
    text: str | Path | None = None,
    lora: str | Path | None = None,
) -> None:
    """Refuse towers and LoRAs that neither exist locally nor look like Hub ids.

    Nothing is loaded, and all missing sources are named at once. A text tower may be a `.gguf`
    file, also in a Hub repository (`owner/name/FILE.gguf`); both towers may be "embedded".
    """
    visions = (source for source in vision if source not in EMBEDDED_VISION)
    errors = [_find_error("vision tower", source, file="config.json") for source in visions]
    if text is not None and Path(text).suffix == ".gguf":
        if not Path(text).is_file() and not is_hub_id(str(Path(text).parent)):
            errors.append(
                f"{text}: no such .gguf file, and not a file in a Hub repository like "
                "'owner/name/FILE'"
            )
    elif text is not None and text != EMBEDDED:
        errors.append(_find_error("language model", text, file="config.json"))
    if lora is not None:
        errors.append(_find_error("LoRA", lora, file=LORA_CONFIG))
    if problems := [error for error in errors if error]:
        raise ValueError(f"{'; '.join(problems)}. Correct the path or id.")


def _find_error(what: str, source: str | Path, *, file: str) -> str | None:
    path = Path(source)
    if path.is_dir():
        if (path / file).is_file():
            return None
        return f"{source}: the folder has no {file}, so it is not a {what}"
    if path.exists():
        return f"{source}: the {what} must be a folder or a Hub id, not a file"
    missing = explain_missing(source, may_lack_owner=True)
    return f"{source}: no such {what}: {missing}" if missing else None


# Content of a folder or repository, as one word, and advice naming the command for it.
_ADVICE = {
    "llm2clip": "",
    "onnx": (
        "{name} is a folder of ONNX graphs, for `llm2clip serve` and `llm2clip embed` with "
        "--backend onnx, `llm2clip search` with --model, and load_onnx_encoder."
    ),
    "sentence-transformers": (
        "{name} is a sentence-transformers model. `llm2clip evaluate {name}` evaluates it."
    ),
    "official": (
        "{name} is an official LLM2CLIP checkpoint. `llm2clip convert {name} OUTPUT "
        "--source-format NAME --text-model TEXT_MODEL` converts it to a model."
    ),
    "clip": (
        "{name} is a {type!r} with its own text encoder. `llm2clip build {name} TEXT_MODEL OUTPUT` "
        "builds an LLM2CLIP model from its vision tower; `llm2clip evaluate {name}` evaluates it "
        "unchanged."
    ),
    "text": (
        "{name} is a language model ({type!r}). `llm2clip build VISION_MODEL {name} OUTPUT` builds "
        "an LLM2CLIP model from it and a vision tower."
    ),
    "vision": (
        "{name} is a vision tower ({type!r}). `llm2clip build {name} TEXT_MODEL OUTPUT` builds an "
        "LLM2CLIP model from it and a language model."
    ),
    "other": "{name} is a {type!r}, which no command accepts as a model.",
    "lora": (
        "{name} is a LoRA. `llm2clip build VISION_MODEL TEXT_MODEL OUTPUT --lora {name}` merges it "
        "into its LLM; `llm2clip finetune-llm MODEL DATA OUTPUT --init-lora {name}` continues "
        "training it."
    ),
    "store": (
        "{name} is an embedding store. `llm2clip align MODEL DATA OUTPUT --caption-store {name}` "
        "trains on it (--image-store for an image store)."
    ),
    "above": "{name} has no config.json, but its subfolder {inside} does. Pass that folder.",
}


class FoundModel(NamedTuple):
    """The type of a folder or Hub repository (a key of `_ADVICE`), and advice on its use."""

    content: str
    advice: str


def find_model_type(source: str | Path, *, revision: str | None = None) -> FoundModel | None:
    """Detect what a folder or Hub repository contains from its small files; None if unclear."""
    folder = Path(source)
    file: Path | None = folder / "config.json"
    if not folder.is_dir():
        file = (
            fetch_hub_file(source, "config.json", revision=revision) if is_hub_id(source) else None
        )
    config = read_json_object(file) if file and file.is_file() else {}
    if config is None:  # damaged
        return None
    inside = sorted(path.parent for path in folder.glob("*/config.json"))
    model_type = config.get("model_type")
    architectures = [str(item) for item in config.get("architectures") or []]
    writes = any(item.endswith(("ForCausalLM", "ConditionalGeneration")) for item in architectures)
    content = {  # the first true entry wins
        "onnx": holds_graphs(folder),
        "llm2clip": model_type == "llm2clip",
        "sentence-transformers": (folder / "modules.json").is_file(),
        "official": any(item.startswith("LLM2CLIP") for item in architectures),
        "clip": model_type in DUAL_ENCODERS,
        "text": writes or "vocab_size" in config,
        "vision": model_type == "timm_wrapper" or any(name in config for name in _VISION_FIELDS),
        "other": model_type is not None,
        "lora": not config and (folder / LORA_CONFIG).is_file(),
        "store": not config and (folder / "manifest.json").is_file(),
        "above": not config and bool(inside),
    }
    kind = next((kind for kind, holds in content.items() if holds), None)
    if kind is None:
        return None
    advice = _ADVICE[kind].format(name=source, type=model_type, inside=list_first(inside))
    return FoundModel(kind, advice)


def holds_graphs(source: str | Path | None) -> bool:
    return source is not None and (Path(source) / ONNX_RECORD).is_file()


def is_dual_encoder(source: str | Path) -> bool:
    description = find_model_type(source)
    return description is not None and description.content == "clip"


def require_own_model(
    source: str | Path, *, revision: str | None = None, or_teacher: bool = False
) -> None:
    """Refuse a source that is not an LLM2CLIP model, and name the command that accepts it.

    With `or_teacher`, a dual encoder with its own text encoder is also accepted.
    """
    require_there(source)
    description, folder = find_model_type(source, revision=revision), Path(source)
    # Weights without config.json may be a damaged model; `doctor` explains that.
    is_model = (folder / "config.json").is_file() or any(folder.glob("*.safetensors"))
    if description is None and folder.is_dir() and not is_model:
        raise ValueError(
            f"{source} is not a model folder: it has no config.json and no weights. Pass the "
            "folder or Hub id of an LLM2CLIP model."
        )
    taken = ("llm2clip", "clip") if or_teacher else ("llm2clip",)
    if description is not None and description.content not in taken:
        teacher = ", or a CLIP or SigLIP with its own text encoder," if or_teacher else ""
        raise ValueError(f"{description.advice} An LLM2CLIP model{teacher} is needed here.")


def read_json_object(file: Path) -> dict[str, Any] | None:
    """Read a JSON file; None if it is damaged or does not contain an object."""
    try:
        content: Any = read_json(file)
    except ValueError:  # loading the model reports the damage
        return None
    return content if isinstance(content, dict) else None

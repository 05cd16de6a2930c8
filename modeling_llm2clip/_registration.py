"""Registers this package with transformers' Auto classes without importing torch.

Registration needs our classes, which import torch, and that takes seconds. So each class is
registered when the transformers module that owns the Auto class is imported, or immediately if that
module is already imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AUTO = "transformers.models.auto"
_SINGLE_TOWER = ("LLM2CLIPTextModel", "LLM2CLIPVisionModel")
# Each row has the module that owns the Auto class, our module, our classes, and the Auto classes to
# register them with. If there are several of our classes, an Auto class uses the one that
# config.json names, or else the first.
_REGISTRATIONS = (
    (f"{_AUTO}.configuration_auto", "configuration_llm2clip", ("LLM2CLIPConfig",), ("AutoConfig",)),
    (f"{_AUTO}.modeling_auto", "modeling_llm2clip", ("LLM2CLIPModel", *_SINGLE_TOWER),
     ("AutoModel",)),
    (f"{_AUTO}.modeling_auto", "modeling_llm2clip", ("LLM2CLIPModel",),
     ("AutoModelForZeroShotImageClassification",)),
    (f"{_AUTO}.modeling_auto", "modeling_llm2clip", ("LLM2CLIPTextModel",),
     ("AutoModelForTextEncoding",)),
    (f"{_AUTO}.processing_auto", "processing_llm2clip", ("LLM2CLIPProcessor",),
     ("AutoProcessor",)),
    (f"{_AUTO}.image_processing_auto", "image_cropping_llm2clip",
     ("LLM2CLIPImageProcessor", "LLM2CLIPImageProcessorPil"), ("AutoImageProcessor",)),
)  # fmt: skip
_BASE = f"{__package__}.base_llm2clip"  # imported by our modules of several rows
_WATCHED = {_BASE, *(auto for auto, *_ in _REGISTRATIONS)} | {
    f"{__package__}.{ours}" for _, ours, *_ in _REGISTRATIONS
}
_running: set[str] = set()


def _register_ready_classes() -> None:
    """Register each class whose Auto class is imported, unless one of their modules still executes.

    Our modules import the modules of the Auto classes, so one of our modules may be partially
    executed when an Auto module finishes. The classes are registered once both modules have
    finished.
    """
    for auto_name, ours_name, class_names, auto_classes in _REGISTRATIONS:
        ours_full_name = f"{__package__}.{ours_name}"
        if auto_name not in sys.modules or _running & {auto_name, ours_full_name, _BASE}:
            continue
        classes = tuple(getattr(import_module(ours_full_name), name) for name in class_names)
        if auto_classes == ("AutoImageProcessor",):
            # Registered only by name: no configuration has it as its default.
            sys.modules[auto_name].AutoImageProcessor.register(
                classes[0],
                image_processor_classes=dict(zip(("torchvision", "pil"), classes, strict=True)),
                exist_ok=True,
            )
            continue
        ours = classes if len(classes) > 1 else classes[0]
        configuration = import_module(f"{__package__}.configuration_llm2clip")
        key = "llm2clip" if auto_classes == ("AutoConfig",) else configuration.LLM2CLIPConfig
        for auto_class in auto_classes:
            getattr(sys.modules[auto_name], auto_class).register(key, ours, exist_ok=True)


def _execute(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Execute a module with its loader's function, then register the classes that are ready."""
    _running.add(module.__name__)
    try:
        execute(module)
    finally:
        _running.discard(module.__name__)
    _register_ready_classes()


class _RegisteringFinder(MetaPathFinder):
    """Finds our modules and the modules of transformers that own Auto classes."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname not in _WATCHED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = partial(_execute, spec.loader.exec_module)
            setattr(spec.loader, "exec_module", execute)  # noqa: B010 (mypy: a method)
        return spec


def register_auto_classes() -> None:
    """Register our classes with every Auto class, now or when its module is imported."""
    if any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _RegisteringFinder())
    _register_ready_classes()

"""Makes transformers' Auto classes know this package, without paying for torch at import time.

Registering needs our classes, and they need torch, which costs seconds. So each registration waits
until the transformers module that owns the Auto class is itself imported; where it is already,
registration happens at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def _register_configuration(auto: ModuleType) -> None:
    from .configuration_llm2clip import LLM2CLIPConfig

    auto.AutoConfig.register("llm2clip", LLM2CLIPConfig, exist_ok=True)


def _register_models(auto: ModuleType) -> None:
    from .configuration_llm2clip import LLM2CLIPConfig
    from .modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel

    auto.AutoModel.register(LLM2CLIPConfig, LLM2CLIPModel, exist_ok=True)
    auto.AutoModelForZeroShotImageClassification.register(
        LLM2CLIPConfig, LLM2CLIPModel, exist_ok=True
    )
    auto.AutoModelForTextEncoding.register(LLM2CLIPConfig, LLM2CLIPTextModel, exist_ok=True)


def _register_processor(auto: ModuleType) -> None:
    from .configuration_llm2clip import LLM2CLIPConfig
    from .processing_llm2clip import LLM2CLIPProcessor

    auto.AutoProcessor.register(LLM2CLIPConfig, LLM2CLIPProcessor, exist_ok=True)


_REGISTRATIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_configuration,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.processing_auto": _register_processor,
}


class _RegisteringLoader(Loader):
    """Runs a module as its own loader does, then registers our classes with it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _REGISTRATIONS[module.__name__](module)

    def __getattr__(self, name: str) -> object:  # get_source and the like, for inspect
        return getattr(self._loader, name)


class _RegisteringFinder(MetaPathFinder):
    """Finds the three modules of transformers that own Auto classes."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname not in _REGISTRATIONS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_auto_classes() -> None:
    """Register now with what is imported, and with the rest when it will be."""
    if any(isinstance(finder, _RegisteringFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _RegisteringFinder())
    for name, register in _REGISTRATIONS.items():
        if name in sys.modules:
            register(import_module(name))

"""What calls of the tier `python` may import: the standard library, the packages of this environment, and modules that are named."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

# what most code imports: a call that finds it here need not read it
_READY = (
    "base64", "bisect", "calendar", "collections", "collections.abc", "copy", "csv", "dataclasses", "datetime", "decimal", "enum",
    "fractions", "functools", "hashlib", "heapq", "io", "itertools", "json", "math", "operator", "pathlib", "random", "re", "statistics",
    "string", "struct", "tempfile", "textwrap", "time", "traceback", "typing", "unicodedata", "uuid", "zlib", "zoneinfo",
)  # fmt: skip


def make_ready() -> None:
    """Import what most code imports."""
    for name in _READY:
        importlib.import_module(name)


class _Granted:
    """Finds modules that may be imported in folders that may not be listed."""

    def __init__(self, specs: Mapping[str, ModuleSpec]) -> None:
        self._specs = specs

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        spec = self._specs.get(name)
        if spec is None or spec.origin is None:
            return spec
        return importlib.util.spec_from_file_location(name, spec.origin, submodule_search_locations=spec.submodule_search_locations)


def grant(modules: Sequence[str]) -> list[str]:
    """Let modules be imported by calls, a package with all that is in it; returns the files and folders that takes.

    None of their code is run. Raises `ModuleNotFoundError`.
    """
    specs: dict[str, ModuleSpec] = {}
    paths: list[str] = []
    for name in modules:
        where, parts = None, name.split(".")
        for count in range(1, len(parts) + 1):
            part = ".".join(parts[:count])
            spec = importlib.machinery.PathFinder.find_spec(part, where)
            if spec is None:
                raise ModuleNotFoundError(f"there is no module {part}", name=part)
            specs[part], where = spec, spec.submodule_search_locations
            paths += [path for path in (spec.origin, spec.cached) if path and os.path.isabs(path)]
        paths += list(where or [])
    sys.meta_path.insert(0, _Granted(specs))
    return paths


def narrow() -> list[str]:
    """Look for modules nowhere but in Python's own library and the packages of this environment; returns the folders of both."""
    roots = (sys.base_prefix, sys.prefix)
    sys.path[:] = [path for path in sys.path if any(Path(path).is_relative_to(root) for root in roots)]
    sys.path_importer_cache.clear()
    # of a Python that came with the system, only its library: around it lies all of the system
    own = sys.path if sys.base_prefix == "/usr" else [sys.base_prefix]
    return [*own, *([sys.prefix] if sys.prefix != sys.base_prefix else [])]

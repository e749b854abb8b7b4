"""A table of the kinds of one component, such as densities or backbones. Each package has its own table in registry.py."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Generic, TypeVar, cast

from focus_ray.names import suggest_similar_name

T = TypeVar("T")


class LazyRegistry(Generic[T]):
    """A table of the kinds of one component (density, backbone, importer ...), by name. A kind is imported when it is looked up.

    The files of densities and backbones import torch only inside functions, so that a configuration can be checked without torch.
    """

    def __init__(self, component: str, import_paths: dict[str, str]) -> None:
        """
        Args:
            component: name of the component for error messages, as in "density".
            import_paths: name of the kind -> "module:attribute".
        """
        self.component, self.import_paths = component, import_paths

    def __iter__(self) -> Iterator[str]:
        return iter(self.import_paths)

    def check_name(self, name: str) -> str:
        """Returns the name unchanged.

        Raises: ValueError: there is no kind of this name. The message lists the available names.
        """
        if name not in self.import_paths:
            hints = (suggest_similar_name(name, self.import_paths), f"choose one of {', '.join(self.import_paths)}")
            raise ValueError(f"{self.component} {name!r} is not known: {' '.join(hint for hint in hints if hint)}")
        return name

    def __getitem__(self, name: str) -> T:
        """Imports and returns the kind of this name. Raises: ValueError: there is no kind of this name."""
        module, _, attribute = self.import_paths[self.check_name(name)].partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))

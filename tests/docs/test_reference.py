"""The reference holds every public name, and nothing that is not there."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import mmbal_fast

PAGES = sorted((Path(__file__).parents[2] / "docs" / "reference").glob("*.rst"))


def public_modules() -> list[str]:
    """Modules of a public name that say what they export."""
    found = [each.name for each in pkgutil.walk_packages(mmbal_fast.__path__, "mmbal_fast.")]
    public = [name for name in found if not any(part[0] == "_" for part in name.split("."))]
    exporting = [name for name in public if hasattr(importlib.import_module(name), "__all__")]
    return ["mmbal_fast", *exporting]


def documented() -> list[str]:
    """Full names, from the directives of the pages."""
    names, module = [], ""
    for line in "\n".join(page.read_text() for page in PAGES).splitlines():
        if match := re.match(r"\.\. (?:currentmodule|automodule):: (\S+)", line):
            module = match[1]
            names.append(module)
        elif match := re.match(r"\.\. auto(?:class|data|exception|function):: (\S+)", line):
            names.append(f"{module}.{match[1]}")
        elif match := re.match(r" +:members: +(\S.*)", line):
            names += [f"{module}.{each}" for each in match[1].split(", ")]
    return names


def value(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    if module and hasattr(importlib.import_module(module), attribute):
        return getattr(importlib.import_module(module), attribute)
    return importlib.import_module(name)


@pytest.mark.parametrize("module", public_modules())
def test_every_public_name_is_in_the_reference(module: str) -> None:
    known = {id(value(name)) for name in documented()}
    exported = importlib.import_module(module).__all__
    assert sorted(exported) == sorted(set(exported))
    missing = [name for name in exported if id(value(f"{module}.{name}")) not in known]
    assert not missing


def test_the_reference_names_nothing_twice() -> None:
    functions = [id(each) for each in map(value, documented()) if not isinstance(each, ModuleType)]
    assert len(functions) == len(set(functions))

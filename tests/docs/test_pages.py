"""What the README and the pages promise has a test, and the code that they show runs."""

from __future__ import annotations

import doctest
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmbal_fast
from tests.docs import given

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))


@dataclass(frozen=True)
class Block:
    """Python on a page. What stands after the language names the test that runs it."""

    page: str
    line: int
    word: str
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^```python *(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    name = str(page.relative_to(ROOT))
    return [Block(name, text.count("\n", 0, m.start()) + 2, m[1], m[2]) for m in found]


def run(block: Block, names: dict[str, Any]) -> None:
    if block.code.startswith(">>>"):
        parser = doctest.DocTestParser()
        test = parser.get_doctest(block.code, names, block.page, block.page, block.line - 1)
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        said: list[str] = []
        assert runner.run(test, out=said.append).failed == 0, "".join(said)
        return
    code = "\n" * (block.line - 1) + block.code  # so that a traceback names the line of the page
    exec(compile(code, block.page, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names = given.PAGES.get(str(page.relative_to(ROOT)), dict)()
    for block in blocks(page):
        if block.word:
            assert f'"{block.word}"' in TESTS, f"{block.page}:{block.line} is run by no test"
        else:
            run(block, names)


def test_no_code_hides_from_these_tests() -> None:
    """Code is fenced and says that it is Python."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        hidden = re.findall(
            r"^ {4,}(?:import |from \w+ import|def |self\.|>>> ).*", text, re.MULTILINE
        )
        assert not hidden, (page, hidden)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """Where files are read as they are; `make docs` checks the links and anchors of the site."""
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_equivalent_of_ogm_ge_is_equivalent() -> None:
    by_word = {each.word: each for each in blocks(ROOT / "docs/ogm_ge.md")}
    step, equivalent = by_word["step"], by_word["equivalent"]
    encoders: Any = nn.ModuleDict({name: nn.Linear(4, 3, bias=False) for name in "abc"})
    logits = {name: torch.randn(8, 3) * (1 + index) for index, name in enumerate("abc")}
    target = torch.arange(8) % 3
    for parameter in encoders.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)  # no deviation: no noise to speak of
    names: dict[str, Any] = {
        "torch": torch,
        "alpha": 0.3,
        "target": target,
        "logits": logits,
        "grads": {name: [encoders[name].weight.grad.clone()] for name in "abc"},
    }
    run(equivalent, names)
    balancer = mmbal_fast.OGMGE(encoders, alpha=0.3)
    run(step, {"balancer": balancer, "logits": logits, "target": target})
    assert balancer.last is not None
    assert balancer.last.coefficients.min() < 1
    for name in "abc":
        torch.testing.assert_close(encoders[name].weight.grad, names["grads"][name][0])


def test_before_and_after_of_ogm_ge_do_the_same() -> None:
    before, after = blocks(ROOT / "docs/migrating.md")[:2]
    results = []
    names = given.migrating()
    for block in (before, after):
        for parameter in names["model"].parameters():
            parameter.grad = torch.full_like(parameter, 3.0)  # no deviation: no noise to speak of
        run(block, names)
        results.append([parameter.grad for parameter in names["model"].parameters()])
    assert names["balancer"].last.coefficients.min() < 1
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_ten_lines_train() -> None:
    names = given.readme()
    before = names["audio_net"].weight.clone()
    (block,) = blocks(ROOT / "README.md")
    run(block, names)
    assert names["balancer"].state_dict()["step"] == 2
    assert not torch.equal(names["audio_net"].weight, before)


def rows() -> list[str]:
    """Of the table of what works with what."""
    text = (ROOT / "docs/training_stacks.md").read_text()
    _, _, rest = text.partition("## What works with what")
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    return lines[2:]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.split("|")[1].strip())
def test_what_works_is_shown_by_a_test(row: str) -> None:
    _, _, works, shown, _ = row.split("|")
    assert works.strip()
    named = re.findall(r"`((?:test|check)_\w+|tests/[\w/.]+)`", shown)
    assert named
    for name in named:
        assert f"\ndef {name}(" in TESTS or (ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("CITATION.cff", r"^version: (\S+)$"),
        ("docs/citing.md", r"^  version = \{(\S+)\},$"),
        ("CHANGELOG.md", r"^## (\S+) \(20\d\d-\d\d-\d\d\)$"),
    ],
)
def test_the_version_is_the_same_everywhere(path: str, pattern: str) -> None:
    found = re.search(pattern, (ROOT / path).read_text(), re.MULTILINE)
    assert found is not None
    assert found[1] == mmbal_fast.__version__


def test_how_to_cite_is_said_for_every_method() -> None:
    text = (ROOT / "docs/citing.md").read_text()
    exported = [getattr(mmbal_fast, name) for name in mmbal_fast.methods.__all__]
    methods = [each for each in exported if issubclass(each, mmbal_fast.Method)]
    assert methods
    missing = [each.__name__ for each in methods if f"`{each.__name__}" not in text]
    assert not missing

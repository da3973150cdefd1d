"""The code of the README and the documentation runs, links lead somewhere, and every public name has an example."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import flashlla_jax
import flashlla_jax.nn

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(r"^([ \t]*)```python[ \t]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^([ \t]*)```.*?^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)

# Each block keeps its line numbers, so that a traceback points into the page.
RUNNER = """
import re, sys
text = open(sys.argv[1], encoding="utf-8").read()
names = {"__name__": "__main__"}
for block in re.compile(sys.argv[2], re.MULTILINE | re.DOTALL).finditer(text):
    code = "".join(line.removeprefix(block[1]) for line in block[2].splitlines(keepends=True))
    code = "\\n" * text.count("\\n", 0, block.start(2)) + code
    exec(compile(code, sys.argv[1], "exec"), names)
"""

# Fake devices, for the pages that need some.
DEVICES = {"JAX_NUM_CPU_DEVICES": "4"}


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=() if p == "README.md" else pytest.mark.slow) for p in PAGES if BLOCK.search(text(p))],
)
def test_code_runs(page: str, tmp_path: Path) -> None:
    """All Python blocks of a page, in order, in one namespace and a fresh interpreter with a reader's settings."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(ROOT / page), BLOCK.pattern],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | DEVICES,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_exist(page: str) -> None:
    """What a page links to or shows is in the repository; ``results/`` is where the site puts the committed results."""
    links = {next(filter(None, groups)) for groups in LINK.findall(FENCE.sub("", text(page)))}
    files = {link.partition("#")[0] for link in links if not re.match(r"[a-z][a-z+.-]*:|#|//", link)}
    folder = (ROOT / page).parent
    at = {f: ROOT / "benchmarks" / f if f.startswith("results/") else folder / f for f in files}
    missing = sorted(file for file, path in at.items() if not path.exists())
    assert not missing, f"{page} links to {missing}"


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as Markdown's ``toc`` and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading) for heading in headings)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_anchors_exist(page: str) -> None:
    """A link to a part of a page leads to a heading of it."""
    links = {next(filter(None, groups)) for groups in LINK.findall(FENCE.sub("", text(page)))}
    parts = [link.partition("#") for link in links if "#" in link and not re.match(r"[a-z][a-z+.-]*:|//", link)]
    own, folder = ROOT / page, (ROOT / page).parent
    missing = sorted(f"{file}#{part}" for file, _, part in parts if part not in anchors(folder / file if file else own))
    assert not missing, f"{page} links to {missing}"


def test_every_page_is_in_the_navigation() -> None:
    nav = text("mkdocs.yml").partition("\nnav:")[2]
    assert [page for page in PAGES[1:] if page.removeprefix("docs/") not in nav] == []


def public_objects() -> list[str]:
    """Each with the module that a user imports it from."""
    linen = importlib.import_module("flashlla_jax.nn.linen")
    of_linen = [name for name, x in vars(linen).items() if not name.startswith("_") and is_from(linen, x)]
    assert len(of_linen) >= 2
    nn = set(flashlla_jax.nn.__all__) - set(flashlla_jax.__all__)  # the others are in both
    return [
        *(f"flashlla_jax.{name}" for name in flashlla_jax.__all__),
        *(f"flashlla_jax.nn.{name}" for name in sorted(nn)),
        *(f"flashlla_jax.nn.linen.{name}" for name in of_linen),
    ]


def is_from(module: ModuleType, x: object) -> bool:
    return getattr(x, "__module__", None) == module.__name__


@pytest.mark.parametrize("name", public_objects())
def test_every_public_name_has_an_example(name: str) -> None:
    """On its API page: its documentation, and code that imports it and then uses it. ``test_code_runs`` runs it."""
    pages = "".join(text(f"docs/api/{page}.md") for page in ("functions", "modules"))
    code = "".join(block[2] for block in BLOCK.finditer(pages))
    module, _, short = name.rpartition(".")
    imported = re.search(rf"^from {module} import {short}(?: as (\w+))?$", code, re.MULTILINE)
    assert imported, f"no code imports {name}"
    assert re.search(rf"\b{imported[1] or short}\b", code[imported.end() :]), f"no code uses {name}"
    assert re.search(rf"^::: {name}$", pages, re.MULTILINE), f"{name} is not documented"


def test_the_readme_is_short() -> None:
    assert text("README.md").count("\n") <= 150

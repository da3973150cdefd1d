"""The code of the README and the documentation runs, links lead somewhere, and every public name has an example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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


def test_every_page_is_in_the_navigation() -> None:
    nav = text("mkdocs.yml").partition("\nnav:")[2]
    assert [page for page in PAGES[1:] if page.removeprefix("docs/") not in nav] == []


def test_every_public_name_has_an_example() -> None:
    """On its API page, in code that ``test_code_runs`` runs."""
    pages = "".join(text(f"docs/api/{name}.md") for name in ("functions", "modules"))
    code = "".join(block[2] for block in BLOCK.finditer(pages))
    names = {*flashlla_jax.__all__, *flashlla_jax.nn.__all__}
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)] == []
    assert [name for name in sorted(names) if not re.search(rf"^::: flashlla_jax[\w.]*\.{name}$", pages, re.M)] == []


def test_the_readme_is_short() -> None:
    assert text("README.md").count("\n") <= 150

"""The README's code runs and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"

BLOCK = re.compile(r"^([ \t]*)```python[ \t]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)

# Each block keeps its line numbers, so that a traceback points into the README.
RUNNER = """
import re, sys
text = open(sys.argv[1], encoding="utf-8").read()
names = {"__name__": "__main__"}
for block in re.compile(sys.argv[2], re.MULTILINE | re.DOTALL).finditer(text):
    code = "".join(line.removeprefix(block[1]) for line in block[2].splitlines(keepends=True))
    code = "\\n" * text.count("\\n", 0, block.start(2)) + code
    exec(compile(code, sys.argv[1], "exec"), names)
"""


# on fake devices, for the section that needs some; without LLVM's part of the compilation, which takes most of the time
QUICKLY = {"JAX_NUM_CPU_DEVICES": "4", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def readme() -> str:
    assert README.is_file(), "README.md is missing"
    return README.read_text(encoding="utf-8")


def test_code_runs(tmp_path: Path) -> None:
    """Every python block, in order, in one namespace and a fresh interpreter: JAX's settings are a reader's."""
    assert BLOCK.search(readme()), "README.md has no python block"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(README), BLOCK.pattern],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | QUICKLY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_relative_links_exist() -> None:
    """Files that the README links to or shows are in the repository."""
    prose = re.sub(r"^([ \t]*)```.*?^\1```", "", readme(), flags=re.MULTILINE | re.DOTALL)
    links = {next(filter(None, groups)) for groups in LINK.findall(prose)}
    files = {link.partition("#")[0] for link in links if not re.match(r"[a-z][a-z+.-]*:|#|//", link)}
    missing = sorted(file for file in files if not (ROOT / file).exists())
    assert not missing, f"README.md links to {missing}"

"""Puts the committed results into the site, under ``results/``, and takes Sphinx's roles out of docstrings."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for path in sorted(RESULTS.glob("*.*")):
        if path.suffix in (".png", ".txt"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_content(html: str, **_: object) -> str:
    return re.sub(r":(?:func|class):<code>~?([\w.]+)</code>", r"<code>\1</code>", html)

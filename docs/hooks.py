"""Puts the committed results of benchmarks and examples into the site, under ``results/``."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for path in sorted(RESULTS.glob("*.*")):
        if path.suffix in (".png", ".txt"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files

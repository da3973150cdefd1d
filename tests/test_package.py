"""The package as an installed thing: imports, names, version, typing, documentation."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest

import flashlla_jax
from flashlla_jax import lla_attention, lla_attention_and_omega

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    """The output of ``code`` in a fresh interpreter on the CPU, outside the repository's directory."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pytest_xdist_knows_the_groups(request: pytest.FixtureRequest) -> None:
    """It marks them in a test's name. Without them each process compiles every program."""
    if not request.config.getoption("loadgroup", default=False):  # a process of pytest-xdist has it
        pytest.skip("needs -n and --dist loadgroup")
    assert "@" in request.node.nodeid


def test_runs_without_triton() -> None:
    """Triton is built for Linux only: without it and jax-triton the package imports, and a forward pass runs."""
    code = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "jax_triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
try:
    import triton
except ModuleNotFoundError:
    print("triton is missing")
import jax.numpy as jnp
from flashlla_jax import lla_attention
print(round(float(lla_attention(*[jnp.ones((1, 5, 4))] * 3)[0, 0, 0]), 5))
"""
    # equal values are returned as they are: the weights sum to one
    assert run(code).splitlines() == ["triton is missing", "1.0"]


def test_import_is_light() -> None:
    """Importing neither loads a kernel compiler nor starts a JAX backend (which would claim the GPU)."""
    code = """
import sys
import flashlla_jax
from jax.extend import backend
from jax._src import xla_bridge
print(sorted({"triton", "jax_triton", "torch"} & set(sys.modules)), xla_bridge.backends_are_initialized())
backend.get_backend()
print(xla_bridge.backends_are_initialized())
"""
    assert run(code).splitlines() == ["[] False", "True"]  # the second: the question can be answered otherwise


def test_public_names_are_all() -> None:
    """``__all__`` is what ``__init__`` imports, sorted, and nothing else is public but the submodules."""
    tree = ast.parse((ROOT / "flashlla_jax" / "__init__.py").read_text())
    statements = [*tree.body, *(x for node in tree.body if isinstance(node, ast.If) for x in node.body)]
    imported = {
        alias.asname or alias.name
        for node in statements
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    assert set(flashlla_jax.__all__) == imported
    assert len(flashlla_jax.__all__) == len(imported)
    names = (name for name in dir(flashlla_jax) if not name.startswith("_") and name not in ("Any", "TYPE_CHECKING"))
    public = {name for name in names if not inspect.ismodule(getattr(flashlla_jax, name))}
    assert public == imported


def test_flax_is_loaded_when_it_is_used() -> None:
    code = """
import sys
import flashlla_jax
print("flax" in sys.modules)
print(flashlla_jax.LLAttention.__name__, "flax" in sys.modules)
from flashlla_jax import LLAttention
print(hasattr(flashlla_jax, "LLAtention"))
"""
    assert run(code).splitlines() == ["False", "LLAttention True", "False"]


def test_version() -> None:
    """One place holds the version; the build reads it there, and so does an installed package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    source = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text()
    assert f'__version__ = "{flashlla_jax.__version__}"' in source
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+|\.dev\d+)?", flashlla_jax.__version__)
    try:
        installed = importlib.metadata.version(project["project"]["name"])
    except importlib.metadata.PackageNotFoundError:
        return  # run from a checkout
    assert installed == flashlla_jax.__version__


def test_is_typed() -> None:
    assert (Path(flashlla_jax.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", flashlla_jax.__all__)
def test_documented(name: str) -> None:
    """Every public name has a docstring that mentions every parameter or field, or refers to ``lla_attention``,
    which has the parameter and does."""
    x = getattr(flashlla_jax, name)
    doc = inspect.getdoc(x)
    assert doc
    if isinstance(x, type) and "__init__" in vars(x):  # an NNX module, whose metaclass hides the signature
        x = x.__init__
        doc += "\n" + (inspect.getdoc(x) or "")
    entries = set(re.findall(r"^\s+(\w+): ", doc, re.MULTILINE))
    parameters = set(inspect.signature(x).parameters) - {"self"}
    if ":func:`lla_attention`" in doc:
        entries |= set(inspect.signature(lla_attention).parameters)
    assert parameters <= entries, f"not documented: {sorted(parameters - entries)}"


def test_the_two_forms_have_the_same_options() -> None:
    """The explicit form differs in order, in the ridge being required and in what it returns; nothing else."""
    named, explicit = (inspect.signature(f).parameters for f in (lla_attention, lla_attention_and_omega))
    assert set(named) - set(explicit) == {"return_residuals"}
    assert set(explicit) <= set(named)
    for name, parameter in explicit.items():
        default = inspect.Parameter.empty if name == "ridge_lambda" else named[name].default
        assert parameter.default == default, name


def test_overloads_match_the_function() -> None:
    """What a type checker sees is what there is: the same parameters in the same order."""
    overloads = typing.get_overloads(lla_attention)
    assert len(overloads) == 2
    for overload in overloads:
        assert list(inspect.signature(overload).parameters) == list(inspect.signature(lla_attention).parameters)


SOURCES = [
    path for folder in ("flashlla_jax", "tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
]


def test_files_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in SOURCES}
    assert {name: n for name, n in lines.items() if n > 450} == {}


def test_functions_are_short() -> None:
    """With their docstrings. A kernel is one function: what it keeps in registers cannot be divided."""
    lengths = {
        f"{path.relative_to(ROOT)}: {node.name}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        if path.parent.name != "kernels"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    }
    assert len(lengths) > 500
    assert {name: n for name, n in lengths.items() if n > 80} == {}

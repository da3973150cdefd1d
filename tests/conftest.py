"""float64 is on for every test (the reference is float64), and nothing is promoted or broadcast by accident."""

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)  # for test_sharding.py; the others use the first

# Files whose tests stay together for a minute and more. They start first: none is left to one process at the end.
LONGEST = (
    "test_compile.py",
    "test_visibility.py",
    "test_sharding.py",
    "test_pages.py",
    "test_transforms.py",
    "test_lowering.py",
    "test_train_on_a_mesh.py",
)

# Triton interprets from its import on: these tests are run alone, with TRITON_INTERPRET=1
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


def _asks_for_a_gpu(config: pytest.Config) -> bool:
    return bool(re.search(r"(?<!not )\bgpu\b", config.option.markexpr or ""))


def pytest_configure(config: pytest.Config) -> None:
    """Every other test is the CPU's, whatever the machine has; so are the scripts that tests start."""
    config.option.loadscopereorder = False  # pytest-xdist's: it would start with the groups of the most tests
    if _asks_for_a_gpu(config):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    _compile_quickly()


def _compile_quickly() -> None:
    """The shapes are small, and nearly all time goes into compilation: most of XLA's optimisation is left out.

    XLA's older code for fusions compiles in a third of the time. JAX 0.12 has it no more, and a flag that XLA does not
    know ends the process. ``XLA_FLAGS= pytest`` runs the tests with the newer code.
    """
    if jax.__version__.startswith("0.10."):
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for the scripts that tests start


def _program(item: pytest.Item) -> str:
    """A test and what of its parameters changes the program: kinds of keys, ridges and what is hidden are arrays.

    Without addresses of functions: every process has to find the same name.
    """
    params = item.callspec.params if hasattr(item, "callspec") else {}  # type: ignore[attr-defined]
    static = [
        re.sub(" at 0x[0-9a-f]+", "", str(x)) for name, x in params.items() if name not in ("kind", "ridge", "name")
    ]
    return ":".join([item.nodeid.split("[")[0], *static])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What shares a program or a fixture goes to one process (``--dist loadgroup``); GPU tests run only by ``-m gpu``.

    So a program is compiled once, which takes half a minute for some. The classes of shared cases are long and their
    programs are many, so they are divided by program. All other tests of a file stay together.

    This has to come before pytest-xdist's hook of the same name, which reads the groups.
    """
    of_a_gpu = _asks_for_a_gpu(config)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        alone = of_a_gpu or getattr(item, "cls", None) is not None
        item.add_marker(pytest.mark.xdist_group(_program(item) if alone else str(item.path)))
    if of_a_gpu:
        return
    skip = pytest.mark.skip(reason="needs a GPU: run with -m gpu")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def import_example() -> Callable[[str], ModuleType]:
    """Imports an example by name, with its folder on the path as when it is run."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    return importlib.import_module


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """A file's programs are no other file's: together they are gigabytes, and slow the garbage collection down."""
    yield
    jax.clear_caches()


@pytest.fixture
def optimised() -> Iterator[None]:
    """For what takes long to run, and for tests that look at the compiled program as a user has it."""
    jax.clear_caches()  # a program is not compiled anew for the option
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def as_a_script() -> Iterator[None]:
    """The suite's float64 and strict promotion are not what a user's script runs with."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield

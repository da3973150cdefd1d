"""Every refusal: the exception, and a message that names the argument, what came and what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashlla_jax.attention as attention_module
from flashlla_jax import lla_attention, lla_attention_and_omega


def array(*shape: int, dtype: Any = "float32") -> jax.Array:
    return jnp.ones(shape, dtype)


def same(*shape: int, dtype: Any = "float32") -> dict[str, Any]:
    """query, key and value of one shape."""
    return dict.fromkeys(("query", "key", "value"), array(*shape, dtype=dtype))


RANK_3 = same(2, 6, 4)
RANK_4 = same(2, 6, 4, 8)


class Case(NamedTuple):
    """A call that is refused: the arguments that differ from a good call, and all that the message must contain."""

    name: str
    arguments: dict[str, Any]
    error: type[Exception]
    parts: tuple[str, ...]
    base: dict[str, Any] = RANK_3


SHAPES = [
    Case("rank 2", same(6, 4), ValueError, ("query", "rank 3, (B, T, D)", "rank 4, (B, T, N, H)", "got shape (6, 4)")),
    Case("rank 5", same(1, 2, 6, 4, 8), ValueError, ("query", "rank 3", "rank 4", "(1, 2, 6, 4, 8)", "jax.vmap")),
    Case("scalar", {"key": array()}, ValueError, ("key", "rank 3", "rank 4", "got shape ()")),
    Case("rank 2 value", {"value": array(6, 4)}, ValueError, ("value", "rank 3", "rank 4", "got shape (6, 4)")),
    Case(
        "mixed ranks",
        {"key": array(2, 6, 1, 4)},
        ValueError,
        ("query, key and value must have the same rank", "query (2, 6, 4)", "key (2, 6, 1, 4)", "value (2, 6, 4)"),
    ),
    Case(
        "batch of the key",
        {"key": array(1, 6, 4), "value": array(1, 6, 4)},
        ValueError,
        ("same batch size (first axis)", "query (2, 6, 4)", "key (1, 6, 4)", "value (1, 6, 4)"),
    ),
    Case("batch of the value", {"value": array(3, 6, 4)}, ValueError, ("same batch size", "value (3, 6, 4)")),
    Case(
        "key and value lengths",
        {"value": array(2, 7, 4)},
        ValueError,
        ("key and value must have the same length (second axis)", "key (2, 6, 4)", "value (2, 7, 4)"),
    ),
    Case(
        "head dimension, rank 3",
        {"key": array(2, 6, 5)},
        ValueError,
        ("query and key must have the same head dimension (last axis)", "query (2, 6, 4)", "key (2, 6, 5)"),
    ),
    Case("head dimension, rank 4", {"key": array(2, 6, 4, 7)}, ValueError, ("same head dimension", "7)"), RANK_4),
    Case(
        "key and value heads",
        {"value": array(2, 6, 2, 8)},
        ValueError,
        ("key and value must have the same number of heads (third axis)", "key (2, 6, 4, 8)", "value (2, 6, 2, 8)"),
        RANK_4,
    ),
    Case(
        "heads not divisible",
        {"key": array(2, 6, 3, 8), "value": array(2, 6, 3, 8)},
        ValueError,
        ("key/value heads (third axis) must divide the query heads", "got 3 for 4"),
        RANK_4,
    ),
    Case(
        "more key heads than query heads",
        {"key": array(2, 6, 8, 8), "value": array(2, 6, 8, 8)},
        ValueError,
        ("must divide the query heads", "got 8 for 4"),
        RANK_4,
    ),
    Case(
        "causal with more queries than keys",
        {"query": array(2, 7, 4)},
        ValueError,
        (
            "is_causal=True needs at least as many keys as queries",
            "query (2, 7, 4)",
            "key (2, 6, 4)",
            "is_causal=False",
            "query_offset",
        ),
    ),
    Case("no queries", {"query": array(2, 0, 4)}, ValueError, ("query must not be empty", "got shape (2, 0, 4)")),
    Case(
        "no keys",
        {"key": array(2, 0, 4), "value": array(2, 0, 4), "is_causal": False},
        ValueError,
        ("key must not be empty", "got shape (2, 0, 4)"),
    ),
    Case("no features", same(2, 6, 0), ValueError, ("query must not be empty", "(2, 6, 0)")),
    Case("no heads", same(2, 6, 0, 8), ValueError, ("query must not be empty", "heads", "(2, 6, 0, 8)")),
]

DTYPES = [
    Case(
        f"{dtype} {name}",
        {name: array(2, 6, 4, dtype=dtype)},
        TypeError,
        (f"{name} has dtype {dtype}", "allowed are bfloat16, float16, float32, float64"),
    )
    for name, dtype in (
        ("query", "int32"),
        ("key", "bool"),
        ("value", "complex64"),
        ("query", "float8_e4m3fn"),
        ("value", "float8_e5m2"),
        ("key", "uint8"),
    )
]

TYPES = [
    Case(
        "mixed dtypes",
        {"key": array(2, 6, 4, dtype="bfloat16")},
        TypeError,
        ("query, key and value must have the same dtype", "query float32", "key bfloat16", "value float32"),
    ),
    Case("a list", {"query": [[[1.0]]]}, TypeError, ("query must be an array, got list",)),
    Case("None", {"value": None}, TypeError, ("value must be an array, got NoneType",)),
    Case("a number", {"key": 1.0}, TypeError, ("key must be an array, got float",)),
]


def ridge(name: str, value: Any, error: type[Exception], *parts: str, base: dict[str, Any] = RANK_3) -> Case:
    return Case(f"ridge {name}", {"ridge_lambda": value}, error, ("ridge_lambda", *parts), base)


RIDGES = [
    ridge("0", 0, ValueError, "must be > 0", "got 0"),
    ridge("-1", -1, ValueError, "must be > 0", "got -1"),
    ridge("-inf", -math.inf, ValueError, "must be > 0", "got -inf"),
    ridge("NaN", math.nan, ValueError, "must be > 0", "got nan"),
    ridge("NumPy scalar", np.float32(-2), ValueError, "must be > 0", "-2"),
    ridge("array with 0", np.array([1.0, 0, 1, 1, 1, 1]), ValueError, "must be > 0", "array whose minimum is 0.0"),
    ridge("array with NaN", np.array([1.0, math.nan, 1, 1, 1, 1]), ValueError, "must be > 0", "minimum is nan"),
    ridge("underflow", 1e-50, ValueError, "must be > 0 (in float32)", "got 1e-50"),
    ridge("underflow in an array", np.full(6, 1e-50), ValueError, "must be > 0 (in float32)", "minimum is 1e-50"),
    ridge("True", True, TypeError, "must be a real number or an array", "got bool"),
    ridge("text", "a", TypeError, "must be a real number or an array", "got str"),
    ridge("None", None, TypeError, "must be a real number or an array", "got NoneType"),
    ridge("a list", [1.0] * 6, TypeError, "must be a real number or an array", "got list"),
    ridge("complex", 1j, TypeError, "must be a real number or an array", "got complex"),
    ridge("complex array", np.ones(6, complex), TypeError, "must be real", "got dtype complex128"),
    ridge("bool array", np.ones(6, bool), TypeError, "must be real", "got dtype bool"),
    ridge("bool device array", jnp.ones(6, bool), TypeError, "must be real", "got dtype bool"),
    ridge("shape (2,)", np.ones(2), ValueError, "(2,) does not broadcast to (B, T) = (2, 6)"),
    ridge("shape (3, 6)", jnp.ones((3, 6)), ValueError, "(3, 6) does not broadcast to (B, T) = (2, 6)"),
    ridge("more axes", np.ones((1, 2, 6)), ValueError, "(1, 2, 6) does not broadcast to (B, T) = (2, 6)"),
    ridge("bigger batch", np.ones((4, 6, 4)), ValueError, "(B, T, N) = (2, 6, 4)", base=RANK_4),
    ridge(
        "per token without its axis",
        np.ones((2, 6)),
        ValueError,
        "(2, 6) does not broadcast to (B, T, N) = (2, 6, 4)",
        "a ridge per token has shape (2, 6, 1)",
        base=RANK_4,
    ),
    ridge("empty", np.ones(0), ValueError, "(0,) does not broadcast"),
]


def option(name: str, value: Any, error: type[Exception], *parts: str) -> Case:
    return Case(f"{name}={value!r}", {name: value}, error, (name, *parts))


NUMBER = "must be a Python number"
OPTIONS = [
    option("qk_scale", math.nan, ValueError, "must be finite", "got nan"),
    option("qk_scale", math.inf, ValueError, "must be finite", "got inf"),
    option("qk_scale", "1", TypeError, NUMBER, "got str"),
    option("qk_scale", True, TypeError, NUMBER, "got bool"),
    option("qk_scale", jnp.float32(1.0), TypeError, NUMBER, "known at trace time"),
    option("qk_scale", np.ones(()), TypeError, NUMBER, "got ndarray"),
    *(
        case
        for name in ("delta_eps", "cg_atol", "cg_rtol")
        for case in (
            option(name, -1e-9, ValueError, "must be finite and >= 0", "got -1e-09"),
            option(name, math.nan, ValueError, "must be finite and >= 0", "got nan"),
            option(name, math.inf, ValueError, "must be finite and >= 0", "got inf"),
            option(name, "0.1", TypeError, NUMBER, "got str"),
            option(name, False, TypeError, NUMBER, "got bool"),
        )
    ),
    option("delta_eps", None, TypeError, NUMBER, "got NoneType"),
    option("cg_max_iters", 0, ValueError, "must be >= 1", "got 0"),
    option("cg_max_iters", -1, ValueError, "must be >= 1", "got -1"),
    option("cg_max_iters", 1.5, TypeError, "must be an int or None", "got 1.5"),
    option("cg_max_iters", 32.0, TypeError, "must be an int or None", "got 32.0"),
    option("cg_max_iters", True, TypeError, "must be an int or None", "got True"),
    option("cg_max_iters", "3", TypeError, "must be an int or None", "got '3'"),
    *(
        option(name, value, TypeError, "must be True or False", f"got {value!r}")
        for name in ("cg_use_preconditioner", "is_causal", "return_residuals")
        for value in (1, 0, None, "yes")
    ),
    option("implementation", "flash", ValueError, "'triton', 'xla', 'reference' or None", "got 'flash'"),
    option("implementation", "XLA", ValueError, "'triton', 'xla', 'reference' or None", "got 'XLA'"),
    option("implementation", 1, ValueError, "'triton', 'xla', 'reference' or None", "got 1"),
    option("implementation", "triton", NotImplementedError, '"triton"', 'implementation="xla"'),
    option("precision", "exact", ValueError, "jax.lax.Precision", "'default', 'high', 'highest'", "got 'exact'"),
    option("precision", ("high", "exact"), ValueError, "'default', 'high', 'highest'", "got ('high', 'exact')"),
    option("cg_max_iters", 2**31, ValueError, "cg_max_iters", "< 2**31", "got 2147483648"),
    option("precision", 7, ValueError, "'default', 'high', 'highest'", "got 7"),
]

FULL = "(B, N, T, S) = (2, 4, 6, 6)"


def masked(name: str, argument: str, value: Any, error: type[Exception], *parts: str) -> Case:
    return Case(f"{argument} {name}", {argument: value}, error, (argument, *parts), RANK_4)


MASKS = [
    masked("float", "mask", np.ones((2, 4, 6, 6)), TypeError, "must be boolean", "got dtype float64"),
    masked("integer", "mask", jnp.ones((2, 4, 6, 6), "int32"), TypeError, "must be boolean", "got dtype int32"),
    masked("a list", "mask", [True], TypeError, "must be a boolean array, got list"),
    masked("rank 2", "mask", np.ones((6, 6), bool), ValueError, f"must have the shape {FULL}", "got (6, 6)"),
    masked("rank 3", "mask", np.ones((2, 6, 6), bool), ValueError, FULL, "or 1 in place of any", "got (2, 6, 6)"),
    masked("key/value heads", "mask", np.ones((2, 2, 6, 6), bool), ValueError, FULL, "got (2, 2, 6, 6)"),
    masked("too long", "mask", np.ones((2, 1, 1, 7), bool), ValueError, FULL, "got (2, 1, 1, 7)"),
    Case(
        "mask of rank 4 for rank 3",
        {"mask": np.ones((2, 1, 6, 6), bool)},
        ValueError,
        ("mask", "(B, T, S) = (2, 6, 6)", "got (2, 1, 6, 6)"),
    ),
    masked("a list", "key_value_seq_lengths", [3, 4], TypeError, "must be an integer array, got list"),
    masked("float", "key_value_seq_lengths", np.ones(2), TypeError, "must be integers, got dtype float64"),
    masked("scalar", "key_value_seq_lengths", jnp.asarray(3), ValueError, "(B,) = (2,)", "got ()"),
    masked("other batch", "key_value_seq_lengths", np.ones(3, int), ValueError, "(B,) = (2,)", "got (3,)"),
    masked("too long", "key_value_seq_lengths", np.array([3, 7]), ValueError, "between 0 and", "6", "got 3 to 7"),
    masked("negative", "key_value_seq_lengths", np.array([3, -1]), ValueError, "between 0 and", "got -1 to 3"),
    masked("too long", "query_seq_lengths", np.array([3, 7]), ValueError, "between 0 and", "6", "got 3 to 7"),
    masked("bool", "query_seq_lengths", np.ones(2, bool), TypeError, "must be integers, got dtype bool"),
]

ONE_OR_PAIR = "an integer array or a pair of them"
SEGMENTS = [
    masked("a number", "segment_ids", 3, TypeError, ONE_OR_PAIR, "got int"),
    masked("float", "segment_ids", np.ones((2, 6)), TypeError, "must be integers, got dtype float64"),
    masked("too short", "segment_ids", np.ones((2, 5), int), ValueError, "(B, S) = (2, 6)", "got (2, 5)"),
    masked("three", "segment_ids", (np.ones((2, 6), int),) * 3, ValueError, "a pair (query, key)", "got 3"),
    masked("nested lists", "segment_ids", ([[1]], [[1]]), TypeError, ONE_OR_PAIR, "got list"),
    masked(
        "a wrong pair",
        "segment_ids",
        (np.ones((2, 6), int), np.ones((2, 7), int)),
        ValueError,
        "(B, T) = (2, 6) and (B, S) = (2, 6)",
        "(2, 7)",
    ),
    masked(
        "two dtypes",
        "segment_ids",
        (np.ones((2, 6), np.int32), np.ones((2, 6), np.int8)),
        TypeError,
        "one dtype",
        "int32 and int8",
    ),
    Case(
        "one array for more keys than queries",
        {"query": array(2, 5, 4), "segment_ids": np.ones((2, 5), int)},
        ValueError,
        ("segment_ids", "query (2, 5, 4)", "key (2, 6, 4)", "pass a pair"),
    ),
]

POSITIONS = [
    option("local_window_size", -1, ValueError, "must be >= 0", "got -1"),
    option("local_window_size", (3, -1), ValueError, "must be >= 0", "got (3, -1)"),
    option("local_window_size", 2.0, TypeError, "an int or a pair (left, right) of ints", "got 2.0"),
    option("local_window_size", (1, 2, 3), TypeError, "a pair (left, right)", "got (1, 2, 3)"),
    option("local_window_size", (1, None), TypeError, "a pair (left, right)", "got (1, None)"),
    option("local_window_size", True, TypeError, "an int or a pair", "got True"),
    option("query_offset", 1.5, TypeError, "an int, or an integer array", "got float"),
    option("query_offset", True, TypeError, "an int, or an integer array", "got bool"),
    option("query_offset", 2**40, ValueError, "between -2**29 and 2**29", f"got {2**40}"),
    Case("offset float", {"query_offset": np.ones(2)}, TypeError, ("query_offset", "integers", "float64")),
    Case("offset shape", {"query_offset": np.ones(3, int)}, ValueError, ("query_offset", "(B,) = (2,)", "(3,)")),
    Case("offset too far", {"query_offset": np.array([1, 2**40])}, ValueError, ("query_offset", "2**29", "got 1 to")),
]

CASES = [*SHAPES, *DTYPES, *TYPES, *RIDGES, *OPTIONS, *MASKS, *SEGMENTS, *POSITIONS]


@pytest.fixture(autouse=True)
def _no_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument is refused before any implementation is called, so none may be."""

    def refuse(*args: Any) -> None:
        pytest.fail("an implementation was called before the arguments were checked")

    monkeypatch.setattr(attention_module, "_run", refuse)


def check(case: Case, call: Callable[[], Any]) -> None:
    with pytest.raises(case.error) as caught:
        call()
    assert type(caught.value) is case.error  # not a subclass that JAX or NumPy raised on our behalf
    missing = [part for part in case.parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check(case, lambda: lla_attention(**(case.base | case.arguments)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused_under_jit(case: Case) -> None:
    """The same exception with query, key and value traced: nothing that is known early waits for a value."""
    arguments = case.base | case.arguments
    traced = {name: arguments.pop(name) for name in ("query", "key", "value") if hasattr(arguments[name], "shape")}
    check(case, lambda: jax.jit(lambda traced: lla_attention(**traced, **arguments))(traced))


@pytest.mark.parametrize("name", ["qk_scale", "delta_eps", "cg_atol", "cg_rtol"])
def test_a_traced_number_is_refused(name: str) -> None:
    """The options are static; the message says so rather than leaving it to a tracer error."""
    call = jax.jit(lambda value: lla_attention(**RANK_3, **{name: value}))
    with pytest.raises(TypeError, match=f"^{name} must be a Python number, known at trace time"):
        call(0.5)


@pytest.mark.parametrize("name", ["is_causal", "cg_use_preconditioner", "return_residuals"])
def test_a_traced_flag_is_refused(name: str) -> None:
    call = jax.jit(lambda value: lla_attention(**RANK_3, **{name: value}))
    with pytest.raises(TypeError, match=f"^{name} must be True or False"):
        call(True)


def test_a_flag_is_checked_before_it_is_used() -> None:
    """A wrong ``is_causal`` is the error, not what it would have meant for the shapes."""
    arguments: Any = RANK_3 | {"query": array(2, 7, 4), "is_causal": "no"}
    with pytest.raises(TypeError, match=r"^is_causal must be True or False, got 'no'"):
        lla_attention(**arguments)


def test_the_explicit_form_refuses_alike() -> None:
    q = array(2, 6, 4)
    with pytest.raises(ValueError, match=re.escape("ridge_lambda must be > 0 (in float32), got 0")):
        lla_attention_and_omega(q, q, q, 0)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'ridge_lambda'"):
        lla_attention_and_omega(q, q, q)  # pyright: ignore[reportCallIssue]


def test_options_are_keywords_only() -> None:
    q: Any = array(2, 6, 4)
    with pytest.raises(TypeError, match="positional"):
        lla_attention(q, q, q, 0.1)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="unexpected keyword argument 'keys'"):
        lla_attention(q, q, q, keys=1.0)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("name", "remedy"), [("scale", "is qk_scale"), ("bias", "by mask, boolean"), ("dropout_rate", "to the output")]
)
def test_names_from_elsewhere_are_explained(name: str, remedy: str) -> None:
    q: Any = array(2, 6, 4)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}': .*{remedy}"):
        lla_attention(q, q, q, **{name: 1.0})


class TestPrecision:
    """None is JAX's own setting; what reaches the implementation is a ``jax.lax.Precision``."""

    @pytest.fixture
    def given(self, monkeypatch: pytest.MonkeyPatch) -> list[jax.lax.Precision]:
        precisions: list[jax.lax.Precision] = []

        def record(static: Any, hiding: Any, query: Any, key: Any, value: Any, ridge_lambda: Any) -> tuple[Any, Any]:
            precisions.append(static.options.precision)
            return value, ridge_lambda

        monkeypatch.setattr(attention_module, "_run", record)
        return precisions

    @pytest.mark.parametrize("precision", [None, "default", "high", "highest", *jax.lax.Precision], ids=str)
    def test_accepted(self, given: list[jax.lax.Precision], precision: Any) -> None:
        lla_attention(**RANK_4, precision=precision, implementation="xla")
        assert given == [jax.lax.Precision(precision or "default")]

    @pytest.mark.parametrize("name", ["default", "high", "highest", "bfloat16", "tensorfloat32", "float32"])
    def test_jaxs_default_is_honoured(self, given: list[jax.lax.Precision], name: str) -> None:
        with jax.default_matmul_precision(name):
            lla_attention(**RANK_4, implementation="xla")
            lla_attention(**RANK_4, precision="default", implementation="xla")  # an explicit one wins
        assert given == [jax.lax.Precision(name), jax.lax.Precision.DEFAULT]

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("F32_F32_F32", "highest"),
            ("BF16_BF16_F32_X9", "highest"),
            ("BF16_BF16_F32_X3", "high"),
            ("TF32_TF32_F32", "default"),
        ],
    )
    def test_dot_algorithms_are_the_nearest_precision(
        self, given: list[jax.lax.Precision], name: str, expected: str
    ) -> None:
        """JAX takes them for its default, and a ``PrecisionLike`` may be one."""
        with jax.default_matmul_precision(name):
            lla_attention(**RANK_4, implementation="xla")
        lla_attention(**RANK_4, precision=jax.lax.DotAlgorithmPreset[name], implementation="xla")
        assert given == [jax.lax.Precision(expected)] * 2

    def test_of_a_pair_the_higher_one_counts(self, given: list[jax.lax.Precision]) -> None:
        lla_attention(**RANK_4, precision=("default", jax.lax.Precision.HIGH), implementation="xla")
        assert given == [jax.lax.Precision.HIGH]

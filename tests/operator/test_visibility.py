"""Every way of hiding keys: what is hidden is as if it were not there."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlla_jax import blockwise, lla_attention
from flashlla_jax.arguments import check_hiding, check_options
from flashlla_jax.reference import attention_backward
from flashlla_jax.visibility import Part, Visibility, dense, seeing_queries, seen_keys, visibility
from tests.cases import GRADIENTS, HIDDEN, Inputs, Shape, draw, evaluate, operate, relative_error
from tests.operator.test_memory import DIM, LONG, SHORT

SHAPE = Shape(2, 140, 160, 4, 2, 6, 8)  # two blocks of queries and of keys, ragged

# Both paths in float64, apart by where conjugate gradients stop: as SAME in test_transforms.py.
SAME = 1e-10

both = pytest.mark.parametrize("implementation", ["xla", "reference"])


def ridge(shape: Shape = SHAPE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).uniform(0.5, 2.0, shape.ridge))


def random_mask(*shape: int) -> jax.Array:
    """A third visible; with causality many queries see few keys, and some none."""
    return jnp.asarray(np.random.default_rng(2).random(shape) < 0.3)


def assert_same(got: dict[str, jax.Array], expected: dict[str, jax.Array], bound: float = SAME) -> None:
    for name, x in expected.items():
        assert relative_error(got[name], x) <= bound, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "is_causal"),
    [((2, 4, 140, 160), True), ((2, 1, 1, 160), False), ((1, 4, 140, 1), True)],
    ids=str,
)
def test_blockwise_is_the_reference(shape: tuple[int, ...], is_causal: bool) -> None:
    inputs, lam = draw(SHAPE), ridge()
    mask = random_mask(*shape)
    whole = jnp.broadcast_to(mask, (2, 4, 140, 160))
    expected = evaluate(inputs, lam, hidden={"mask": whole}, implementation="reference", is_causal=is_causal)
    assert_same(evaluate(inputs, lam, hidden={"mask": mask}, implementation="xla", is_causal=is_causal), expected)


def test_the_reference_backward_is_its_gradient() -> None:
    """The gradient written out takes the mask, empty rows included, as autodiff does."""
    shape = Shape(2, 9, 12, 4, 2, 5, 3)
    inputs, lam, mask = draw(shape), ridge(shape), random_mask(2, 4, 9, 12)
    assert not bool(mask[..., :4].any(axis=-1).all())  # causal, so that the first query has only four keys to see
    options = check_options(inputs.q, None, 1e-12, None, None, None, False, None)
    seen = visibility(check_hiding(inputs.q, inputs.k, is_causal=True, mask=mask), 9, 12)
    got = jax.jit(partial(attention_backward, options=options))(*inputs[:3], lam, seen, inputs.g)
    expected = evaluate(inputs, lam, hidden={"mask": mask}, implementation="reference")
    assert_same(dict(zip(GRADIENTS, got, strict=True)), {name: expected[name] for name in GRADIENTS})


@pytest.mark.slow
@both
def test_lengths_are_slices(implementation: str) -> None:
    """Padding a batch entry's keys is not having them; the hidden rows may hold anything, and get no gradient."""
    inputs, lam = draw(SHAPE), ridge()
    lengths = (145, 37)
    filler = jnp.asarray([jnp.nan, jnp.inf])[jnp.arange(160) % 2][:, None, None]
    padded = list(inputs)
    for b, n in enumerate(lengths):
        for i in (1, 2):
            padded[i] = padded[i].at[b, n:].set(jnp.broadcast_to(filler, padded[i].shape[1:])[n:])
    masks = {"key_value_seq_lengths": jnp.asarray(lengths)}
    got = evaluate(Inputs(*padded), lam, hidden=masks, is_causal=False, implementation=implementation)
    for b, n in enumerate(lengths):
        for name in ("dk", "dv"):
            np.testing.assert_array_equal(got[name][b, n:], 0)
            assert bool(jnp.all(jnp.isfinite(got[name][b, :n]) & (got[name][b, :n] != 0)))
    n = lengths[1]
    one = Inputs(inputs.q[1:], inputs.k[1:, :n], inputs.v[1:, :n], inputs.g[1:])
    expected = evaluate(one, lam[1:], is_causal=False, implementation=implementation)
    assert_same({name: x[1:, :n] if name in ("dk", "dv") else x[1:] for name, x in got.items()}, expected)


@pytest.mark.slow
@both
def test_left_padding_is_a_slice(implementation: str) -> None:
    """Causal, the first keys hidden: their queries see nothing, the others what they would see alone."""
    shape, pad = Shape(1, 140, 140, 2, 1, 8, 8), 30
    inputs, lam = draw(shape, kind="shifted"), ridge(shape)
    mask = (jnp.arange(140) >= pad)[None, None, None]
    poisoned = inputs._replace(k=inputs.k.at[:, :pad].set(jnp.nan), v=inputs.v.at[:, :pad].set(jnp.nan))
    got = evaluate(poisoned, lam, hidden={"mask": mask}, implementation=implementation)
    expected = evaluate(Inputs(*(x[:, pad:] for x in inputs)), lam[:, pad:], implementation=implementation)
    for x in got.values():
        np.testing.assert_array_equal(x[:, :pad], 0)
    # shifted keys: ten times the digits lost of iid ones
    assert_same({name: x[:, pad:] for name, x in got.items()}, expected, 10 * SAME)


@pytest.mark.slow
def test_hidden_keys_do_not_matter() -> None:
    """Other values of a key leave the queries that do not see it the same bits, though others do see it."""
    inputs, lam = draw(SHAPE, "float32"), ridge().astype(jnp.float32)
    sees = jnp.arange(140) % 3 == 0  # within every block
    mask = ~((jnp.arange(160) == 5)[None, :] & ~sees[:, None])[None, None]
    changed = inputs._replace(k=inputs.k.at[:, 5].mul(-50), v=inputs.v.at[:, 5].add(7))
    attend = jax.jit(partial(lla_attention, implementation="xla"))
    before, after = (attend(*x[:3], ridge_lambda=lam, mask=mask) for x in (inputs, changed))
    np.testing.assert_array_equal(before[:, ~sees], after[:, ~sees])
    assert not np.array_equal(before[:, sees], after[:, sees])


@both
def test_a_query_without_keys_is_zero(implementation: str) -> None:
    shape = Shape(1, 20, 20, 2, 2, 4, 4)
    mask = jnp.ones((1, 1, 20, 20), bool).at[..., 7, :].set(False)
    got = evaluate(draw(shape), ridge(shape), hidden={"mask": mask}, implementation=implementation, delta_eps=0.0)
    for name in ("o", "dq", "dlambda"):
        np.testing.assert_array_equal(got[name][:, 7], 0)
    assert all(bool(jnp.isfinite(x).all()) for x in got.values())
    attend = jax.jit(partial(lla_attention, implementation=implementation, return_residuals=True))
    _, residuals = attend(*draw(shape)[:3], mask=mask, ridge_lambda=1.0)
    np.testing.assert_array_equal(residuals.omega[:, 7], 0)
    np.testing.assert_array_equal(residuals.logsumexp[:, 7], -np.inf)


def test_a_causal_mask_is_causal() -> None:
    inputs, lam = draw(SHAPE), ridge()
    mask = jnp.arange(160)[None, :] <= jnp.arange(140)[:, None] + 20
    attend = jax.jit(partial(lla_attention, implementation="xla"), static_argnames="is_causal")
    got = attend(*inputs[:3], ridge_lambda=lam, mask=mask[None, None], is_causal=False)
    assert relative_error(got, attend(*inputs[:3], ridge_lambda=lam)) <= SAME


@pytest.mark.slow
def test_mask_and_lengths_are_both_kept() -> None:
    shape = Shape(2, 9, 12, 4, 2, 5, 3)
    inputs, lam, mask = draw(shape), ridge(shape), random_mask(1, 4, 9, 12)
    lengths = jnp.asarray([12, 7])
    combined = mask & (jnp.arange(12)[None, :] < lengths[:, None])[:, None, None]
    got = evaluate(inputs, lam, hidden={"mask": mask, "key_value_seq_lengths": lengths}, implementation="xla")
    assert_same(got, evaluate(inputs, lam, hidden={"mask": combined}, implementation="reference"))


def test_rank_three_is_one_head() -> None:
    shape = Shape(2, 9, 12, 1, 1, 5, 3)
    inputs, lam, mask = draw(shape), ridge(shape), random_mask(2, 9, 12)
    attend = jax.jit(partial(lla_attention, implementation="xla"))
    flat = attend(*(x[:, :, 0] for x in inputs[:3]), ridge_lambda=lam[..., 0], mask=mask)
    full = attend(*inputs[:3], ridge_lambda=lam, mask=mask[:, None])
    np.testing.assert_array_equal(flat, full[:, :, 0])


@pytest.mark.slow
def test_vmap_over_the_mask() -> None:
    shape = Shape(1, 9, 12, 2, 2, 5, 3)
    q, k, v, _ = draw(shape)
    masks = random_mask(3, 1, 1, 9, 12)

    @jax.jit
    def call(mask: jax.Array) -> jax.Array:
        return lla_attention(q, k, v, mask=mask, ridge_lambda=1.0, implementation="xla")

    got = jax.jit(jax.vmap(call))(masks)
    for i in range(3):
        assert relative_error(got[i], call(masks[i])) <= SAME


WAYS = {
    "lengths": ({}, {"key_value_seq_lengths": ((1,), jnp.int32)}),
    "window": ({"local_window_size": (127, 0)}, {}),
    "packed": ({}, {"segment_ids": ((1, "T"), jnp.int32)}),
    "all": (
        {"local_window_size": 64},
        {"query_offset": ((), jnp.int32), "segment_ids": ((1, "T"), jnp.int64), "query_seq_lengths": ((1,), jnp.int32)},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_linear_memory(name: str) -> None:
    """As test_memory.py: read off the compiled program, forward and backward."""
    static, arrays = WAYS[name]

    def temporaries(length: int) -> int:
        def total(q: jax.Array, k: jax.Array, v: jax.Array, hidden: dict[str, jax.Array]) -> jax.Array:
            return jnp.sum(lla_attention(q, k, v, **static, **hidden, implementation="xla"))

        x = jax.ShapeDtypeStruct((1, length, DIM), jnp.float32)
        hidden = {
            name: jax.ShapeDtypeStruct([length if n == "T" else n for n in shape], dtype)
            for name, (shape, dtype) in arrays.items()
        }
        analysis = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x, hidden).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    short = temporaries(SHORT)
    assert short >= SHORT * DIM * 4
    assert temporaries(LONG) <= 9 * short


def test_hidden_blocks_are_not_visited() -> None:
    """Below the operator, where nothing is cleaned: NaN in the key blocks that a block of queries sees nothing of."""
    shape = Shape(1, 512, 512, 1, 1, 4, 4)
    inputs, lam = draw(shape, "float32"), jnp.ones(shape.ridge, jnp.float32)
    options = check_options(inputs.q, None, 1e-12, None, None, None, False, None)
    hiding = check_hiding(inputs.q, inputs.k, is_causal=True, local_window_size=(128, 0))
    seen = visibility(hiding, 512, 512)

    @jax.jit
    def passes(k: jax.Array, v: jax.Array) -> Any:
        o, saved, _ = blockwise.forward(inputs.q, k, v, lam, seen, options)
        return o, blockwise.backward(inputs.q, k, v, lam, seen, saved, inputs.g, options)

    o, (dq, *_) = passes(inputs.k, inputs.v)
    poisoned = (x.at[:, :128].set(jnp.nan).at[:, 384:].set(jnp.nan) for x in (inputs.k, inputs.v))
    o_, (dq_, *_) = passes(*poisoned)
    rows = slice(256, 384)  # of the third block, which sees the second and its own
    np.testing.assert_array_equal(o[:, rows], o_[:, rows])
    np.testing.assert_array_equal(dq[:, rows], dq_[:, rows])
    assert bool(jnp.isnan(o_[:, :128]).all())  # the poison can be seen


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_packed_documents_are_as_if_alone(implementation: str, is_causal: bool) -> None:
    shape = Shape(1, 150, 150, 2, 1, 6, 4, is_causal=is_causal)
    inputs, lam = draw(shape, kind="shifted"), ridge(shape)
    cuts = (0, 1, 40, 140, 150)
    ids = jnp.repeat(jnp.asarray([7, -3, 7000, 0]), jnp.asarray(np.diff(cuts)), total_repeat_length=150)[None]
    got = evaluate(inputs, lam, hidden={"segment_ids": ids}, is_causal=is_causal, implementation=implementation)
    for start, end in ((1, 40), (40, 140)):
        part = Inputs(*(x[:, start:end] for x in inputs))
        alone = evaluate(part, lam[:, start:end], is_causal=is_causal, implementation=implementation)
        assert_same({name: x[:, start:end] for name, x in got.items()}, alone, 10 * SAME)


def test_parts_of_the_queries_number_segments_alike() -> None:
    """Also if some queries are in segments that have no key: devices exchange the numbers."""
    rng = np.random.default_rng(0)
    query_ids, key_ids = rng.integers(0, 9, (2, 16)), rng.integers(0, 5, (2, 20)) * 2
    q, k, _, _ = draw(Shape(2, 16, 20, 1, 1, 4, 4))
    hiding = check_hiding(q, k, is_causal=False, segment_ids=(query_ids, key_ids))
    whole = visibility(hiding, 16, 20)
    for number, rows in enumerate((slice(8), slice(8, 16))):
        part = hiding._replace(segment_ids=(jnp.asarray(query_ids[:, rows]), jnp.asarray(key_ids)))
        seen = visibility(part, 16, 20, Part(jnp.int32(number), 2))
        np.testing.assert_array_equal(seen.key_ids, whole.key_ids)
        np.testing.assert_array_equal(seen.query_ids, whole.query_ids[:, rows])
        assert int(seen.key_ids.max()) < 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "in_axes", [(0, 0, 0), (None, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)], ids=str
)
def test_vmap_over_what_hides(in_axes: tuple[int | None, ...]) -> None:
    """Arrays, segments and offsets, each mapped or shared."""
    q, k, v, _ = draw(Shape(3, 9, 9, 2, 2, 5, 3))
    rng = np.random.default_rng(4)
    given = (q[:, None], jnp.asarray(np.sort(rng.integers(0, 3, (3, 1, 9)))), jnp.asarray(rng.integers(-2, 3, 3)))
    args = [x if axis == 0 else x[0] for x, axis in zip(given, in_axes, strict=True)]

    @jax.jit
    def call(q: jax.Array, ids: jax.Array, offset: jax.Array) -> Any:
        def o(q: jax.Array) -> jax.Array:
            return lla_attention(q, k[:1], v[:1], segment_ids=ids, query_offset=offset, implementation="xla")

        return o(q), jax.grad(lambda q: jnp.sum(jnp.square(o(q))))(q)

    got = jax.jit(jax.vmap(call, in_axes))(*args)
    for i in range(3):
        expected = call(*(x if axis is None else x[i] for x, axis in zip(args, in_axes, strict=True)))
        for x, y in zip(got, expected, strict=True):
            assert relative_error(x[i], y) <= SAME


@pytest.mark.slow
def test_checkpoint_and_scan() -> None:
    """A stack of layers over one packed row, rematerialised."""
    case = HIDDEN["packed"]
    x = draw(Shape(2, 12, 12, 2, 2, 4, 4)).q
    ids = jnp.asarray([[0] * 5 + [1] * 7, [3] * 12])

    def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + lla_attention(x, x, x, segment_ids=ids, local_window_size=4, implementation="xla"), None

    def total(x: jax.Array, layer: Any) -> jax.Array:
        return jnp.sum(jnp.square(jax.lax.scan(layer, x, None, length=2)[0]))

    def looped(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(layer(layer(x, None)[0], None)[0]))

    assert case.shape.is_causal
    got = jax.jit(jax.grad(partial(total, layer=jax.checkpoint(layer))))(x)
    assert relative_error(got, jax.jit(jax.grad(looped))(x)) <= SAME


@pytest.mark.slow
def test_exported_for_any_batch() -> None:
    q, k, v, _ = draw(Shape(3, 9, 9, 2, 1, 4, 4), "float32")
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (3, 9))))
    lengths = jnp.asarray([9, 0, 4])

    @jax.jit
    def call(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        return lla_attention(q, k, v, segment_ids=ids, key_value_seq_lengths=lengths, implementation="xla")

    args = (q, k, v, ids, lengths)
    sizes = jax.export.symbolic_args_specs(args, ("b, 9, 2, 4", "b, 9, 1, 4", "b, 9, 1, 4", "b, 9", "b"))
    np.testing.assert_allclose(jax.export.export(call)(*sizes).call(*args), call(*args), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_either_side_of_the_operator_may_be_mapped() -> None:
    """``only=None`` off CUDA: what the kernels would keep is left empty, under vmap too."""
    pytest.importorskip("jax_triton", reason="jax-triton 0.3 imports with JAX's plugin only", exc_type=ImportError)
    q, k, v, g = draw(Shape(3, 9, 9, 2, 2, 4, 4), "float32")
    masks = jnp.asarray(np.random.default_rng(1).random((3, 1, 2, 9, 9)) < 0.5)

    def loss(only: Any, q: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.sum(operate(q[None], k[:1], v[:1], mask=mask, only=only) * g[:1])

    got, expected = (jax.jit(jax.vmap(jax.grad(partial(loss, only))))(q, masks) for only in (None, "xla"))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def shown_by_a_loop(shape: Shape, hidden: dict[str, Any]) -> np.ndarray:
    """The definition, one query and key at a time."""
    shown = np.zeros((shape.batch, shape.heads, shape.queries, shape.keys), bool)
    left, right = hidden.get("local_window_size") or (10**6, 10**6)
    offset = np.broadcast_to(hidden.get("query_offset", shape.keys - shape.queries), (shape.batch,))
    segments = hidden.get("segment_ids")
    mask = np.broadcast_to(hidden.get("mask", np.True_), shown.shape)
    for b, n, i, j in np.ndindex(*shown.shape):
        position = offset[b] + i
        shown[b, n, i, j] = (
            (not shape.is_causal or j <= position)
            and position - left <= j <= position + right
            and ("query_seq_lengths" not in hidden or i < hidden["query_seq_lengths"][b])
            and ("key_value_seq_lengths" not in hidden or j < hidden["key_value_seq_lengths"][b])
            and (segments is None or segments[0][b, i] == segments[1][b, j])
            and mask[b, n, i, j]
        )
    return shown


@st.composite
def problems(draw: Any) -> tuple[Shape, dict[str, Any]]:
    """Any of the arguments, together. Few shapes, so that few programs are compiled."""
    batch, queries, keys = draw(st.sampled_from([(1, 5, 8), (2, 8, 5), (2, 7, 7)]))
    shape = Shape(batch, queries, keys, 2, 1, 3, 2, is_causal=draw(st.booleans()))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    masks = ((batch, 1, 1, keys), (1, 2, queries, keys), (batch, 1, queries, 1), (batch, 2, 1, keys))
    choices: dict[str, Any] = {
        "local_window_size": lambda: tuple(map(int, rng.integers(0, 6, 2))),
        "query_seq_lengths": lambda: rng.integers(0, queries + 1, batch),
        "key_value_seq_lengths": lambda: rng.integers(0, keys + 1, batch),
        "segment_ids": lambda: (rng.integers(-1, 2, (batch, queries)), rng.integers(-1, 2, (batch, keys))),
        "mask": lambda: rng.random(masks[rng.integers(4)]) < 0.6,
    }
    hidden = {name: make() for name, make in choices.items() if draw(st.booleans())}
    offsets = rng.integers(-3, keys + 3, batch)
    hidden["query_offset"] = offsets if draw(st.booleans()) else int(offsets[0])
    return shape, hidden


def made(shape: Shape, hidden: dict[str, Any]) -> Visibility:
    q, k, _, _ = draw(shape)
    return visibility(check_hiding(q, k, is_causal=shape.is_causal, **hidden), shape.queries, shape.keys)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems())
def test_visibility_is_its_definition(problem: tuple[Shape, dict[str, Any]]) -> None:
    shape, hidden = problem
    expected, seen = shown_by_a_loop(shape, hidden), made(shape, hidden)
    np.testing.assert_array_equal(np.broadcast_to(dense(seen, shape.keys), expected.shape), expected)
    queries = np.moveaxis(np.asarray(seeing_queries(seen, shape.keys)), 2, 1)
    np.testing.assert_array_equal(np.broadcast_to(queries, expected.shape[:3]), expected.any(axis=3))
    keys = np.moveaxis(np.asarray(seen_keys(seen, shape.keys, 1)), 2, 1)[:, 0]
    np.testing.assert_array_equal(np.broadcast_to(keys, (shape.batch, shape.keys)), expected.any(axis=(1, 2)))
    some = expected.any(axis=1)
    tightest = (
        np.where(some.any(-1), some.argmax(-1), 0),
        np.where(some.any(-1), shape.keys - some[..., ::-1].argmax(-1), 0),
    )
    for got, bound in zip((seen.start, seen.end), tightest, strict=True):
        np.testing.assert_array_equal(np.broadcast_to(got, bound.shape), bound)
    assert not seen.complete or (expected.any(axis=3).all() and expected.any(axis=(1, 2)).all())
    assert not seen.from_first or not np.any(seen.start)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True)
@given(problems())
def test_blockwise_is_the_reference_for_any_combination(problem: tuple[Shape, dict[str, Any]]) -> None:
    """Windows and offsets as arrays where they can be, so that programs are shared."""
    shape, hidden = problem
    inputs, lam = draw(shape), ridge(shape)
    window = hidden.pop("local_window_size", None)
    hidden["query_offset"] = np.broadcast_to(hidden["query_offset"], (shape.batch,))
    kwargs = {"hidden": hidden, "is_causal": shape.is_causal, "local_window_size": window and (2, 3)}
    expected = evaluate(inputs, lam, implementation="reference", **kwargs)
    got = evaluate(inputs, lam, implementation="xla", **kwargs)
    floor = float(jnp.linalg.norm(expected["dv"])) or 1.0  # a query of one key leaves no gradient but dv
    for name, x in expected.items():
        assert relative_error(got[name], x, floor) <= SAME, name

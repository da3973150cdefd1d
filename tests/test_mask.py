"""``mask`` and ``key_value_seq_lengths``: what is hidden is as if it were not there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashlla_jax import lla_attention
from flashlla_jax.interface import Options
from flashlla_jax.reference import attention_backward
from tests.cases import GRADIENTS, Inputs, Shape, draw, relative_error
from tests.test_memory import DIM, LONG, SHORT

SHAPE = Shape(2, 140, 160, 4, 2, 6, 8)  # two blocks of queries and of keys, ragged

# Both paths in float64, apart by where conjugate gradients stop: as SAME in test_transforms.py.
SAME = 1e-10

both = pytest.mark.parametrize("implementation", ["xla", "reference"])


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """The shapes are small, so that nearly all time goes into compilation: LLVM's part of it is left out."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@cache
def outputs_and_gradients(**options: Any) -> Any:
    @jax.jit
    def run(inputs: Inputs, ridge: jax.Array, masks: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def call(q: jax.Array, k: jax.Array, v: jax.Array, lam: jax.Array) -> jax.Array:
            return lla_attention(q, k, v, ridge_lambda=lam, **masks, **options)

        o, vjp = jax.vjp(call, inputs.q, inputs.k, inputs.v, ridge)
        return dict(zip(("o", *GRADIENTS), (o, *vjp(inputs.g)), strict=True))

    return run


def evaluate(inputs: Inputs, ridge: jax.Array, masks: dict[str, jax.Array], **options: Any) -> dict[str, jax.Array]:
    """The output and all gradients; ``masks`` are the arguments that hide keys."""
    return outputs_and_gradients(**options)(inputs, ridge, masks)


def ridge(shape: Shape = SHAPE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).uniform(0.5, 2.0, shape.ridge))


def random_mask(*shape: int) -> jax.Array:
    """A third visible; with causality many queries see few keys, and some none."""
    return jnp.asarray(np.random.default_rng(2).random(shape) < 0.3)


def assert_same(got: dict[str, jax.Array], expected: dict[str, jax.Array], bound: float = SAME) -> None:
    for name, x in expected.items():
        assert relative_error(got[name], x) <= bound, name


@pytest.mark.parametrize(
    ("shape", "is_causal"),
    [((2, 4, 140, 160), True), ((2, 1, 1, 160), False), ((1, 4, 140, 1), True)],
    ids=str,
)
def test_blockwise_is_the_reference(shape: tuple[int, ...], is_causal: bool) -> None:
    inputs, lam = draw(SHAPE), ridge()
    mask = random_mask(*shape)
    whole = jnp.broadcast_to(mask, (2, 4, 140, 160))
    expected = evaluate(inputs, lam, {"mask": whole}, implementation="reference", is_causal=is_causal)
    assert_same(evaluate(inputs, lam, {"mask": mask}, implementation="xla", is_causal=is_causal), expected)


def test_the_reference_backward_is_its_gradient() -> None:
    """The gradient written out takes the mask, empty rows included, as autodiff does."""
    shape = Shape(2, 9, 12, 4, 2, 5, 3)
    inputs, lam, mask = draw(shape), ridge(shape), random_mask(2, 4, 9, 12)
    assert not bool(mask[..., :4].any(axis=-1).all())  # causal, so that the first query has only four keys to see
    options = Options(True, 5**-0.5, 1e-12, None, None, 32, False, jax.lax.Precision.DEFAULT)
    got = jax.jit(partial(attention_backward, options=options))(*inputs[:3], lam, inputs.g, mask=mask)
    expected = evaluate(inputs, lam, {"mask": mask}, implementation="reference")
    assert_same(dict(zip(GRADIENTS, got, strict=True)), {name: expected[name] for name in GRADIENTS})


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
    got = evaluate(Inputs(*padded), lam, masks, is_causal=False, implementation=implementation)
    for b, n in enumerate(lengths):
        for name in ("dk", "dv"):
            np.testing.assert_array_equal(got[name][b, n:], 0)
            assert bool(jnp.all(jnp.isfinite(got[name][b, :n]) & (got[name][b, :n] != 0)))
    n = lengths[1]
    one = Inputs(inputs.q[1:], inputs.k[1:, :n], inputs.v[1:, :n], inputs.g[1:])
    expected = evaluate(one, lam[1:], {}, is_causal=False, implementation=implementation)
    assert_same({name: x[1:, :n] if name in ("dk", "dv") else x[1:] for name, x in got.items()}, expected)


@both
def test_left_padding_is_a_slice(implementation: str) -> None:
    """Causal, the first keys hidden: their queries see nothing, the others what they would see alone."""
    shape, pad = Shape(1, 140, 140, 2, 1, 8, 8), 30
    inputs, lam = draw(shape, kind="shifted"), ridge(shape)
    mask = (jnp.arange(140) >= pad)[None, None, None]
    poisoned = inputs._replace(k=inputs.k.at[:, :pad].set(jnp.nan), v=inputs.v.at[:, :pad].set(jnp.nan))
    got = evaluate(poisoned, lam, {"mask": mask}, implementation=implementation)
    expected = evaluate(Inputs(*(x[:, pad:] for x in inputs)), lam[:, pad:], {}, implementation=implementation)
    for x in got.values():
        np.testing.assert_array_equal(x[:, :pad], 0)
    # shifted keys: ten times the digits lost of iid ones
    assert_same({name: x[:, pad:] for name, x in got.items()}, expected, 10 * SAME)


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
    got = evaluate(draw(shape), ridge(shape), {"mask": mask}, implementation=implementation, delta_eps=0.0)
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


def test_mask_and_lengths_are_both_kept() -> None:
    shape = Shape(2, 9, 12, 4, 2, 5, 3)
    inputs, lam, mask = draw(shape), ridge(shape), random_mask(1, 4, 9, 12)
    lengths = jnp.asarray([12, 7])
    combined = mask & (jnp.arange(12)[None, :] < lengths[:, None])[:, None, None]
    got = evaluate(inputs, lam, {"mask": mask, "key_value_seq_lengths": lengths}, implementation="xla")
    assert_same(got, evaluate(inputs, lam, {"mask": combined}, implementation="reference"))


def test_rank_three_is_one_head() -> None:
    shape = Shape(2, 9, 12, 1, 1, 5, 3)
    inputs, lam, mask = draw(shape), ridge(shape), random_mask(2, 9, 12)
    attend = jax.jit(partial(lla_attention, implementation="xla"))
    flat = attend(*(x[:, :, 0] for x in inputs[:3]), ridge_lambda=lam[..., 0], mask=mask)
    full = attend(*inputs[:3], ridge_lambda=lam, mask=mask[:, None])
    np.testing.assert_array_equal(flat, full[:, :, 0])


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


def test_none_takes_a_mask_and_triton_refuses() -> None:
    q = jnp.ones((1, 6, 4))
    mask = jnp.ones((1, 6, 6), bool)
    assert jax.eval_shape(lambda q: lla_attention(q, q, q, mask=mask), q).shape == q.shape
    for kwargs in ({"mask": mask}, {"key_value_seq_lengths": jnp.asarray([3])}):
        with pytest.raises(NotImplementedError, match=r'"triton" cannot serve this call: it takes no mask.*"xla"'):
            lla_attention(q, q, q, implementation="triton", **kwargs)


def test_lengths_take_linear_memory() -> None:
    """As test_memory.py: read off the compiled program, forward and backward."""

    def temporaries(length: int) -> int:
        def total(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
            return jnp.sum(lla_attention(q, k, v, key_value_seq_lengths=lengths, implementation="xla"))

        x = jax.ShapeDtypeStruct((1, length, DIM), jnp.float32)
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        analysis = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x, lengths).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    short = temporaries(SHORT)
    assert short >= SHORT * DIM * 4
    assert temporaries(LONG) <= 9 * short

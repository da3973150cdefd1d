"""Packed rows, windows and lengths in ``LLAttention``, NNX and Linen."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flashlla_jax import LLAttention
from flashlla_jax.nn.linen import LLAttention as LinenLLAttention
from tests.cases import relative_error
from tests.nn.test_modules import (
    FEATURES,
    SAME,
    call,
    inputs,
    linen_parameters,
    module,
)

# Rows of 17 tokens, packed with documents of these lengths; the ids are in no order.
DOCUMENTS = ((5, 7, 5), (7, 5, 5))
IDS = (4, -1, 2)


def functional(api: str, **kwargs: Any) -> tuple[Callable[..., jax.Array], dict[str, Any]]:
    """The module as a function of its parameters and arguments, and the parameters, the same for both."""
    layer = module(**kwargs)
    parameters = linen_parameters(layer)
    if api == "linen":
        twin = LinenLLAttention(4, **kwargs)
        return lambda p, *args, **options: twin.apply({"params": p}, *args, **options), parameters
    graph, state = nnx.split(layer)

    def apply(p: Any, *args: Any, **options: Any) -> jax.Array:
        nnx.replace_by_pure_dict(state, p)
        return nnx.merge(graph, state)(*args, **options)

    return apply, parameters


def packed(apply: Callable[..., jax.Array], parameters: Any, x: jax.Array) -> jax.Array:
    ids = np.stack([np.repeat(IDS, lengths) for lengths in DOCUMENTS])
    positions = np.stack([np.concatenate([np.arange(n) for n in lengths]) for lengths in DOCUMENTS])
    return apply(parameters, x, segment_ids=ids, input_positions=positions)


def alone(apply: Callable[..., jax.Array], parameters: Any, x: jax.Array) -> jax.Array:
    """Each document by itself (those of one length in a batch), put where the packed row has it."""
    cuts = [np.cumsum((0, *lengths)) for lengths in DOCUMENTS]
    places = [(row, a, b) for row, cut in enumerate(cuts) for a, b in itertools.pairwise(cut)]
    out = jnp.full_like(x, jnp.nan)
    for length in {b - a for _, a, b in places}:
        of_length = [place for place in places if place[2] - place[1] == length]
        outputs = apply(parameters, jnp.stack([x[row, a:b] for row, a, b in of_length]))
        for (row, a, b), o in zip(of_length, outputs, strict=True):
            out = out.at[row, a:b].set(o)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("api", "window"), [("nnx", None), ("linen", (3, 0))], ids=str)
def test_a_packed_row_is_its_documents_alone(api: str, window: Any) -> None:
    """Output, and gradients of parameters and inputs."""
    apply, parameters = functional(
        api, rope=100.0, learn_ridge=True, ridge_lambda=1.0, num_kv_heads=2, local_window_size=window
    )
    x = inputs(2, 17, FEATURES)

    def run(attend: Callable[..., jax.Array], parameters: Any, x: jax.Array) -> Any:
        o = attend(apply, parameters, x)
        return jnp.sum(jnp.sin(o)), o

    got, expected = (
        jax.jit(jax.value_and_grad(partial(run, attend), argnums=(0, 1), has_aux=True))(parameters, x)
        for attend in (packed, alone)
    )
    assert relative_error(got[0][1], expected[0][1]) <= SAME
    # float32: sums over 34 tokens in another order. A key's bias moves all keys of a document alike, which changes
    # rope's share of the logits only: small beside the others, on whose scale it is judged.
    errors = jax.tree.map(partial(relative_error, floor=1.0), got[1], expected[1])
    assert max(jax.tree.leaves(errors)) <= SAME, errors


@pytest.mark.slow
@pytest.mark.parametrize(("api", "batch"), [("nnx", (2, 3)), ("linen", ())], ids=str)
def test_all_that_hides_is_the_mask_that_says_the_same(api: str, batch: tuple[int, ...]) -> None:
    """Window, a pair of segments, both lengths and a mask of zeros and ones, over any batch axes and two lengths."""
    rng = np.random.default_rng(0)
    given = {
        "segment_ids": (rng.integers(4, size=(*batch, 5)) // 3, jnp.asarray(rng.integers(4, size=(*batch, 7)) // 3)),
        "query_seq_lengths": rng.integers(2, 6, size=batch) if batch else np.asarray(4),
        "key_value_seq_lengths": jnp.asarray(rng.integers(5, 8, size=batch)),
        "mask": (jnp.arange(7) != 3).astype(jnp.float32),
    }
    queries, keys = np.arange(5)[:, None], np.arange(7)[None, :]
    own = queries + 2  # the last query is at the last key
    mask = (keys >= own - 3) & (keys <= own + 1) & (keys != 3)
    mask = mask & (np.asarray(given["segment_ids"][0])[..., None] == np.asarray(given["segment_ids"][1])[..., None, :])
    mask = mask & (queries < np.asarray(given["query_seq_lengths"])[..., None, None])
    mask = mask & (keys < np.asarray(given["key_value_seq_lengths"])[..., None, None])
    x, kv = inputs(*batch, 5, FEATURES), inputs(*batch, 7, FEATURES, seed=1)

    apply, parameters = functional(api, is_causal=False, local_window_size=(3, 1))
    got = jax.jit(apply)(parameters, x, kv, **given)
    expected = call(module(is_causal=False), x, kv, mask=mask[..., None, :, :])
    assert 0.2 < mask.mean() < 0.5  # enough is hidden, and enough seen
    assert relative_error(got, expected) <= SAME


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"segment_ids": [0] * 9}, ValueError, r"segment_ids must be one array or a pair \(query, key\), got 9 of them"),
    ({"segment_ids": 1}, TypeError, "segment_ids must be an integer array or a pair of them, got int"),
    ({"segment_ids": np.zeros((2, 9))}, TypeError, "segment_ids must be integers, got dtype float64"),
    (
        {"segment_ids": np.zeros(9, int)},
        ValueError,
        r"segment_ids must have the shape \[batch..., length\] = \(2, 9\), got \(9,\)",
    ),
    (
        {"segment_ids": (np.zeros((2, 9), int), np.zeros((2, 8), int))},
        ValueError,
        r"segment_ids must have the shape \[batch..., length\] = \(2, 9\), got \(2, 8\)",
    ),
    (
        {"inputs_k": np.ones((2, 12, FEATURES), np.float32), "segment_ids": np.zeros((2, 12), int)},
        ValueError,
        "one segment_ids for queries and keys needs as many of one as of the other.*pass a pair",
    ),
    ({"query_seq_lengths": 4}, TypeError, "query_seq_lengths must be an integer array, got int"),
    (
        {"query_seq_lengths": np.asarray([1, 2, 3])},
        ValueError,
        r"query_seq_lengths must have the shape \[batch...\] = \(2,\), got \(3,\)",
    ),
    ({"key_value_seq_lengths": np.asarray([1, 10])}, ValueError, "must lie between 0 and the length 9, got 1 to 10"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_wrong_segments_and_lengths_are_refused(kwargs: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        module()(inputs(), **kwargs)


@pytest.mark.parametrize("name", ["segment_ids", "query_seq_lengths", "key_value_seq_lengths"])
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_cache_takes_no_segments_or_lengths(api: str, name: str) -> None:
    x = inputs(2, 1, FEATURES)
    given = {name: np.ones((2, 1) if name == "segment_ids" else 2, int)}
    message = f"decode=True takes no {name}.*by mask"
    if api == "nnx":
        layer = module()
        layer.init_cache((2, 5, FEATURES))
        with pytest.raises(NotImplementedError, match=message):
            layer(x, decode=True, **given)
        assert int(layer.cache_index[...]) == 0  # pyright: ignore[reportOptionalSubscript]
    else:
        with pytest.raises(NotImplementedError, match=message):
            LinenLLAttention(4, decode=True).init(jax.random.key(0), x, **given)


def test_a_window_given_to_the_constructor_is_kept_as_a_pair() -> None:
    """However it is written, modules of one window are one static structure, which is traced once."""
    windows = (2, (2, 2), [np.int64(2), 2])
    graphs = {nnx.split(LLAttention(4, FEATURES, local_window_size=w, rngs=nnx.Rngs(0)))[0] for w in windows}
    assert len(graphs) == 1

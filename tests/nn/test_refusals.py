"""What ``LLAttention`` refuses, in NNX and Linen: the error names the argument, what came and what is allowed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flashlla_jax import default_implementation
from flashlla_jax.nn.linen import LLAttention as LinenLLAttention
from tests.nn.test_modules import FEATURES, inputs, module

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dropout_rate": 0.1}, NotImplementedError, r"dropout_rate must be 0, got 0.1.*Dropout"),
    ({"attention_fn": nn.dot_product_attention}, NotImplementedError, "attention_fn must be None"),
    ({"ridge_lambda": 0.0}, ValueError, r"ridge_lambda must be > 0, got 0.0"),
    ({"ridge_lambda": "1"}, TypeError, "ridge_lambda must be a Python number, got str"),
    ({"ridge_lambda": 0.01, "learn_ridge": True}, ValueError, r"ridge_lambda must be > 0.01, got 0.01"),
    ({"ridge_floor": 0.0, "learn_ridge": True}, ValueError, "ridge_floor must be finite and > 0, got 0.0"),
    ({"implementation": "cuda"}, ValueError, r"implementation must be one of 'triton', .* or None, got 'cuda'"),
    ({"cg_max_iters": 0}, ValueError, "cg_max_iters must be >= 1, got 0"),
    ({"cg_max_iters": 1.5}, TypeError, "cg_max_iters must be an int or None, got 1.5"),
    ({"is_causal": "no"}, TypeError, "is_causal must be True or False, got 'no'"),
    ({"learn_ridge": 1}, TypeError, "learn_ridge must be True or False, got 1"),
    ({"rope": -1.0}, ValueError, "rope must be None or the base"),
    ({"rope": 100.0, "qkv_features": 12}, ValueError, "even head dimension, got 3"),
    ({"local_window_size": -1}, ValueError, "local_window_size must be >= 0, got -1"),
    (
        {"local_window_size": (1, 2, 3)},
        TypeError,
        r"local_window_size must be an int or a pair \(left, right\) of ints",
    ),
    ({"num_kv_heads": 3}, ValueError, "num_kv_heads|divisible"),
    ({"qkv_features": 18}, ValueError, "qkv_features|divisible"),
]

CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"sow_weights": True}, NotImplementedError, "sow_weights must be False"),
    ({"mask": [True]}, TypeError, "mask must be an array, got list"),
    ({"mask": np.where(np.tri(9, dtype=bool), 0.0, -1e9)}, ValueError, "got negative numbers.*pass mask == 0"),
    ({"mask": np.ones((9, 9), complex)}, TypeError, "mask must be boolean, or numbers.*got dtype complex128"),
    (
        {"mask": np.ones((2, 3, 9, 9))},
        ValueError,
        r"mask must broadcast to .* = \(2, 4, 9, 9\), got shape \(2, 3, 9, 9\)",
    ),
    ({"inputs_v": np.ones((2, 9, FEATURES))}, ValueError, "inputs_v needs inputs_k"),
    (
        {"inputs_k": np.ones(FEATURES)},
        ValueError,
        r"inputs_k must be \[batch..., length, features\], got shape \(16,\)",
    ),
]

# What came, and what the error says of it; integers and real floating numbers are allowed.
POSITIONS: list[tuple[Any, str]] = [
    (list(range(9)), "got list"),
    (0, "got int"),
    (np.ones(9, complex), "got dtype complex128"),
    (np.ones(9, bool), "got dtype bool"),
    (np.asarray(list("positions")), "got dtype <U1"),
]


@pytest.mark.parametrize("api", ["nnx", "linen"])
class TestRefusals:
    def build(self, api: str, **kwargs: Any) -> Any:
        if api == "nnx":
            return module(**kwargs)
        return LinenLLAttention(**({"num_heads": 4} | kwargs)).bind(
            {}, rngs={"params": jax.random.key(0)}, mutable=True
        )

    @pytest.mark.parametrize(("kwargs", "error", "message"), REFUSED, ids=[case[2] for case in REFUSED])
    def test_of_the_constructor(self, api: str, kwargs: Any, error: Any, message: str) -> None:
        if api == "nnx":
            with pytest.raises(error, match=message):
                self.build(api, **kwargs)
        else:  # which is a dataclass until it is called
            layer = self.build(api, **kwargs)
            with pytest.raises(error, match=message):
                layer(inputs())

    @pytest.mark.parametrize(("kwargs", "error", "message"), CALLS, ids=str)
    def test_of_the_call(self, api: str, kwargs: Any, error: Any, message: str) -> None:
        layer = self.build(api)
        with pytest.raises(error, match=message):
            layer(inputs(), **kwargs)

    @pytest.mark.skipif(default_implementation() == "triton", reason="Triton runs here")
    def test_triton_needs_a_gpu(self, api: str) -> None:
        """It takes Flax's masks, and refuses for what is missing."""
        layer = self.build(api, implementation="triton")
        why = "it needs an NVIDIA GPU|jax-triton cannot be imported"
        with pytest.raises(NotImplementedError, match=f'"triton" cannot serve this call: ({why})'):
            layer(inputs(), mask=np.ones((9, 9), np.float32))

    @pytest.mark.parametrize("decode", [False, True], ids=["forward", "decode"])
    @pytest.mark.parametrize("rope", [None, 100.0])
    def test_of_positions(self, api: str, rope: float | None, decode: bool) -> None:
        layer = self.build(api, rope=rope, decode=decode)
        if api == "nnx":
            layer.init_cache((2, 9, FEATURES))
        elif decode:
            layer(inputs())  # which makes the cache
        for positions, got in POSITIONS:
            with pytest.raises(TypeError, match=f"input_positions must be .*integers or real floating numbers, {got}"):
                layer(inputs(), input_positions=positions)
        for positions in (np.ones(()), np.ones((3, 1, 9)), np.ones((2, 1))):
            with pytest.raises(ValueError, match="input_positions"):
                layer(inputs(), input_positions=positions)


def test_dropout_that_is_switched_on_later_is_refused() -> None:
    layer = module()
    layer.set_attributes(dropout_rate=0.5, deterministic=False)
    with pytest.raises(NotImplementedError, match=r"dropout_rate must be 0, got 0.5"):
        layer(inputs())


def test_refusals_of_one_module() -> None:
    with pytest.raises(ValueError, match=r"inputs_q must be \[batch..., length, features\], got shape \(16,\)"):
        module()(inputs(FEATURES))
    with pytest.raises(ValueError, match=r"inputs_q must have 16 features, got shape \(2, 9, 5\)"):
        module()(inputs(2, 9, 5))
    with pytest.raises(ValueError, match="inputs_k must have 6 features"):
        module(in_kv_features=6)(inputs())
    with pytest.raises(NotImplementedError, match="qk_attn_weights_einsum"):
        LinenLLAttention(4, qk_attn_weights_einsum_cls=lambda: jnp.einsum).init(jax.random.key(0), inputs())
    with pytest.raises(ValueError, match="inputs_kv is inputs_k under its old name"):
        LinenLLAttention(4).init(jax.random.key(0), inputs(), inputs(), inputs_kv=inputs())

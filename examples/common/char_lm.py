"""The byte-level language model of ``train_char_lm.py``: sizes, parameters, optimizer, and sampling from it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flashlla_jax import Residuals

from .meshes import Placement
from .stdlib_text import END, VOCABULARY, Text, windows
from .transformer import LLA, Array, Transformer, decayed, watched

try:
    import optax
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; the examples need: pip install "flashlla-jax[examples]"')


# LLA solves with the keys' covariance plus the ridge, and every step of the solver costs about as much as softmax
# attention's forward pass. Keys grow in training and the covariance's largest eigenvalue with their square; QK norm
# keeps their length at sqrt(head dim), and softmax attention has it too. Default run on a CPU: the solver's steps
# (bfloat16, the slowest query of 64) and the validation loss were 10 and 1.708 with ridge 1 and no QK norm, and are 4
# and 1.706; softmax attention went from 1.743 to 1.727. With heads of 64 and 150 steps of training: ridge 1 without QK
# norm 11 and 2.212, with it 10 and 2.210; ridge 10 without it 5 and 2.233, with it 4 and 2.213.
RIDGE = 10.0

# What an evaluation says of LLA's solves in the forward pass, by its name in the history, and what a plot calls it.
SOLVES = {
    "iterations": "solver's steps, mean",
    "relative_error": "relative error, largest",
    "unconverged": "share not converged",
}


@dataclass(frozen=True)
class Config:
    """What a result depends on. A checkpoint keeps it, and is continued with the same one only."""

    attention: str
    implementation: str | None
    features: int
    layers: int
    heads: int
    context: int
    batch: int
    steps: int
    warmup: int
    learning_rate: float
    weight_decay: float
    dtype: str
    eval_every: int
    eval_windows: int
    seed: int
    text: str  # its hash


class Embed(nnx.Embed):
    """A lookup by a matrix product: so is its gradient.

    XLA scatters the gradient of a lookup row by row. For 65536 bytes, of which there are 256, that took 44 ms on an
    H100, more than the rest of a softmax model's training step.
    """

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        del out_sharding  # the mesh's axes are automatic
        one_hot = jax.nn.one_hot(inputs, self.num_embeddings, dtype=self.dtype)
        return jnp.matmul(one_hot, self.embedding[...].astype(self.dtype), precision="highest")


class CharLM(nnx.Module):
    """Bytes ``(B, T)`` to the logits of the next byte, ``(B, T, 256)`` in float32."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.embed = Embed(VOCABULARY, config.features, dtype=dtype, rngs=rngs)
        self.transformer = Transformer(
            config.attention,
            config.features,
            config.layers,
            config.heads,
            normalize_qk=True,
            ridge_lambda=RIDGE,
            fused=True,
            dtype=dtype,
            implementation=config.implementation,
            rngs=rngs,
        )
        self.head = nnx.Linear(config.features, VOCABULARY, use_bias=False, rngs=rngs)  # logits in float32

    def __call__(self, tokens: Array, decode: bool = False, starts: Array | None = None) -> Array:
        return self.head(self.transformer(self.embed(tokens), decode=decode, starts=starts))


def abstract_model(config: Config) -> tuple[Any, Any]:
    """The model's structure and the shapes of its parameters; computes nothing."""
    graph, params = nnx.split(nnx.eval_shape(lambda: CharLM(config, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup, config.steps, end_value=config.learning_rate / 10
    )
    adamw = optax.adamw(rate, b2=0.95, weight_decay=config.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def solver_steps(config: Config, params: Any, text: Text, placement: Placement) -> list[float] | None:
    """By layer, the mean of the conjugate-gradient steps of LLA's solves on some of the validation text."""
    if config.attention != LLA:
        return None
    graph, _ = abstract_model(config)
    pieces = jnp.asarray(windows(text.validation, min(8, config.eval_windows), config.context), jnp.int32)

    @partial(jax.jit, out_shardings=placement.whole)
    def run(params: Any) -> Array:
        _, solves = watched(nnx.merge(graph, params), pieces)
        assert solves is not None
        return solves.iterations.reshape(len(solves.iterations), -1).mean(-1)

    return [round(float(x), 2) for x in np.asarray(run(params))]


def summary(solves: Residuals) -> dict[str, Array]:
    """The figures of SOLVES, over all layers and queries."""
    return {
        "iterations": solves.iterations.mean(),
        "relative_error": solves.relative_error.max(),
        "unconverged": (~solves.converged).mean(),
    }


# ---- sampling


# what float32 takes for 0, and divides by no more
GREEDY = float(np.finfo(np.float32).tiny)


def generate(
    config: Config,
    params: Any,
    prompts: Sequence[bytes],
    length: int,
    temperature: float = 0.0,
    seed: int = 0,
    top_k: int | None = None,
) -> tuple[list[bytes], float]:
    """Samples ``length`` bytes after each prompt, all at once through the decode cache; the prompts in one call.

    A temperature below ``GREEDY`` takes the likeliest byte; ``top_k`` leaves the likeliest that many to be drawn from.
    Beyond the length that the model was trained with, quality falls.

    Returns:
        What follows each prompt, and the bytes sampled a second over all of them, NaN where all calls compiled.
    """
    tokens, starts = _padded(prompts)
    model = nnx.eval_shape(lambda: CharLM(config, rngs=nnx.Rngs(0)))
    model.transformer.init_cache(len(prompts), tokens.shape[1] + length)
    graph, _, cache = nnx.split(model, nnx.Param, nnx.Cache)

    @jax.jit
    def feed(params: Any, cache: Any, tokens: Array, key: Array) -> tuple[Array, Any]:
        model = nnx.merge(graph, params, cache)
        logits = model(tokens, decode=True, starts=jnp.asarray(starts))[:, -1]
        return sample(logits, temperature, top_k, key)[:, None], nnx.state(model, nnx.Cache)

    key, sampled, token = jax.random.key(seed), [], jnp.asarray(tokens)
    begin = math.nan
    for i in tqdm(range(length), desc="sampling", unit="byte", leave=False):
        token, cache = feed(params, cache, token, jax.random.fold_in(key, i))
        sampled.append(np.asarray(token[:, 0]))
        if i == 1:  # the prompts' call and the first of one byte compile
            begin = time.perf_counter()
    rate = len(prompts) * (length - 2) / (time.perf_counter() - begin) if length > 2 else math.nan
    return [bytes(row) for row in np.stack(sampled, axis=1).astype(np.uint8)], rate


def _padded(prompts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The prompts after the byte that ends a file, in one array that is padded on the left, and where each begins."""
    longest = max(map(len, prompts))
    rows = [bytes([END]) * (longest - len(prompt) + 1) + prompt for prompt in prompts]
    starts = np.array([longest - len(prompt) for prompt in prompts], np.int32)
    return np.stack([np.frombuffer(row, np.uint8).astype(np.int32) for row in rows]), starts


def sample(logits: Array, temperature: float, top_k: int | None, key: Array) -> Array:
    """``(B, 256)`` -> ``(B,)``."""
    if temperature < GREEDY:
        return logits.argmax(-1)
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, VOCABULARY))[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    # the greatest at 0, so that a low temperature gives no infinity but for what is never drawn
    return jax.random.categorical(key, (logits - logits.max(-1, keepdims=True)) / temperature)

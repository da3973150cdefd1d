"""Kinds of keys beside those of the tests, for ``benchmarks/accuracy.py --kinds more``."""

from __future__ import annotations

import numpy as np

from tests.cases import ALL_KINDS, Kind, sink


def _long_ones(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    k = k.copy()
    k[:, ::37] *= 6
    return q, k


def _low_rank_of_t(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    directions = rng.normal(size=(8, k.shape[-1])) / 8**0.5
    return q, rng.standard_t(3, size=(*k.shape[:-1], 8)) @ directions + 0.1 * k


def _outlier(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    scale = np.ones(k.shape[-1])
    scale[3] = 20
    return q * scale**0.25, k * scale


def _clusters(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return q, 3 * rng.normal(size=(16, k.shape[-1]))[rng.integers(0, 16, k.shape[:-1])] + 0.1 * k


def _power_law(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    scale = 8 / np.arange(1, k.shape[-1] + 1)
    return q * scale, k * scale


def _walk(q: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    walk = k.copy()
    for i in range(1, k.shape[1]):
        walk[:, i] = 0.98 * walk[:, i - 1] + 0.2 * k[:, i]
    return q, walk


MORE: dict[str, Kind] = {
    "length exp N(0, 1)": ALL_KINDS["varied"],
    "features exp N(0, 1)": lambda q, k, rng: (q, k * np.exp(rng.normal(size=k.shape))),
    "Student t, q and k": lambda q, k, rng: (rng.standard_t(3, size=q.shape), rng.standard_t(3, size=k.shape)),
    "every 37th 6 times": _long_ones,
    "peaky with offset 4": lambda q, k, rng: (4 * q + 4, 2 * k + 4),
    "peaky, q 1.5 times": lambda q, k, rng: (6 * q, 2 * k),
    "Laplace": lambda q, k, rng: (q, rng.laplace(size=k.shape)),
    "rank 8 of Student t": _low_rank_of_t,
    "one feature in ten": lambda q, k, rng: (q, k * (rng.uniform(size=k.shape) < 0.1) * 10**0.5),
    "an outlier feature": _outlier,
    "16 clusters": _clusters,
    "power law": _power_law,
    "autoregressive": _walk,
    "positive": lambda q, k, rng: (2 * np.maximum(q, 0), 2 * np.maximum(k, 0)),
    "far first key": sink(8),
}

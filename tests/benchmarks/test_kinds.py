"""The kinds of keys of ``benchmarks/accuracy.py --kinds more``."""

import numpy as np
import pytest

from benchmarks.kinds import MORE
from tests.cases import Shape, draw


@pytest.mark.parametrize("kind", MORE)
def test_keys_of_the_same_shape_but_others(kind: str) -> None:
    shape = Shape(queries=80, keys=80)
    plain, inputs = draw(shape, "float32"), draw(shape, "float32", MORE[kind])
    assert inputs.q.shape == plain.q.shape
    assert inputs.k.shape == plain.k.shape
    assert np.all(np.isfinite(inputs.k))
    assert not np.array_equal(inputs.k, plain.k)

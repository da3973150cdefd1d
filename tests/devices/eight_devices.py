"""Run by test_context_parallel.py, in a process of its own: batch, heads and length divided together, over eight."""

from __future__ import annotations

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from tests.devices.meshes import assert_alike, compiled  # noqa: E402
from tests.devices.test_context_parallel import given, on_one_device, work  # noqa: E402

expected = on_one_device("plain")
together = {"data": 2, "model": 2, "context": 2}
for way, axes, placed in (
    ("automatic", together, {"batch": "data", "heads": "model", "length": "context"}),
    ("shard_map", {"outer": 4, "inner": 2}, {"length": ("outer", "inner")}),
):
    run, arrays = compiled(way, axes, {}, {}, given(), **placed)
    assert_alike(run(*arrays), expected)

assert work(8)[5].tolist() == [10, 11, 20, 21]

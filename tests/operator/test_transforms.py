"""JAX's transformations: each gives what the plain call or a Python loop gives."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flashlla_jax import Residuals, lla_attention, lla_attention_and_omega
from tests.cases import Shape, draw, relative_error

SHAPE = Shape(2, 9, 12, 4, 2, 5, 3)
FLAT = Shape(2, 6, 6, 1, 1, 4, 4)
BATCH = 3  # of the axes that vmap adds

# Another batching or fusion reorders float64 sums, 1e-16 each; conjugate gradients then stop elsewhere within
# sqrt(cg_rtol) = 1e-12 of the solution, times a condition number of some tens.
SAME = 1e-10

both = pytest.mark.parametrize("implementation", ["xla", "reference"])


def attend(q: Any, k: Any, v: Any, ridge: Any, implementation: Any = "xla") -> jax.Array:
    return lla_attention(q, k, v, ridge_lambda=ridge, implementation=implementation)


def loss(q: Any, k: Any, v: Any, ridge: Any, implementation: Any = "xla") -> jax.Array:
    """The sum of squares: a cotangent that differs from element to element."""
    return jnp.sum(jnp.square(attend(q, k, v, ridge, implementation)))


# One compilation each for every test that needs the plain answer.
jit_attend = jax.jit(attend, static_argnums=4)
jit_grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), static_argnums=4)


def arguments(shape: Shape = SHAPE, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    ridge = jnp.asarray(np.random.default_rng(100 + seed).uniform(0.5, 2.0, shape.ridge))
    q, k, v, _ = draw(shape, seed=seed)
    return q, k, v, ridge


def stack(count: int = BATCH) -> list[jax.Array]:
    """The arguments, each with a new leading axis."""
    return [jnp.stack(xs) for xs in zip(*(arguments(seed=i) for i in range(count)), strict=True)]


def assert_same(got: Any, expected: Any, bound: float = SAME) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) <= bound


@both
def test_jit_is_the_eager_call(implementation: Any) -> None:
    args = arguments()
    assert_same(jit_attend(*args, implementation), attend(*args, implementation))


@pytest.mark.slow
@both
def test_value_and_grad_is_value_and_is_grad(implementation: Any) -> None:
    args = arguments()
    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), static_argnums=4)(*args, implementation)
    assert_same(value, jnp.sum(jnp.square(jit_attend(*args, implementation))))
    assert_same(gradients, jit_grad(*args, implementation))


@pytest.mark.slow
def test_grad_of_one_argument_is_its_part() -> None:
    """Not differentiating an argument leaves the others' gradients as they are."""
    args = arguments()
    expected = jit_grad(*args, "xla")
    for i in (1, 3):
        assert_same(jax.jit(jax.grad(loss, argnums=i))(*args), expected[i])


@pytest.mark.slow
@pytest.mark.parametrize(
    "in_axes",
    [(0, 0, 0, 0), (None, 0, 0, 0), (0, None, 0, 0), (0, 0, None, 0), (0, 0, 0, None), (0, None, None, None)],
    ids=lambda axes: "-".join(f"{name}:{axis}" for name, axis in zip("qkvl", axes, strict=True)),
)
def test_vmap_is_a_loop(in_axes: tuple[int | None, ...]) -> None:
    """Outputs and gradients, with any of the arguments shared."""
    args = [x if axis == 0 else x[0] for x, axis in zip(stack(), in_axes, strict=True)]

    def both_of(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return attend(*args), jax.grad(loss, argnums=(0, 1, 2, 3))(*args)

    o, gradients = jax.jit(jax.vmap(both_of, in_axes))(*args)
    for i in range(BATCH):
        one = [x if axis is None else x[i] for x, axis in zip(args, in_axes, strict=True)]
        assert_same(o[i], jit_attend(*one, "xla"))
        assert_same([g[i] for g in gradients], jit_grad(*one, "xla"))


def test_vmap_over_other_axes() -> None:
    """The mapped axis need not be the first, in or out."""
    q, k, v, ridge = stack()
    moved = (jnp.moveaxis(q, 0, 2), jnp.moveaxis(k, 0, -1), v, jnp.moveaxis(ridge, 0, 1))
    got = jax.jit(jax.vmap(attend, in_axes=(2, 4, 0, 1), out_axes=1))(*moved)
    for i in range(BATCH):
        assert_same(got[:, i], jit_attend(q[i], k[i], v[i], ridge[i], "xla"))


@pytest.mark.slow
def test_nested_vmap() -> None:
    """Two mapped axes, one over queries and ridge, the other over keys and values."""
    q, k, v, ridge = stack(2)
    inner = jax.vmap(attend, in_axes=(None, 0, 0, None))
    got = jax.jit(jax.vmap(inner, in_axes=(0, None, None, 0)))(q, k, v, ridge)
    for i in range(2):
        for j in range(2):
            assert_same(got[i, j], jit_attend(q[i], k[j], v[j], ridge[i], "xla"))


@both
def test_grad_of_vmap_sums_what_is_shared(implementation: Any) -> None:
    q, k, v, ridge = stack()

    def total(q: jax.Array, k: jax.Array, v: jax.Array, ridge: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(partial(loss, implementation=implementation), (0, None, 0, None))(q, k, v, ridge))

    dq, dk, dv, dridge = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(q, k[0], v, ridge[0])
    each = [jit_grad(q[i], k[0], v[i], ridge[0], implementation) for i in range(BATCH)]
    assert_same(dq, jnp.stack([g[0] for g in each]))
    assert_same(dk, sum(g[1] for g in each))
    assert_same(dv, jnp.stack([g[2] for g in each]))
    assert_same(dridge, sum(g[3] for g in each))


@pytest.mark.slow
def test_vmap_over_the_batch_axis_of_rank_three() -> None:
    """A map over the batch of ``(B, S, D)`` with a new batch of one inside is the call itself."""
    q, k, v, ridge = (x[:, :, 0] for x in arguments(FLAT))
    got = jax.jit(jax.vmap(lambda *one: attend(*(x[None] for x in one))[0]))(q, k, v, ridge)
    assert_same(got, jit_attend(q, k, v, ridge, "xla"))


def test_checkpoint_changes_no_gradient() -> None:
    """Rematerialised: the same outputs of the same functions, and the forward pass runs twice."""
    args = arguments()

    def remade(*args: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jax.checkpoint(attend)(*args)))

    assert_same(jax.jit(jax.grad(remade, argnums=(0, 1, 2, 3)))(*args), jit_grad(*args, "xla"))


@pytest.mark.slow
def test_scan_over_layers_is_a_loop() -> None:
    """A stack of layers with own weights and ridges, forward and backward."""
    rng = np.random.default_rng(1)
    layers, dim = 3, 4
    x = jnp.asarray(rng.normal(size=(1, 7, dim)))
    weights = jnp.asarray(rng.normal(size=(layers, 3, dim, dim)) / 2)
    ridges = jnp.asarray(rng.uniform(0.5, 2.0, layers))

    def layer(x: jax.Array, parameters: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        w, ridge = parameters
        return x + attend(x @ w[0], x @ w[1], x @ w[2], ridge), None

    def scanned(x: jax.Array, weights: jax.Array, ridges: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(jax.lax.scan(layer, x, (weights, ridges))[0]))

    def looped(x: jax.Array, weights: jax.Array, ridges: jax.Array) -> jax.Array:
        for i in range(layers):
            x, _ = layer(x, (weights[i], ridges[i]))
        return jnp.sum(jnp.square(x))

    got, expected = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, weights, ridges) for f in (scanned, looped))
    assert_same(got, expected)


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_eval_shape(dtype: str, implementation: Any) -> None:
    """Shapes and dtypes are known without running, residuals' too."""
    q, k, v, _ = draw(SHAPE, dtype)
    accumulated = jnp.float64 if dtype == "float64" else jnp.float32
    call = partial(lla_attention, return_residuals=True, implementation=implementation)
    o, residuals = jax.eval_shape(call, q, k, v)
    assert (o.shape, o.dtype) == ((2, 9, 4, 3), jnp.dtype(dtype))
    assert isinstance(residuals, Residuals)
    kinds = {"iterations": jnp.int32, "converged": jnp.bool_}
    for name, x in residuals._asdict().items():
        assert (x.shape, x.dtype) == ((2, 9, 4), kinds.get(name, accumulated)), name
    flat = [jax.ShapeDtypeStruct((2, 6, 4), dtype)] * 3
    o, residuals = jax.eval_shape(call, *flat)
    assert o.shape == (2, 6, 4)
    assert {x.shape for x in residuals} == {(2, 6)}


@pytest.mark.parametrize("mode", ["jvp", "jacfwd"])
def test_forward_mode_is_refused_by_jax(mode: str) -> None:
    args = arguments()
    transformed = partial(jax.jvp, attend, args) if mode == "jvp" else lambda args: jax.jacfwd(attend)(*args)
    with pytest.raises(TypeError, match="custom_vjp"):
        transformed(args)


@pytest.mark.slow
@pytest.mark.parametrize(
    "hidden", [{}, {"local_window_size": 3, "cg_use_preconditioner": True}], ids=["plain", "window"]
)
def test_forward_over_reverse_is_the_references(hidden: dict[str, Any]) -> None:
    """Hessian-vector products, in all four arguments, alone and mapped over directions."""
    args = arguments()
    rng = np.random.default_rng(3)
    directions = tuple(jnp.asarray(rng.normal(size=(2, *x.shape))) for x in args)

    def products(implementation: Any, **kwargs: Any) -> Any:
        def curved(*args: jax.Array) -> jax.Array:
            o = lla_attention(*args[:3], ridge_lambda=args[3], implementation=implementation, **hidden, **kwargs)
            return jnp.sum(jnp.sin(o))

        def push(direction: Any) -> Any:
            return jax.jvp(jax.grad(curved, argnums=(0, 1, 2, 3)), args, direction)[1]

        return jax.jit(jax.vmap(push))(directions)

    # two solves one after the other, each to 1e-14
    assert_same(products("xla", cg_rtol=1e-28), products("reference"), 1e-10)


@pytest.mark.slow
def test_reverse_over_reverse_is_refused_but_for_the_reference() -> None:
    q, k, v, ridge = arguments(FLAT)

    def slope(q: jax.Array, implementation: Any) -> jax.Array:
        gradient = jax.grad(lambda q: jnp.sum(jnp.sin(attend(q, k, v, ridge, implementation))))(q)
        return jnp.sum(jnp.square(gradient))

    with pytest.raises(NotImplementedError, match=r"forward mode .* implementation='xla'"):
        jax.grad(slope)(q, "xla")
    assert bool(jnp.isfinite(jax.jit(jax.grad(slope), static_argnums=1)(q, "reference")).all())


@pytest.mark.slow
@both
@pytest.mark.parametrize("name", ["left padding", "a length of 0", "window", "infinite ridge"])
def test_finite_inside(name: str, implementation: Any) -> None:
    """With JAX's checks for NaN and infinities on, calls that hide keys pass them, eager and with gradients."""
    q, k, v, ridge = arguments()
    length = k.shape[1]
    ways: dict[str, dict[str, Any]] = {
        "left padding": {"mask": (jnp.arange(length) >= 5)[None, None, None]},
        "a length of 0": {"key_value_seq_lengths": jnp.asarray([0, length])},
        "window": {"local_window_size": 2},
        "infinite ridge": {"ridge_lambda": np.inf},
    }
    kwargs = {"ridge_lambda": ridge, "implementation": implementation, **ways[name]}
    with jax.debug_nans(True), jax.debug_infs(True):
        o, vjp = jax.vjp(lambda *qkv: lla_attention(*qkv, **kwargs), q, k, v)
        vjp(o)


@pytest.mark.slow
@both
def test_what_hides_all_of_an_entry_hides_its_nan(implementation: Any) -> None:
    """A batch entry of length 0 that is all NaN, query too: zero, without a gradient, and the others as they were."""
    q, k, v, ridge = arguments()
    lengths = jnp.asarray([0, k.shape[1]])

    @jax.jit
    def run(*qkv: jax.Array) -> Any:
        call = partial(lla_attention, key_value_seq_lengths=lengths, implementation=implementation)
        o, vjp = jax.vjp(lambda *qkvr: call(*qkvr[:3], ridge_lambda=qkvr[3]), *qkv, ridge)
        return o, *vjp(jnp.where(jnp.arange(2).reshape(2, 1, 1, 1) == 0, jnp.nan, o))

    got = run(*(x.at[0].set(jnp.nan) for x in (q, k, v)))
    for x, expected in zip(got, run(q, k, v), strict=True):
        np.testing.assert_array_equal(x[0], jnp.zeros_like(x[0]))
        np.testing.assert_array_equal(x[1], expected[1])


@pytest.mark.usefixtures("optimised")  # without, a program and the same one inside another differ in the last bit
@pytest.mark.parametrize("wide", ["query", "key", "value"])
def test_numpy_float64_is_what_jax_makes_of_it(wide: str) -> None:
    """x64 off: as under jit, where JAX has canonicalised it before the call."""
    given: dict[str, Any] = {
        name: np.asarray(x, np.float64 if name == wide else np.float32)
        for name, x in zip(("query", "key", "value"), arguments(), strict=False)
    }
    with jax.enable_x64(False):
        o = lla_attention(**given)
        assert o.dtype == jnp.float32
        expected = jax.jit(lla_attention)(**given)
    np.testing.assert_array_equal(o, expected)


@both
@pytest.mark.parametrize("name", ["omega", "logsumexp", "residual_norm"])
def test_residuals_are_constants(name: str, implementation: Any) -> None:
    """Zero gradients, and a loss that also looks at a residual has the gradients of one that does not."""
    args = arguments()

    def call(*args: jax.Array) -> tuple[jax.Array, Residuals]:
        *qkv, ridge = args
        return lla_attention(*qkv, ridge_lambda=ridge, return_residuals=True, implementation=implementation)

    def residual(*args: jax.Array) -> jax.Array:
        return jnp.sum(getattr(call(*args)[1], name))

    def mixed(*args: jax.Array) -> jax.Array:
        o, residuals = call(*args)
        return jnp.sum(jnp.square(o)) + 5 * jnp.sum(jnp.square(getattr(residuals, name)))

    alone, beside = jax.jit(lambda *args: tuple(jax.grad(f, (0, 1, 2, 3))(*args) for f in (residual, mixed)))(*args)
    for gradient in alone:
        np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))
    assert_same(beside, jit_grad(*args, implementation))


def test_the_explicit_form_is_the_call_and_its_omega() -> None:
    """Positionally, in the order of ``flashlla``'s ``LLAFunction.apply``; each option takes effect in its place."""
    q, k, v, ridge = arguments(seed=5)
    positional: Any = (ridge, 0.7, 0.2, 1e-3, 1e-2, 5, True)
    names = ("ridge_lambda", "qk_scale", "delta_eps", "cg_atol", "cg_rtol", "cg_max_iters", "cg_use_preconditioner")
    options: dict[str, Any] = dict(zip(names, positional, strict=True))
    o, omega = lla_attention_and_omega(q, k, v, *positional)
    expected, residuals = lla_attention(q, k, v, **options, return_residuals=True)
    np.testing.assert_array_equal(o, expected)
    np.testing.assert_array_equal(omega, residuals.omega)
    keywords: dict[str, Any] = {"is_causal": False, "precision": "highest", "implementation": "reference"}
    o, omega = lla_attention_and_omega(q, k, v, ridge, **keywords)
    expected, residuals = lla_attention(q, k, v, ridge_lambda=ridge, **keywords, return_residuals=True)
    np.testing.assert_array_equal(o, expected)
    np.testing.assert_array_equal(omega, residuals.omega)


def test_omega_is_a_constant_of_the_explicit_form() -> None:
    args = arguments()
    gradients = jax.grad(lambda *args: jnp.sum(lla_attention_and_omega(*args)[1]), (0, 1, 2, 3))(*args)
    assert all(not np.any(g) for g in gradients)


@both
def test_numpy_inputs(implementation: Any) -> None:
    """NumPy arrays and NumPy scalars are arguments like JAX's."""
    q, k, v, ridge = arguments()
    expected = jit_attend(q, k, v, ridge, implementation)
    q, k, v, ridge = (np.asarray(x) for x in (q, k, v, ridge))
    got = attend(q, k, v, ridge, implementation)
    assert isinstance(got, jax.Array)
    assert_same(got, expected)
    scalar = attend(q, k, v, np.float32(0.5), implementation)
    assert_same(scalar, jit_attend(q, k, v, jnp.full(SHAPE.ridge, 0.5), implementation))


@both
def test_no_batch_gives_no_output(implementation: Any) -> None:
    """A batch of size zero, as a filtered batch may be: empty output, empty gradients."""
    args: Any = tuple(x[:0] for x in arguments())
    assert jit_attend(*args, implementation).shape == (0, 9, 4, 3)
    for gradient, x in zip(jit_grad(*args, implementation), args, strict=True):
        assert gradient.shape == x.shape


@pytest.mark.slow
@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_traced_ridge_of_any_float_dtype(dtype: str, implementation: Any) -> None:
    """A traced ridge may be narrower or wider than the inputs, under strict promotion; its gradient has its dtype."""
    q, k, v, _ = draw(SHAPE, dtype)
    for ridge_dtype in ("bfloat16", "float32", "float64"):
        ridge = jnp.asarray(0.5, ridge_dtype)  # exact in each
        gradient = jax.eval_shape(jax.grad(loss, argnums=3), q, k, v, ridge)
        assert (gradient.shape, gradient.dtype) == ((), ridge.dtype)
        o = jit_attend(q, k, v, ridge, implementation)
        np.testing.assert_array_equal(o, jit_attend(q, k, v, jnp.asarray(0.5, jnp.float32), implementation))


def test_an_integer_ridge_is_a_number() -> None:
    q, k, v, _ = arguments()
    expected = attend(q, k, v, 2.0)
    for ridge in (2, np.full(4, 2)):
        np.testing.assert_array_equal(attend(q, k, v, ridge), expected)


@pytest.mark.slow
def test_training_is_the_references_training() -> None:
    """Twenty steps of Adam on a tiny regression, all projections and the ridge learnt: the loss falls, and every
    loss is the dense reference's."""
    rng = np.random.default_rng(2)
    dim = 4
    x = jnp.asarray(rng.normal(size=(2, 10, dim)), jnp.float32)
    target = x @ jnp.asarray(rng.normal(size=(dim, dim)), jnp.float32)
    start = {name: jnp.eye(dim, dtype=jnp.float32) for name in "qkv"} | {"log_ridge": jnp.zeros((), jnp.float32)}
    optimizer = optax.adam(0.05)

    def losses(implementation: Any) -> list[float]:
        def objective(parameters: dict[str, jax.Array]) -> jax.Array:
            q, k, v = (x @ parameters[name] for name in "qkv")
            return jnp.mean(jnp.square(attend(q, k, v, jnp.exp(parameters["log_ridge"]), implementation) - target))

        @jax.jit
        def step(parameters: Any, state: Any) -> tuple[Any, Any, jax.Array]:
            value, gradients = jax.value_and_grad(objective)(parameters)
            with jax.numpy_dtype_promotion("standard"):  # optax promotes inside
                updates, state = optimizer.update(gradients, state)
            return optax.apply_updates(parameters, updates), state, value

        parameters, state, values = start, optimizer.init(start), []
        for _ in range(20):
            parameters, state, value = step(parameters, state)
            values.append(float(value))
        return values

    xla, dense = losses("xla"), losses("reference")
    # each float32 gradient is good to about 2e-5 (the promise); Adam's steps carry that on, five times at most here
    np.testing.assert_allclose(xla, dense, rtol=1e-4)
    assert xla[-1] < 0.5 * xla[0]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for_other_platforms(platform: str) -> None:
    """The XLA path needs nothing of the machine that it is traced on: forward and backward lower for any platform."""
    x = jax.ShapeDtypeStruct((1, 9, 4), jnp.bfloat16)
    ridge = jax.ShapeDtypeStruct((), jnp.float32)
    step = jax.jit(jax.value_and_grad(partial(loss, implementation="xla"), argnums=(0, 1, 2, 3)))
    text = step.trace(x, x, x, ridge).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" in text
    assert "custom_call" not in text  # nothing platform-specific


def test_exported_function_runs() -> None:
    """``jax.export`` for three platforms at once, called on this one."""
    q, k, v, ridge = arguments(FLAT)
    exported = jax.export.export(jit_attend, platforms=("cpu", "cuda", "tpu"))(q, k, v, ridge, "xla")
    assert_same(exported.call(q, k, v, ridge), jit_attend(q, k, v, ridge, "xla"))


@pytest.mark.slow
def test_exported_for_any_batch() -> None:
    def gradient(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.grad(lambda q: jnp.sum(lla_attention(q, k, v, implementation="xla")))(q)

    q, k, v = draw(Shape(batch=3, queries=9, keys=9, heads=2, kv_heads=1, dim=4, value_dim=4))[:3]
    sizes = jax.export.symbolic_args_specs((q, k, v), ("b, 9, 2, 4", "b, 9, 1, 4", "b, 9, 1, 4"))
    exported = jax.export.export(jax.jit(gradient))(*sizes)
    assert_same(exported.call(q, k, v), jax.jit(gradient)(q, k, v))

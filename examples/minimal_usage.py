"""Local Linear Attention in one page: forward, backward, the explicit form with omega, and a jit-ed training step.

    python examples/minimal_usage.py

Runs on a CPU, a GPU or a TPU, with the implementation that fits.
"""

import jax
import jax.numpy as jnp
import optax

from flashlla_jax import default_implementation, lla_attention, lla_attention_and_omega

BATCH, LENGTH, DIM = 2, 256, 64


def main() -> None:
    device = jax.devices()[0]
    print(f"[setup] device: {device.device_kind} ({device.platform}), implementation: {default_implementation()}")

    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (BATCH, LENGTH, DIM), jnp.bfloat16) for key in keys[:3])

    # The function, used like jax.nn.dot_product_attention. (B, T, N, H) with heads works the same way.
    o = lla_attention(q, k, v, ridge_lambda=10.0)
    print(f"[functional] output: shape={o.shape} dtype={o.dtype}")

    # The gradient of any scalar loss, in the ridge too.
    def mean_square(q: jax.Array, k: jax.Array, v: jax.Array, ridge_lambda: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(lla_attention(q, k, v, ridge_lambda=ridge_lambda).astype(jnp.float32)))

    gradients = jax.jit(jax.grad(mean_square, argnums=(0, 1, 2, 3)))(q, k, v, jnp.float32(10.0))
    norms = [jnp.linalg.norm(x.astype(jnp.float32)) for x in gradients]
    names = ("dq", "dk", "dv", "dlambda")
    print("[functional] gradient norms: " + ", ".join(f"|{n}|={x:.4e}" for n, x in zip(names, norms, strict=True)))

    # The explicit form returns the softmax normaliser omega as well.
    o, omega = lla_attention_and_omega(q, k, v, 10.0)
    print(f"[explicit] output: shape={o.shape}, omega: shape={omega.shape} mean={jnp.mean(omega):.4e}")

    # A training step: learn projections, and the ridge through its logarithm, that recover a linear map of the input.
    inputs = jax.random.normal(keys[3], (BATCH, LENGTH, DIM))
    targets = inputs @ jax.random.normal(keys[0], (DIM, DIM)) / DIM**0.5
    shared = jnp.eye(DIM)
    params = {"query": shared, "key": shared, "value": shared, "log_ridge": jnp.log(10.0)}
    optimizer = optax.adam(3e-3)

    def loss_fn(params: dict[str, jax.Array]) -> jax.Array:
        q, k, v = (inputs @ params[name] for name in ("query", "key", "value"))
        return jnp.mean(jnp.square(lla_attention(q, k, v, ridge_lambda=jnp.exp(params["log_ridge"])) - targets))

    @jax.jit
    def step(params: dict[str, jax.Array], state: optax.OptState):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    losses = []
    for _ in range(30):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    print(f"[training] loss: {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} jit-ed steps")
    print(f"[training] ridge_lambda: 10.0000 -> {jnp.exp(params['log_ridge']):.4f}")


if __name__ == "__main__":
    main()

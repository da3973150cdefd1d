"""Norm-wise error ||got - truth|| / ||truth|| of an implementation against the dense reference in float64.

    python -m benchmarks.accuracy --implementation xla --dtype float32 [--precision high] [--kinds more] [--output FILE]

The inputs are the case list of the tests, or those of ``benchmarks/kinds.py``. Next to each error of float32 stands
that of the dense form in float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.kinds import MORE
from tests.cases import ALL_KINDS, GRADIENTS, RIDGES, Shape, draw, evaluate, relative_error, truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", default="xla", choices=("triton", "xla", "reference"))
    parser.add_argument("--dtype", default="float32", choices=("float64", "float32", "bfloat16", "float16"))
    parser.add_argument("--precision", choices=("default", "high", "highest"))
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--kinds", default="list", choices=("list", "more"))
    parser.add_argument("--output", type=Path, help="append the table to this file")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    shape = Shape(queries=args.length, keys=args.length, dim=args.dim, value_dim=args.dim)
    names = ("o", *GRADIENTS)
    options = {"cg_rtol": 1e-28} if args.dtype == "float64" else {"precision": args.precision}
    lines = [
        f"{args.implementation}, {args.dtype}, precision={args.precision}, S={args.length}, D={args.dim}, "
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}",
        f"{'keys':>20} {'lambda':>7}  " + " ".join(f"{name:>8}" for name in names),
    ]
    for kind, make in tqdm({"list": ALL_KINDS, "more": MORE}[args.kinds].items(), desc="kinds of keys"):
        inputs = draw(shape, args.dtype, make)
        for ridge in RIDGES:
            lam = jnp.full(shape.ridge, ridge, "float64" if args.dtype == "float64" else "float32")
            expected = truth(inputs, lam)
            got = evaluate(inputs, lam, implementation=args.implementation, **options)  # type: ignore[arg-type]
            errors = [f"{relative_error(got[name], expected[name]):8.1e}" for name in names]
            row = f"{kind:>20} {ridge:7g}  " + " ".join(errors)
            if args.dtype == "float32":
                dense = evaluate(inputs, lam, implementation="reference")
                row += "   dense: " + " ".join(f"{relative_error(dense[name], expected[name]):8.1e}" for name in names)
            lines.append(row)
    table = "\n".join(lines)
    print(table)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.open("a") as file:
            file.write(table + "\n\n")


if __name__ == "__main__":
    main()

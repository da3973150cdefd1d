"""Short trainings of many small models: the learning rates of a sweep at once, compiled ahead, kept as they finish."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .runs import RunError, again, check_config, number, prepare_folder, seed, write
from .transformer import ATTENTIONS, DTYPES, IMPLEMENTATIONS, TITLES, Array, decayed

try:
    import optax
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; the examples need: pip install "flashlla-jax[examples]"')


def sweep_parser(doc: str | None, presets: Iterable[str], name: str) -> tuple[argparse.ArgumentParser, Any]:
    """The flags that every sweep has, and the group for the sizes of its own. ``name`` is that of the output folder."""
    summary, _, details = (doc or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=tuple(presets), default="small", help="default: %(default)s")
    parser.add_argument(
        "--attention",
        choices=ATTENTIONS,
        nargs="+",
        default=list(ATTENTIONS),
        help="which methods; what others left in the output folder stays. Default: all",
    )
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="of LLA and Parallax; default: the best here")
    parser.add_argument("--output-dir", type=Path, help=f"default: outputs/{name}/<preset>")
    parser.add_argument("--fresh", action="store_true", help="delete the results in the output folder and start over")
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    size = parser.add_argument_group("size", "defaults: the preset's")
    size.add_argument("--batch", type=number(int, 1))
    size.add_argument("--steps", type=number(int, 1))
    size.add_argument("--rates", type=number(float, 0, above=True), nargs="+", help="learning rates to choose from")
    size.add_argument(
        "--dtype", choices=DTYPES, help="of the computation; auto: bfloat16 where a head has 128 features or more"
    )
    return parser, size


def refuse_repetition(parser: argparse.ArgumentParser, config: Any, *names: str) -> None:
    """A length given twice, say, would be trained once and reported twice."""
    for name in names:
        values = getattr(config, name)
        if repeated := [value for i, value in enumerate(values) if value in values[:i]]:
            parser.error(f"argument --{name}: {repeated[0]:g} is given twice; give each value once")


def carry_out(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    config: Any,
    name: str,
    *,
    run: Callable[..., None],
    table: Callable[..., str],
    plot: Callable[..., Any],
    shapes: dict[str, tuple[int, ...]],
    remarks: Sequence[str],
) -> None:
    """Trains what is missing in the output folder, then prints the remarks and the table and writes the plot.

    ``run``, ``table`` and ``plot`` are for the methods that ``--attention`` names. ``shapes`` are of the numbers in a
    result that table and plot read.
    """
    attentions = [attention for attention in ATTENTIONS if attention in args.attention]
    output = args.output_dir or Path("outputs") / name / args.preset
    try:
        results = Results(output / "results.json", dataclasses.asdict(config), shapes, args.fresh)
        run(config, results, attentions)
        for remark in remarks:
            print(remark)
        print(table(config, results, attentions))
        if seconds := training_seconds(results, attentions):
            print(seconds)
        figure = plot(config, results, attentions)
        write(output / f"{name}.png", lambda path: figure.savefig(path, dpi=110, format="png"))
    except (RunError, NotImplementedError) as error:  # the latter: an implementation that cannot run here
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        how = f"{again(args.fresh)} goes on after the last finished training"
        parser.exit(130, f"{parser.prog}: interrupted; {how}\n")
    print(f"results: {output / 'results.json'}, {output / f'{name}.png'}")


def training_seconds(results: Results, attentions: Sequence[str]) -> str:
    """What each method's trainings took, for runs of other lengths at equal time; empty if results lack it."""
    by_method = {
        attention: [result.get("seconds") for name, result in results.finished.items() if name.split()[0] == attention]
        for attention in attentions
    }
    if not all(seconds and all(isinstance(x, float) for x in seconds) for seconds in by_method.values()):
        return ""
    sums = (f"{TITLES[attention]} {sum(seconds):.1f}" for attention, seconds in by_method.items())
    return f"seconds of training by the fastest steps: {', '.join(sums)}"


@dataclass(frozen=True)
class Budget:
    """What every method gets alike: AdamW, a linear warm-up, a cosine decay to zero, and these learning rates."""

    steps: int
    rates: tuple[float, ...]
    weight_decay: float
    seed: int

    def optimizer(self, rate: float | Array) -> optax.GradientTransformation:
        warmup = min(max(1, self.steps // 10), self.steps - 1)  # optax wants a step of decay
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, self.steps)
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(),
            # not the learned ridge and the norms' scales
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(lambda step: rate * shape(step)),
        )


def best_rate(scores: np.ndarray) -> int:
    """The index of the highest of the finite scores, which are by learning rate."""
    finite = np.isfinite(scores)
    if not finite.any():
        raise RunError("every learning rate diverged; lower --rates")
    return int(np.argmax(np.where(finite, scores, -np.inf)))


@dataclass(frozen=True)
class Outcome:
    """What each learning rate came to: arrays with the rates leading, in the budget's order."""

    losses: np.ndarray  # (rates, steps)
    validation: Any
    test: Any
    seconds: float  # of the training, if every step takes as long as the fastest ones


class Job:
    """One model on one task, trained with every learning rate of the budget at once (``jax.vmap``).

    Args:
        build: makes the model.
        loss: of a model, on data drawn with a key; every step has its own key.
        evaluate: a tree of arrays for a model, on data drawn with a key.
        budget: see :class:`Budget`.
    """

    def __init__(
        self,
        build: Callable[[nnx.Rngs], nnx.Module],
        loss: Callable[[Any, Array], Array],
        evaluate: Callable[[Any, Array], Any],
        budget: Budget,
    ):
        self.budget = budget
        self._build, self._loss, self._evaluate_model = build, loss, evaluate
        self._rates = jnp.array(budget.rates, jnp.float32)
        self._keys = jax.random.split(jax.random.key(budget.seed), 3)  # of training, validation and test

    def compile(self) -> Job:
        """Does all compilation, so that it can go on beside the training of another job."""
        # nnx's modules are made once here, and stand for their structure only
        self._graph, _ = nnx.split(nnx.eval_shape(lambda: self._build(nnx.Rngs(0))))
        self._init = jax.jit(self._initial).lower().compile()
        state = jax.eval_shape(self._initial)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        key = jax.eval_shape(lambda: self._keys[0])
        self._step = jax.jit(self._train_step, donate_argnums=(0, 1)).lower(*state, step).compile()
        self._evaluate = jax.jit(self._evaluate_all).lower(state[0], key).compile()
        return self

    def _initial(self) -> tuple[Any, Any]:
        params = nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(self.budget.seed))))
        optimizer = self.budget.optimizer(0.0).init(params)
        return jax.tree.map(lambda x: jnp.stack([x] * len(self._rates)), (params, optimizer))

    def _train_step(self, params: Any, optimizer: Any, step: Array) -> tuple[Any, Any, Array]:
        key = jax.random.fold_in(self._keys[0], step)

        def one(params: Any, optimizer: Any, rate: Array) -> tuple[Any, Any, Array]:
            loss, gradient = jax.value_and_grad(lambda params: self._loss(nnx.merge(self._graph, params), key))(params)
            updates, optimizer = self.budget.optimizer(rate).update(gradient, optimizer, params)
            return optax.apply_updates(params, updates), optimizer, loss

        return jax.vmap(one)(params, optimizer, self._rates)

    def _evaluate_all(self, params: Any, key: Array) -> Any:
        return jax.vmap(lambda params: self._evaluate_model(nnx.merge(self._graph, params), key))(params)

    def run(self, bar: tqdm) -> Outcome:
        """Trains, moving the bar by one a step; a RunError if no learning rate has a finite loss."""
        params, optimizer = self._init()
        losses: list[Array] = []
        shown, begin, fastest = 0, time.perf_counter(), math.inf
        for step in range(self.budget.steps):
            params, optimizer, loss = self._step(params, optimizer, jnp.int32(step))
            losses.append(loss)
            if step % 20 == 19 or step + 1 == self.budget.steps:  # do not wait for the device at every step
                lowest = np.asarray(loss)[best_rate(-np.asarray(loss))]
                bar.set_postfix_str(f"loss {lowest:.3f}", refresh=False)
                steps = step + 1 - shown
                bar.update(steps)
                # the next job compiles meanwhile: the steps that it holds up least tell a method's time
                fastest = min(fastest, (time.perf_counter() - begin) / steps)
                shown, begin = step + 1, time.perf_counter()
        validation, test = (jax.tree.map(np.asarray, self._evaluate(params, key)) for key in self._keys[1:])
        losses_by_rate = np.stack([np.asarray(loss) for loss in losses], axis=1)
        return Outcome(losses_by_rate, validation, test, fastest * self.budget.steps)


def run_all(jobs: Sequence[tuple[str, Callable[[], Job]]]) -> Iterator[tuple[str, Outcome]]:
    """Trains the jobs in turn under one progress bar, compiling the next ones meanwhile; yields each as it ends."""
    with ThreadPoolExecutor(1) as compiler:
        try:
            compiled = [(name, compiler.submit(lambda make=make: make().compile())) for name, make in jobs]
            for i, (name, future) in enumerate(compiled):
                job = future.result()
                with tqdm(total=job.budget.steps, desc=f"[{i + 1}/{len(jobs)}] {name}", unit="step") as bar:
                    outcome = job.run(bar)
                yield name, outcome
        finally:
            compiler.shutdown(wait=False, cancel_futures=True)


def _has_numbers(result: Any, shapes: dict[str, tuple[int, ...]]) -> bool:
    if not isinstance(result, dict):
        return False
    arrays = {name: np.asarray(result.get(name)) for name in shapes}
    return all(arrays[name].dtype.kind in "if" and arrays[name].shape == shape for name, shape in shapes.items())


class Results:
    """Finished jobs by name in a JSON file, so that a sweep that was stopped goes on with what is missing.

    Args:
        path: the file; read if it exists.
        config: what the results depend on; a file with another one is refused.
        shapes: of the numbers in a result, by name; a file where they differ is refused.
        fresh: whether to begin anew.

    Raises:
        RunError: The file is not readable or is of another configuration, or nothing can be written in its folder.
    """

    def __init__(self, path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], fresh: bool):
        self._path, self._config = path, json.loads(json.dumps(config))
        self.finished: dict[str, Any] = {}
        prepare_folder(path.parent)
        if fresh:  # now: a run that is stopped before its first result must not go on with these
            self._delete()
        if not path.exists():
            return
        try:
            match json.loads(path.read_text()):
                case {"config": dict(found), "finished": dict(finished)}:
                    check_config(str(path), found, self._config)
                    self.finished = finished
                case _:
                    raise ValueError('it has no "config" and "finished"')
            for name, result in self.finished.items():
                if not _has_numbers(result, shapes):
                    raise ValueError(f'the result "{name}" is damaged')
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {path}: {error}; delete it, or start over with --fresh") from error

    def _delete(self) -> None:
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"argument --fresh: cannot delete {self._path}: {error.strerror}") from error

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Keeps a result, on disk at once."""
        self.finished[name] = result
        about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "config": self._config}
        text = json.dumps(about | {"finished": self.finished}, indent=1) + "\n"
        write(self._path, lambda path: path.write_text(text))

"""Train a byte-level language model on the sources of Python's standard library, with LLA or softmax attention.

    python examples/train_char_lm.py                                        # LLA, minutes on two CPU cores
    python examples/train_char_lm.py --attention both                       # and softmax attention, same budget
    python examples/train_char_lm.py --attention parallax                   # the learned probe in place of the solve
    python examples/train_char_lm.py --attention all --preset h200          # the three of them, the size for a GPU
    python examples/train_char_lm.py --mesh data=2,context=2                # on four devices; also fsdp and tensor
    python examples/train_char_lm.py --generate "def main(" "import "       # sample from the checkpoint

A decoder-only transformer (pre-norm, rotary positions, AdamW with warm-up and cosine decay) whose attention alone
differs. Training writes checkpoints: stop it with Ctrl-C or kill it, give the same command again, and it goes on to the
same result, on another mesh too. A batch is a function of the seed and the step only, and the loss history lies in the
checkpoint. Over several hosts, start one process on each with the same flags, --coordinator HOST:PORT --processes N
--process-id I and an --output-dir that all of them see; --mesh then takes all of their devices.

Prints the validation loss beside that of a bigram model of the same text; writes the losses as JSON and as a plot.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common.char_lm import (
    GREEDY,
    SOLVES,
    CharLM,
    Config,
    abstract_model,
    generate,
    make_optimizer,
    solver_steps,
    summary,
)
from common.lm_report import Result, plot, progress, table
from common.meshes import Placement, agreed, check_sizes, join, mesh_sizes, place, wait_for_all
from common.runs import (
    Checkpoints,
    Losses,
    RunError,
    State,
    Stopped,
    StopRequest,
    again,
    delete_folder,
    number,
    prepare_folder,
    seed,
    write,
)
from common.stdlib_text import END, Text, bigram_loss, load_text, windows
from common.transformer import (
    IMPLEMENTATIONS,
    LLA,
    PARALLAX,
    SOFTMAX,
    TITLES,
    Array,
    count_parameters,
    watched,
)
from flax import nnx

try:
    import optax
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f'{error.name} is not installed; the examples need: pip install "flashlla-jax[examples]"')


# 0.5 million parameters, which see 0.8 million bytes; 19 million parameters, which see 20 million bytes.
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "features": 128, "layers": 2, "heads": 4, "context": 128, "batch": 16, "steps": 400, "warmup": 40,
        "learning_rate": 3e-3, "weight_decay": 0.1, "dtype": "float32", "eval_every": 100, "eval_windows": 128,
    },
    "h200": {
        "features": 512, "layers": 6, "heads": 8, "context": 1024, "batch": 64, "steps": 300, "warmup": 30,
        "learning_rate": 1e-3, "weight_decay": 0.1, "dtype": "bfloat16", "eval_every": 75, "eval_windows": 256,
    },
}  # fmt: skip

# What --attention names, in the order in which it is trained.
SETS = {name: (name,) for name in (LLA, PARALLAX, SOFTMAX)} | {
    "both": (LLA, SOFTMAX),
    "all": (LLA, PARALLAX, SOFTMAX),
}


class Trainer:
    """The jit-ed functions of one configuration on one text, by default on one device."""

    def __init__(self, config: Config, text: Text, placement: Placement | None = None):
        self.config = config
        self._optimizer = make_optimizer(config)
        self._graph, _ = abstract_model(config)
        self._placement = placement = placement or place(mesh_sizes(""))
        whole = placement.whole
        self._text = jax.device_put(text.train, whole)
        self._validation = jax.device_put(windows(text.validation, config.eval_windows, config.context + 1), whole)
        places = tuple(placement.of(x) for x in jax.eval_shape(self._initial))
        self._init = jax.jit(self._initial, out_shardings=places)
        self._step = jax.jit(self._train_step, donate_argnums=(0, 1), out_shardings=(*places, whole))
        self._evaluate = jax.jit(self._validate, out_shardings=whole)

    def _initial(self) -> tuple[Any, Any]:
        params = nnx.to_pure_dict(nnx.state(CharLM(self.config, rngs=nnx.Rngs(self.config.seed))))
        return params, self._optimizer.init(params)

    def _state(self, params: Any, optimizer: Any) -> State:
        names = ("loss", "validation", "seconds", *SOLVES)
        return State(params, optimizer, {name: np.full(self.config.steps, np.nan) for name in names})

    def init(self) -> State:
        return self._state(*self._init())

    def abstract(self) -> State:
        """The shapes and dtypes of the state, and where it lies."""
        return self._state(*self._placement.placed(jax.eval_shape(self._initial)))

    def _given_and_following(self, tokens: Array) -> tuple[Array, Array]:
        tokens = tokens.astype(jnp.int32)
        given, following = (
            jax.lax.with_sharding_constraint(x, self._placement.tokens) for x in (tokens[:, :-1], tokens[:, 1:])
        )
        return given, following

    def _loss(self, params: Any, tokens: Array) -> Array:
        given, following = self._given_and_following(tokens)
        logits = nnx.merge(self._graph, params)(given)
        return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()

    def batch(self, text: Array, step: Array) -> Array:
        """``(batch, context + 1)`` random pieces of the text: a function of the seed and the step."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), step)
        length = self.config.context + 1
        starts = jax.random.randint(key, (self.config.batch,), 0, len(text) - length + 1)
        return text[starts[:, None] + jnp.arange(length)]

    def _train_step(self, params: Any, optimizer: Any, text: Array, step: Array) -> tuple[Any, Any, Array]:
        loss, gradient = jax.value_and_grad(self._loss)(params, self.batch(text, step))
        updates, optimizer = self._optimizer.update(gradient, optimizer, params)
        return optax.apply_updates(params, updates), optimizer, loss

    def step(self, state: State, step: int) -> Array:
        """Advances the state by one step in place; returns the loss of its batch, without waiting for it."""
        state.params, state.optimizer, loss = self._step(state.params, state.optimizer, self._text, np.int32(step))
        return loss

    def _figures(self, params: Any, tokens: Array) -> dict[str, Array]:
        """The loss and, for LLA, how the solves went: a training step does not look, and so pays nothing for it."""
        given, following = self._given_and_following(tokens)
        logits, solves = watched(nnx.merge(self._graph, params), given)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()
        return {"validation": loss} | ({} if solves is None else summary(solves))

    def _validate(self, params: Any, pieces: Array) -> dict[str, Array]:
        batches = pieces.reshape(-1, math.gcd(len(pieces), self.config.batch), pieces.shape[1])
        figures = jax.lax.map(partial(self._figures, params), batches)
        return {name: x.max() if name == "relative_error" else x.mean() for name, x in figures.items()}

    def evaluate(self, state: State) -> dict[str, float]:
        """On the validation text, under the names that they have in the history."""
        return {name: float(x) for name, x in self._evaluate(state.params, self._validation).items()}


def train(
    config: Config,
    text: Text,
    checkpoints: Checkpoints,
    checkpoint_every: int,
    stop: StopRequest,
    placement: Placement | None = None,
) -> State:
    """Trains from the latest checkpoint, or from the start, to the last step.

    Raises:
        RunError: The checkpoint is of other flags or cannot be read, or a loss is not finite.
        Stopped: A signal came before the last step; the state after the next step is saved.
    """
    done = checkpoints.latest or 0
    if done:
        checkpoints.check_config(done, dataclasses.asdict(config))
    trainer = Trainer(config, text, placement)
    state = checkpoints.restore(done, trainer.abstract()) if done else trainer.init()
    if done:
        print(f"{TITLES[config.attention]}: going on after step {done} of {config.steps}")

    silent = jax.process_index() > 0
    with tqdm(total=config.steps, initial=done, desc=TITLES[config.attention], unit="step", disable=silent) as bar:
        losses = Losses(state.history, config.batch * config.context, bar)
        for step in range(done, config.steps):
            agreement = agreed(stop.signal)  # before the step, so that reading it does not wait for the step
            losses.add(step, trainer.step(state, step))
            signal = int(agreement)
            last = step + 1 == config.steps
            evaluates = last or (step + 1) % config.eval_every == 0
            saves = last or signal or (step + 1) % checkpoint_every == 0
            if not evaluates and not saves:
                continue
            losses.read()  # of this step too: a checkpoint lacks none
            if evaluates:
                line = _evaluate(trainer, state, step)
                if not silent:
                    bar.write(line)
            if saves:
                checkpoints.save(step + 1, state, dataclasses.asdict(config))
            if signal and not last:
                message = f"stopped after step {step + 1} of {config.steps}, saved in {checkpoints.directory}"
                raise Stopped(signal, message)
            losses.resume()
    return state


def _evaluate(trainer: Trainer, state: State, step: int) -> str:
    """The line of an evaluation, which is in the history then."""
    figures = trainer.evaluate(state)
    for name, figure in figures.items():
        state.history[name][step] = figure
    if not math.isfinite(validation := figures["validation"]):
        raise RunError(f"the validation loss is {validation} after step {step + 1}; lower --learning-rate")
    return progress(step + 1, state.history["loss"][step], figures)


# ---- the command


def _parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    positive, rate = number(int, 1), number(float, 0, above=True)
    parser.add_argument("--attention", choices=tuple(SETS), default=LLA, help="default: %(default)s")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu", help="the size; default: %(default)s")
    parser.add_argument(
        "--implementation", choices=IMPLEMENTATIONS, help="of LLA and Parallax; default: the best that runs here"
    )
    parser.add_argument("--output-dir", type=Path, help="default: outputs/train_char_lm/<preset>")
    parser.add_argument(
        "--fresh", action="store_true", help="delete the checkpoints of this output folder and start over"
    )
    parser.add_argument("--checkpoint-every", type=positive, help="steps; default: a quarter of them")
    parser.add_argument("--seed", type=seed, default=0, help="of training or of sampling; default: %(default)s")
    devices = parser.add_argument_group("devices")
    devices.add_argument(
        "--mesh",
        type=mesh_sizes,
        default=mesh_sizes(""),
        metavar="AXIS=N,...",
        help="data, fsdp, context or tensor, or a product of them such as data=2,context=2; default: one device",
    )
    devices.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where there are several")
    devices.add_argument("--processes", type=positive, help="how many there are")
    devices.add_argument("--process-id", type=number(int, 0), help="the number of this one, from 0")
    size = parser.add_argument_group("size", "defaults: the preset's")
    for name in ("features", "layers", "heads", "context", "batch", "steps", "eval-every", "eval-windows"):
        size.add_argument(f"--{name}", type=positive)
    size.add_argument("--warmup", type=number(int, 0), help="steps in which the learning rate rises")
    size.add_argument("--learning-rate", type=rate)
    size.add_argument("--weight-decay", type=number(float, 0))
    size.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--generate", metavar="PROMPT", nargs="+", help="sample from the checkpoint instead of training, all at once"
    )
    sampling.add_argument("--length", type=positive, default=400, help="bytes to sample each; default: %(default)s")
    sampling.add_argument("--top-k", type=positive, help="draw from the likeliest that many bytes; default: all")
    sampling.add_argument(
        "--temperature",
        type=number(float, 0),
        default=0.7,
        help=f"0, like all below {GREEDY:.2g}, takes the likeliest byte; default: %(default)s",
    )
    return parser


def _sample(args: argparse.Namespace, directory: Path) -> None:
    if not os.path.isdir(directory):  # unlike Path.is_dir, also False without permission
        raise RunError(f"there is no checkpoint in {directory}; train first, or give another --output-dir")
    with Checkpoints(directory) as checkpoints:
        _sample_from(args, checkpoints)


def _sample_from(args: argparse.Namespace, checkpoints: Checkpoints) -> None:
    directory, latest = checkpoints.directory, checkpoints.latest
    if latest is None:
        raise RunError(f"there is no checkpoint in {directory}; train first, or give another --output-dir")
    try:
        config = Config(**checkpoints.config(latest))
    except TypeError as error:
        raise RunError(f"the checkpoint in {directory} is of another version of this example; train again") from error
    for name in PRESETS[args.preset]:
        given = getattr(args, name)
        if given is not None and given != getattr(config, name):
            flag = name.replace("_", "-")
            raise RunError(f"argument --{flag}: {given}, but the checkpoint has {getattr(config, name)}; leave it out")
    params = checkpoints.params(latest, place(mesh_sizes("")).placed(abstract_model(config)[1]))
    prompts = [os.fsencode(prompt) for prompt in args.generate]  # as they were typed: they may be no UTF-8
    sampled, rate = generate(config, params, prompts, args.length, args.temperature, args.seed, args.top_k)
    print(f"---- {TITLES[config.attention]} after {latest} steps")
    texts = (p + s.replace(bytes([END]), b"\n[end of file]\n") for p, s in zip(prompts, sampled, strict=True))
    print("\n----\n".join(text.decode(errors="replace") for text in texts))
    print(f"{rate:,.0f} tokens/s", file=sys.stderr)  # apart from what a seed repeats


def _sizes(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in PRESETS[args.preset]}
    return PRESETS[args.preset] | {name: value for name, value in given.items() if value is not None}


def _train_all(args: argparse.Namespace, attentions: Sequence[str], output: Path) -> None:
    sizes = _sizes(args)
    check_sizes(args.mesh, sizes)
    placement = place(args.mesh)
    first = jax.process_index() == 0
    for attention in attentions:  # all before the first training, so that what a stop leaves is of this command
        if args.fresh and first:
            delete_folder(output / attention)
        wait_for_all("deleted")
        prepare_folder(output / attention)
    prepare_folder(output)
    text = load_text()
    results = []
    for attention in attentions:
        config = Config(attention, args.implementation, seed=args.seed, text=text.sha256, **sizes)
        directory = output / attention
        every = args.checkpoint_every or math.ceil(config.steps / 4)
        with StopRequest() as stop, Checkpoints(directory) as checkpoints:
            state = train(config, text, checkpoints, every, stop, placement)
        if (signal := int(agreed(stop.signal))) and attention != attentions[-1]:  # it came in the last step
            raise Stopped(signal, f"stopped after {TITLES[attention]}, saved in {directory}")
        steps = solver_steps(config, state.params, text, placement)
        results.append(Result(config, count_parameters(state.params), state.history, steps))

    pieces = windows(text.validation, sizes["eval_windows"], sizes["context"] + 1)
    bigram = bigram_loss(text.train, pieces)
    device, count = jax.devices()[0], placement.mesh.size
    print(
        f"{count} x {device.device_kind}, jax {jax.__version__}, {sizes['steps']} steps of "
        f"{sizes['batch']} x {sizes['context']} bytes"
    )
    for r in results:
        if r.solver_steps:
            print(f"mean steps of LLA's solves after training, layer by layer: {', '.join(map(str, r.solver_steps))}")
    print(table(results, bigram, count))
    if not first:
        return
    about = {"device": device.device_kind, "devices": count, "jax": jax.__version__, "bigram_validation_loss": bigram}
    report = json.dumps(about | {"results": [r.as_json() for r in results]}, indent=1)
    write(output / "results.json", lambda path: path.write_text(report + "\n"))
    write(output / "loss.png", lambda path: plot(results, bigram).savefig(path, dpi=110, format="png"))
    print(f"results: {output / 'results.json'}, {output / 'loss.png'}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    sizes = _sizes(args)
    if sizes["features"] % (2 * sizes["heads"]):
        parser.error(f"argument --features: {sizes['features']} must be an even multiple of --heads, {sizes['heads']}")
    if sizes["warmup"] >= sizes["steps"]:
        parser.error(f"argument --warmup: {sizes['warmup']} must be less than --steps, {sizes['steps']}")
    if args.generate is not None and args.processes is not None:
        parser.error("argument --generate: one process samples; leave --coordinator, --processes, --process-id out")
    attentions = SETS[args.attention]
    output = args.output_dir or Path("outputs") / "train_char_lm" / args.preset
    try:
        join(args.coordinator, args.process_id, args.processes)
        if args.generate is None:
            with contextlib.ExitStack() as stack:
                if jax.process_index() > 0:  # process 0 speaks for all
                    stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                _train_all(args, attentions, output)
        else:
            for attention in attentions:
                _sample(args, output / attention)
    except (RunError, NotImplementedError) as error:  # the latter: an implementation that cannot run here
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        # no way back: what ends a process in order would wait for the others
        print(
            f"{parser.prog}: error: another process is gone, or cannot be reached: {error}", file=sys.stderr, flush=True
        )
        os._exit(1)
    except Stopped as stopped:
        parser.exit(stopped.code, f"{parser.prog}: {stopped}; {again(args.fresh)} goes on from there\n")
    except KeyboardInterrupt:
        how = "" if args.generate is not None else f"; {again(args.fresh)} goes on from the latest checkpoint"
        parser.exit(130, f"{parser.prog}: interrupted{how}\n")


if __name__ == "__main__":
    main()

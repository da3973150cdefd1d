"""``examples/train_char_lm.py``: a run that is killed or stopped loses nothing, sampling is right, errors are clear."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.examples.char_lm import config

EXAMPLE = "train_char_lm"

for requirement in ("matplotlib", "optax", "orbax.checkpoint", "tqdm"):
    pytest.importorskip(requirement)

pytestmark = pytest.mark.usefixtures("as_a_script")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
STEPS = 90
SMALL = (
    f"--features 16 --layers 1 --heads 2 --context 24 --batch 4 --steps {STEPS} --warmup 5 --learning-rate 0.01 "
    "--eval-every 30 --eval-windows 8 --checkpoint-every 7"
).split()


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory):
    """The processes of this file run the same small programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


def start(output: Path, *flags: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / "train_char_lm.py"), "--output-dir", str(output), *SMALL, *flags],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder and the standard output of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("uninterrupted")
    return output, finish(start(output))


def losses(output: Path) -> tuple[list[float], list[list[float]]]:
    result = json.loads((output / "results.json").read_text())["results"][0]
    return result["loss"], result["validation"]


def wait_for_step(checkpoints: Path, step: int) -> None:
    """Returns when there is a checkpoint of the step, or of a later one."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if any(path.name.isdigit() and int(path.name) >= step for path in checkpoints.glob("*")):
            return
        time.sleep(0.002)
    pytest.fail(f"no checkpoint of step {step} in {checkpoints}")


@pytest.mark.slow
def test_killed_and_stopped_run_ends_as_an_uninterrupted_one(finished, tmp_path):
    """SIGKILL at a random step, then Ctrl-C, then to the end: the same losses, bit for bit."""
    process = start(tmp_path)
    step = random.randrange(7, 45)
    wait_for_step(tmp_path / "lla", step)
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"ended before it was killed, at step {step}"
    process.communicate()
    kept = max(int(path.name) for path in (tmp_path / "lla").iterdir() if path.name.isdigit())

    process = start(tmp_path)
    wait_for_step(tmp_path / "lla", kept + 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert f"going on after step {kept} of {STEPS}" in out
    assert "Traceback" not in err
    assert "the same command goes on from there" in err.splitlines()[-1]

    out = finish(start(tmp_path))
    assert "going on after step" in out
    assert losses(tmp_path) == losses(finished[0])
    assert finished[1].splitlines()[-2:-1] == out.splitlines()[-2:-1]  # the bigram's row


@pytest.mark.slow
def test_what_comes_out(finished):
    output, out = finished
    loss, validation = losses(output)
    assert len(loss) == STEPS
    assert np.isfinite(loss).all()
    assert [step for step, _ in validation] == [30, 60, 90]
    assert validation[-1][1] < validation[0][1] < np.log(256)
    assert f"{validation[-1][1]:.4f}" in out
    assert "bigram model" in out
    result = json.loads((output / "results.json").read_text())["results"][0]
    assert set(result["solves"]) == {"iterations", "relative_error", "unconverged"}
    for figures in result["solves"].values():
        assert [step for step, _ in figures] == [30, 60, 90]
    assert f"solves: {result['solves']['iterations'][-1][1]:.1f} steps in the mean, relative error up to " in out
    steps = result["solver_steps_by_layer"]
    assert len(steps) == 1
    assert 1 <= steps[0] <= 32
    assert f"layer by layer: {steps[0]}\n" in out
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not list(output.glob(".*"))  # temporary files


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["lla", "softmax"])
def test_greedy_sampling_is_the_full_forward_pass(example, attention):
    """Through the cache, byte by byte and prompt beside prompt, as if each whole text were read again for each."""
    setting = config(example, attention)
    model = nnx.jit(lambda: example.CharLM(setting, rngs=nnx.Rngs(3)))()
    params = nnx.to_pure_dict(nnx.state(model))
    prompts = [b"import ", b"", b"def generate("]
    sampled, rate = example.generate(setting, params, prompts, 12)
    assert rate > 0
    texts = [b"\0" + prompt + text for prompt, text in zip(prompts, sampled, strict=True)]
    rows = np.stack([np.frombuffer(text.ljust(26, b"\0"), np.uint8) for text in texts]).astype(np.int32)
    likeliest = np.asarray(nnx.jit(model)(jnp.asarray(rows)).argmax(-1)).astype(np.uint8)
    for prompt, text, row in zip(prompts, sampled, likeliest, strict=True):
        assert bytes(row[len(prompt) : len(prompt) + 12]) == text


# 0 in float32, and one over which the logits are not finite
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, None), (1e-300, None), (2e-38, None), (100.0, 1)])
def test_the_likeliest_byte(model, temperature, top_k):
    logits = jax.random.normal(jax.random.key(0), (50, 256), jnp.float32)
    drawn = model.sample(logits, temperature, top_k, jax.random.key(1))
    np.testing.assert_array_equal(drawn, logits.argmax(-1))
    assert (model.sample(logits, 100.0, None, jax.random.key(1)) != drawn).any()


def test_top_k_draws_from_the_likeliest(model):
    logits = jnp.tile(jnp.arange(256, dtype=jnp.float32), (500, 1))
    drawn = set(np.asarray(model.sample(logits, 10.0, 3, jax.random.key(0))).tolist())
    assert drawn == {253, 254, 255}


@pytest.mark.slow
def test_sampling_from_a_checkpoint(example, finished, capsys):
    """It repeats with its seed."""
    printed = []
    for seed in ("0", "0", "1"):
        prompts = ["--generate", "def ", "import os"]
        example.main(["--output-dir", str(finished[0]), *prompts, "--length", "12", "--seed", seed])
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out != printed[2].out
    assert printed[0].out.startswith(f"---- LLA after {STEPS} steps\ndef ")
    assert "\n----\nimport os" in printed[0].out
    assert " tokens/s" in printed[0].err


@pytest.mark.slow
def test_prompt_that_is_no_text(example, finished, capsys):
    """A file's bytes in the shell's argument, cut within a character."""
    flags = ["--output-dir", str(finished[0]), "--length", "1", "--generate"]
    example.main([*flags, os.fsdecode(b"caf\xc3")])
    assert "caf\N{REPLACEMENT CHARACTER}" in capsys.readouterr().out


def test_decay_leaves_out_ridge_norms_and_biases(example, model):
    params = example.abstract_model(config(example, "lla"))[1]
    marked = jax.tree_util.tree_flatten_with_path(model.decayed(params))[0]
    kinds = {decays: {path[-1].key for path, value in marked if value == decays} for decays in (True, False)}
    assert kinds == {True: {"kernel", "embedding"}, False: {"raw_ridge", "scale", "bias"}}


def test_batches_are_a_function_of_seed_and_step(example):
    text = example.Text(np.arange(256, dtype=np.uint8).repeat(9), np.arange(256, dtype=np.uint8), "")
    trainer = example.Trainer(config(example, "softmax"), text)
    again = example.Trainer(config(example, "softmax"), text)
    batches = [
        np.asarray(t.batch(jnp.asarray(text.train), jnp.int32(s))) for t, s in ((trainer, 5), (again, 5), (again, 6))
    ]
    assert batches[0].shape == (2, 25)
    np.testing.assert_array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[1], batches[2])


def test_bigram_loss(example):
    train, pieces = np.frombuffer(b"abababac", np.uint8), np.frombuffer(b"abcz", np.uint8).reshape(2, 2)
    # after a: b three times of four; after c: nothing, so uniform
    expected = -(np.log(4 / 260) + np.log(1 / 256)) / 2
    assert example.bigram_loss(train, pieces) == pytest.approx(expected)


def test_text_is_the_library_alone(example, tmp_path, monkeypatch):
    for i in range(200):
        (tmp_path / f"module{i:03d}.py").write_text(f"x = {i}\n")
    for name in ("package/inner.py", "site-packages/other.py", "dist-packages/other.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f"name = '{name}'\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    text, again = example.load_text(), example.load_text()
    assert text.sha256 == again.sha256
    train, validation = (split.tobytes().split(b"\0")[:-1] for split in (text.train, text.validation))
    assert len(train) + len(validation) == 201
    assert len(validation) > 0
    assert not set(train) & set(validation)
    assert b"packages" not in text.train.tobytes() + text.validation.tobytes()
    (tmp_path / "module007.py").write_text("x = -7\n")
    assert example.load_text().sha256 != text.sha256


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--attention linear", "--attention"),
        ("--preset tpu", "--preset"),
        ("--steps 0", "--steps"),
        ("--steps x", "--steps"),
        ("--features 30 --heads 4", "--features"),
        ("--warmup 50 --steps 50", "--warmup"),
        ("--warmup 0 --learning-rate nan", "--learning-rate"),
        ("--temperature -1", "--temperature"),
        ("--seed -1", "--seed"),
        ("--seed 4294967296", "--seed"),  # 2**32, which is 0 in the 32 bits that jax.random.key takes
        ("--length 0 --generate x", "--length"),
        ("--top-k 0 --generate x", "--top-k"),
        ("--dtype float16", "--dtype"),
    ],
)
def test_bad_flags_name_themselves(example, capsys, flags, named):
    with pytest.raises(SystemExit) as stop:
        example.main(flags.split())
    assert stop.value.code == 2
    assert f"error: argument {named}: " in capsys.readouterr().err


def refusal(example: ModuleType, capsys, output: Path, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        example.main(["--output-dir", str(output), *flags])
    assert stop.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.partition(": ")[2].startswith("error: ")
    return line


# orbax's event loop, when it gives up a damaged checkpoint
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_that_do_not_serve(example, finished, tmp_path, capsys):
    assert "no checkpoint in" in refusal(example, capsys, tmp_path / "none", "--generate", "x")
    assert f"steps {STEPS}, not 121" in refusal(example, capsys, finished[0], *SMALL, "--steps", "121")
    assert "--heads: 4" in refusal(example, capsys, finished[0], "--heads", "4", "--generate", "x")

    shutil.copytree(finished[0], tmp_path / "other text")
    about = next((tmp_path / "other text" / "lla" / str(STEPS) / "config").glob("metadata"))
    about.write_text(json.dumps(json.loads(about.read_text()) | {"text": "0"}))
    assert "text 0, not " in refusal(example, capsys, tmp_path / "other text", *SMALL)

    about.write_text("[1]")
    for flags in (SMALL, ["--generate", "x"]):
        assert "its config is no JSON object" in refusal(example, capsys, tmp_path / "other text", *flags)

    shutil.copytree(finished[0], tmp_path / "damaged")
    for path in (tmp_path / "damaged" / "lla" / str(STEPS) / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for flags in (SMALL, ["--generate", "x"]):
        assert "cannot read the checkpoint" in refusal(example, capsys, tmp_path / "damaged", *flags)


def test_folder_that_cannot_be_written(example, tmp_path, monkeypatch, capsys):
    """It is said before anything is trained."""
    monkeypatch.setattr(example, "train", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "softmax").write_text("")
    for folder in (tmp_path / "file", tmp_path / "part", Path("/proc/nope")):
        assert "argument --output-dir: cannot write in " in refusal(example, capsys, folder, "--attention", "both")


def test_implementation_that_cannot_run_here(example, tmp_path, capsys):
    if jax.default_backend() != "cpu":
        pytest.skip("Triton may run here")
    line = refusal(example, capsys, tmp_path, *SMALL, "--implementation", "triton")
    assert 'implementation="triton" cannot serve this call' in line


@pytest.mark.slow
def test_fresh_starts_over(example, finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished[0], tmp_path / "run")

    def train(config, text, checkpoints, checkpoint_every, stop, placement):
        raise example.RunError(f"the latest is {checkpoints.latest}")

    monkeypatch.setattr(example, "train", train)
    assert f"the latest is {STEPS}" in refusal(example, capsys, tmp_path / "run", *SMALL)
    assert "the latest is None" in refusal(example, capsys, tmp_path / "run", *SMALL, "--fresh")


@pytest.mark.parametrize("attention", ["lla", "softmax", "linear"])
def test_transformer_is_causal(import_example, attention):
    transformer = import_example("common.transformer")
    model = nnx.jit(lambda: transformer.Transformer(attention, 16, 1, 2, rngs=nnx.Rngs(0)))()
    x = np.random.default_rng(0).standard_normal((2, 20, 16)).astype(np.float32)
    changed = x.copy()
    changed[:, 13] += 1.0
    forward = nnx.jit(type(model).__call__)
    before, after = np.asarray(forward(model, x)), np.asarray(forward(model, changed))
    np.testing.assert_allclose(before[:, :13], after[:, :13], rtol=0, atol=1e-6)
    assert np.abs(before[:, 13:] - after[:, 13:]).min(axis=(0, 2)).all()

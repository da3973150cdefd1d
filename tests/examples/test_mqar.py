"""``examples/mqar.py``: the data are the task's, every method trains, a sweep goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

EXAMPLE = "mqar"

for requirement in ("matplotlib", "optax", "orbax.checkpoint", "tqdm"):
    pytest.importorskip(requirement)

pytestmark = pytest.mark.usefixtures("as_a_script")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SMALL = [
    "--vocabulary",
    "16",
    "--widths",
    "8",
    "--lengths",
    "16",
    "--pairs",
    "2",
    "--batch",
    "8",
    "--steps",
    "20",
    "--rates",
    "0.003",
    "0.01",
]


def draw(example: ModuleType, seed: int, *sizes: int) -> list[np.ndarray]:
    data = jax.jit(example.recall_data, static_argnums=(1, 2, 3, 4))(jax.random.key(seed), *sizes)
    return [np.asarray(x) for x in data]


@pytest.mark.parametrize(("length", "pairs", "vocabulary"), [(64, 4, 8192), (17, 2, 9)])
def test_every_answer_is_in_the_context(example, length, pairs, vocabulary):
    tokens, places, answers = draw(example, 0, 50, length, pairs, vocabulary)
    assert tokens.shape == (50, length)
    assert places.shape == answers.shape == (50, pairs)
    assert tokens.min() >= 0
    assert tokens.max() < vocabulary
    for sequence, queries, due in zip(tokens, places, answers, strict=True):
        context = dict(sequence[: 2 * pairs].reshape(pairs, 2))  # the keys are distinct, so nothing is lost
        assert len(context) == len(set(context.values())) == len(set(queries)) == pairs
        assert all(0 < key < vocabulary // 2 <= value for key, value in context.items())
        assert queries.min() >= 2 * pairs
        assert queries.max() < length
        assert [context[key] for key in sequence[queries]] == due.tolist()


def test_distances_follow_the_power_law(example):
    """The first key's, which is drawn before any place is taken."""
    places = draw(example, 1, 20_000, 24, 4, 64)[1][:, 0]
    weights = np.arange(1, 9) ** (example.POWER - 1.0)
    found = np.bincount((places - 8) // 2, minlength=8) / len(places)
    # four standard deviations of a frequency near 1/3 in 20 000 draws
    np.testing.assert_allclose(found, weights / weights.sum(), atol=4 * np.sqrt(2 / 9 / 20_000))


def test_data_is_a_function_of_the_key(example):
    one, same, other = (draw(example, seed, 50, 17, 2, 9)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.slow
def test_predictions_are_causal(example):
    """A prediction depends on nothing after its place; of the other attentions test_train_char_lm.py tells."""
    config = example.Config(**example.PRESETS["small"], implementation=None, seed=0)
    model = nnx.jit(lambda: example.RecallModel("lla", 8, 16, config, rngs=nnx.Rngs(0)))()
    tokens = np.random.default_rng(0).integers(0, config.vocabulary, (2, 16))
    changed = tokens.copy()
    changed[:, 11:] = (changed[:, 11:] + 1) % config.vocabulary
    forward = nnx.jit(type(model).__call__)
    places = jnp.tile(jnp.arange(16), (2, 1))
    before, after = np.asarray(forward(model, tokens, places)), np.asarray(forward(model, changed, places))
    np.testing.assert_allclose(before[:, :11], after[:, :11], rtol=0, atol=1e-6)
    assert (np.abs(before - after).max(axis=2)[:, 11:] > 1e-4).all()


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "mqar.py"), *SMALL, *flags],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_sweep(example, tmp_path, capsys):
    """From the command: every method trains with every rate, and what is finished is not trained again."""
    done = run("--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "a small version of the task" in done.stdout
    assert (tmp_path / "mqar.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    finished = json.loads((tmp_path / "results.json").read_text())["finished"]
    assert list(finished) == [f"{a} width 8 length 16" for a in ("lla", "parallax", "softmax", "linear")]
    for result in finished.values():
        assert len(result["validation_accuracy_by_rate"]) == 2
        assert 0 <= result["accuracy"] <= 1
        assert np.mean(result["loss"][-5:]) < np.mean(result["loss"][:5])
        assert f"{result['accuracy']:.4f}" in done.stdout
        assert result["seconds"] > 0
    assert f"fastest steps: LLA {finished['lla width 8 length 16']['seconds']:.1f}, Parallax" in done.stdout

    flags = [*SMALL, "--output-dir", str(tmp_path)]
    example.main(flags)  # nothing is left to train
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out == done.stdout

    for change, message in ((["--steps", "21"], "steps 20, not 21"), (["--seed", "1"], "seed 0, not 1")):
        with pytest.raises(SystemExit) as stop:
            example.main([*flags, *change])
        assert stop.value.code == 1
        assert message in capsys.readouterr().err
    good = json.loads((tmp_path / "results.json").read_text())
    entry = finished["lla width 8 length 16"]
    damaged = [good | {"finished": {"lla": x}} for x in (1, entry | {"rate": "x"}, entry | {"loss": [1.0, [2.0]]})]
    for text in ("{", "[]", *map(json.dumps, [good | {"config": []}, good | {"finished": []}, *damaged])):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(SystemExit) as stop:
            example.main(flags)
        assert stop.value.code == 1
        assert "cannot read" in capsys.readouterr().err


def test_committed_results_are_read(example, tmp_path, capsys):
    shutil.copy(ROOT / "benchmarks" / "results" / "mqar_h200.json", tmp_path / "results.json")
    methods = ["lla", "softmax", "linear"]  # those that the committed file has
    example.main(["--preset", "full", "--attention", *methods, "--output-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "results: " in printed
    assert "seconds" not in printed  # that file has none


def test_interrupted_when_fresh(example, tmp_path, monkeypatch, capsys):
    """What the command found there is gone before the first training ends, and it says how to go on."""

    def interrupt(jobs):
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "run_all", interrupt)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        example.main([*SMALL, "--output-dir", str(tmp_path), "--fresh"])
    assert stop.value.code == 130
    assert "the same command without --fresh goes on after" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written(example, tmp_path, monkeypatch, capsys):
    """It is said before anything is trained."""
    monkeypatch.setattr(example, "run_all", lambda jobs: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inner", Path("/proc/nope")):
        with pytest.raises(SystemExit) as stop:
            example.main([*SMALL, "--output-dir", str(folder)])
        assert stop.value.code == 1
        assert f"argument --output-dir: cannot write in {folder}: " in capsys.readouterr().err


def test_every_rate_diverges(import_example, example, tmp_path, monkeypatch, capsys):
    nothing = import_example("common.sweep").Outcome(np.full((2, 20), 1.0), np.full(2, np.nan), np.full(2, np.nan), 1.0)
    monkeypatch.setattr(example, "run_all", lambda jobs: [(jobs[0][0], nothing)])
    with pytest.raises(SystemExit) as stop:
        example.main([*SMALL, "--output-dir", str(tmp_path)])
    assert stop.value.code == 1
    assert "error: every learning rate diverged; lower --rates" in capsys.readouterr().err


def test_dtype_by_width(example):
    """auto is bfloat16 where a head is wide, and what the full size takes."""
    assert example.PRESETS["full"]["dtype"] == "auto"
    config = example.Config(**example.PRESETS["full"], implementation=None, seed=0)
    for width, expected in ((64, "float32"), (128, "bfloat16"), (256, "bfloat16")):
        model = nnx.eval_shape(lambda width=width: example.RecallModel("lla", width, 64, config, rngs=nnx.Rngs(0)))
        assert model.transformer.dtype == expected


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--preset large", "--preset"),
        ("--pairs 4 8", "--pairs"),
        ("--lengths 16 --pairs 5", "--pairs"),
        ("--vocabulary 9", "--vocabulary"),
        ("--lengths 32 32 --pairs 2 8", "--lengths"),  # job names have no pairs
        ("--widths 64 32 64", "--widths"),
        ("--rates 0.001 1e-3", "--rates"),
        ("--rates 0", "--rates"),
        ("--rates inf", "--rates"),
        ("--batch -1", "--batch"),
        ("--seed -1", "--seed"),
        ("--seed 4294967296", "--seed"),  # 2**32, which is 0 in the 32 bits that jax.random.key takes
        ("--dtype float16", "--dtype"),
        ("--implementation cuda", "--implementation"),
    ],
)
def test_bad_flags_name_themselves(example, capsys, flags, named):
    with pytest.raises(SystemExit) as stop:
        example.main(flags.split())
    assert stop.value.code == 2
    assert f"error: argument {named}: " in capsys.readouterr().err

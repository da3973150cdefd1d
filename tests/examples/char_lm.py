"""What the tests of ``examples/train_char_lm.py`` share."""

from types import ModuleType

NAMES = ("loss", "validation", "seconds", "iterations", "relative_error", "unconverged")


def config(example: ModuleType, attention: str, **changes):
    sizes = {
        "features": 16,
        "layers": 1,
        "heads": 2,
        "context": 24,
        "batch": 2,
        "steps": 9,
        "warmup": 1,
        "eval_windows": 4,
    }
    given = example.PRESETS["cpu"] | sizes | changes
    return example.Config(attention, None, seed=0, text="", **given)

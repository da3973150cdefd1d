"""The text that every machine has: the sources of Python's own standard library, as bytes, split by file."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VOCABULARY = 256  # a token is a byte
END = 0  # between files; no source file contains it


@dataclass(frozen=True)
class Text:
    """Both splits as one string of bytes each, and the hash of all of it."""

    train: np.ndarray
    validation: np.ndarray
    sha256: str


def load_text() -> Text:
    """Reads the standard library, without what is installed beside it (site-packages), in sorted order.

    A file belongs to the validation split if the hash of its path is a multiple of 20, whatever else there is: about
    5 % of the files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = ("site-packages", "dist-packages")
    folders = [path for path in root.iterdir() if path.is_dir() and path.name not in installed]
    paths = [*root.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    names = sorted(path.relative_to(root).as_posix() for path in paths if path.is_file())
    splits: tuple[list[bytes], list[bytes]] = ([], [])
    for name in names:
        source = (root / name).read_bytes()
        if END in source:  # one of the parser's own tests, say
            continue
        in_validation = int.from_bytes(hashlib.sha256(name.encode()).digest()) % 20 == 0
        splits[in_validation].append(source + bytes([END]))
    train, validation = (b"".join(split) for split in splits)
    digest = hashlib.sha256(train + validation).hexdigest()
    return Text(np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8), digest)


def windows(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """``(count, length)`` of evenly spaced pieces of a text."""
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return tokens[starts[:, None] + np.arange(length)]


def bigram_loss(train: np.ndarray, pieces: np.ndarray) -> float:
    """Nats per byte, on pieces ``(n, length)``, of the add-one smoothed bigram model of a text."""
    pairs = train[:-1].astype(np.int32) * VOCABULARY + train[1:]
    counts = np.bincount(pairs, minlength=VOCABULARY**2).reshape(VOCABULARY, VOCABULARY) + 1
    log_probability = np.log(counts / counts.sum(axis=1, keepdims=True))
    return float(-log_probability[pieces[:, :-1], pieces[:, 1:]].mean())

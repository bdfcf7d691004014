"""Fixtures that every test may use: no network, one thread, and a tiny random model of the embedded architecture."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest
from PIL import Image

for _name in (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
):  # read when torch is imported, which no test module does before this
    os.environ.setdefault(_name, "1")
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for another machine fails at once, instead of hanging or passing by luck."""
    real = socket.socket.connect

    def connect(self, address):
        if self.family == getattr(socket, "AF_UNIX", None) or (
            isinstance(address, tuple) and str(address[0]) in ("127.0.0.1", "localhost", "::1")
        ):
            return real(self, address)
        raise AssertionError(f"a test tried to reach {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="session")
def nano_folder(tmp_path_factory):
    """A saved checkpoint of the embedded architecture with random weights."""
    import foveate

    folder = tmp_path_factory.mktemp("models") / "random-nano"
    foveate.load("nano", random_weights=True, device="cpu").save(folder)
    return folder


@pytest.fixture(scope="session")
def vlm(nano_folder):
    """That checkpoint, loaded. Shared by all tests: do not change it."""
    import foveate

    return foveate.load(nano_folder, device="cpu")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder with a.png (96 x 64) and b.jpg (64 x 64)."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "b.jpg")
    return folder


@pytest.fixture
def run(capsys):
    """Call the command; returns (exit code, stdout, stderr)."""
    from foveate.cli import main

    def call(*argv: object) -> tuple[int, str, str]:
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def tinies(tmp_path_factory):
    """The tiny checkpoints (files only) of the families of transformers, by family."""
    from families_hf import FAMILIES, tiny

    with pytest.MonkeyPatch.context() as patch:
        yield {family: tiny(family, tmp_path_factory.mktemp(family), patch) for family in FAMILIES}


@pytest.fixture
def quick_calibration(monkeypatch):
    """`foveate plan --calibrate` with few and small operations."""
    from foveate.bench import calibrate, meter

    for name in ("PRODUCTS", "READINGS"):
        monkeypatch.setattr(calibrate, name, getattr(calibrate, name)[:2])
    small = {"LENGTHS": (16, 32), "CACHED": (16, 32), "UNPACKED": (128, 64)}
    for name, value in (small | {"WEIGHTS": ("rtn(bits=4)",), "CACHES": ("int8",)}).items():
        monkeypatch.setattr(calibrate, name, value)
    monkeypatch.setattr(meter, "READ", 1 << 16)

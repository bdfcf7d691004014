"""A disk that refuses: one clear line, the old files as they were, nothing left behind. Refusals are real ones."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import families
from foveate.cache.kvquant_levels import calibrate
from foveate.cli import main
from foveate.cli.common import new_file
from foveate.disk import plain_errors
from foveate.errors import CheckpointError, InputError
from foveate.recipe import Recipe
from foveate.train.checkpoint import TrainState, save_checkpoint
from foveate.vlm import Request
from foveate.weights import export
from foveate.weights.lowrank import save_adapter
from foveate.weights.state import State
from goldens_io import goldens_dir


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system lets no file of this process grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tiny():
    return families.tiny("llava")


def checkpoint(step: int) -> TrainState:
    where = {"step": step, "stage": 0, "recipe_hash": "x"}
    return TrainState({"w": torch.full((4000,), float(step))}, {"m": torch.zeros(4000)}, where)


def writers(vlm, folder: Path):
    """Everything that writes tensors: name -> write(turn), which writes another content every turn."""
    low = Recipe.parse("rtn(group=16) + eora(rank=2, space=plain)").apply(vlm, quiet=True)
    kvquant = Recipe.parse("kvquant(bits=4)").methods[0]
    requests = [[Request("one", families.picture(1))], [Request(f"two {'x' * 40}", families.picture(2))]]
    smaller = [vlm, Recipe.parse("rtn(group=16, symmetric=true)").apply(vlm, quiet=True)]
    state = State(folder / "state", {})

    def adapter(turn: int) -> None:
        for layer in low.model.modules():
            if hasattr(layer, "lora_A"):
                layer.lora_A.data.fill_(turn)
        save_adapter(low, folder / "adapter")

    return {
        "vlm": lambda turn: smaller[turn].save(folder / "vlm"),
        "export": lambda turn: export.save(smaller[turn], folder / "export"),
        "adapter": adapter,
        "kvquant": lambda turn: calibrate(kvquant, vlm, requests[turn], folder / "levels.safetensors"),
        "state": lambda turn: state.put_block("llm", 0, nn.Linear(64, 64).requires_grad_(False)),
        "train": lambda turn: save_checkpoint(folder / "train", checkpoint(turn), keep=1),
    }


@pytest.mark.parametrize("size", [100, 2000])
@pytest.mark.parametrize("name", ["vlm", "export", "adapter", "kvquant", "state", "train"])
def test_what_the_disk_refuses_leaves_the_old_files(tiny, tmp_path, name, size):
    write = writers(tiny, tmp_path)[name]
    write(0)
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match=os.strerror(errno.EFBIG)) as caught, files_of_at_most(size):
        write(1)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
    assert content(tmp_path) == before
    write(1)
    assert content(tmp_path) != before


def test_a_new_model_that_the_disk_refuses_is_not_there(tmp_path, capsys):
    source = goldens_dir("nvila") / "nvila" / "ckpt"
    with files_of_at_most(5000):
        for command in (
            ["convert", str(source), str(tmp_path / "a"), "--layout", "flat"],
            ["compress", str(source), "--recipe", "rtn(group=16)", "-o", str(tmp_path / "b")],
            ["world", "show", "--skill", "shape", "--out", str(tmp_path / "c.png")],
        ):
            assert main(command) == 2
            said = capsys.readouterr().err.strip().splitlines()[-1]
            assert "could not write" in said and os.strerror(errno.EFBIG) in said
    assert list(tmp_path.iterdir()) == []


def test_errors_of_rust_libraries_count_too(tmp_path, tiny):
    said = f"could not write it: {os.strerror(errno.EFBIG)}; try later"
    with pytest.raises(CheckpointError, match=said), files_of_at_most(100), plain_errors("it", tmp_path, "try later"):
        tiny.tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (ValueError("a"), InputError("b"), KeyboardInterrupt()):
        with pytest.raises(type(error)), plain_errors("it", tmp_path, "try later"):
            raise error
        with pytest.raises(type(error)), new_file(tmp_path / "new") as path:
            path.write_text("half")
            raise error
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_what_was_saved(tiny, tmp_path):
    tiny.save(tmp_path / "out")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {modes["config.json"]}, modes


ON_A_SMALL_DISK = """
mount -t tmpfs -o size={size} none {disk} && cp -r {old} {disk}/out || exit 3
{python} -c "
import foveate
vlm = foveate.load('{disk}/out', device='cpu')
try:
    vlm.save('{disk}/out')
except foveate.errors.CheckpointError as error:
    print(error)
"
diff -r {old} {disk}/out && ls -A {disk}
"""


@pytest.mark.slow
def test_a_disk_that_is_full(tiny, tmp_path):
    """A file system in memory with room for one and a half models."""
    tiny.save(tmp_path / "old")
    (tmp_path / "disk").mkdir()
    size = sum(map(len, content(tmp_path / "old").values())) * 3 // 2
    script = ON_A_SMALL_DISK.format(size=size, disk=tmp_path / "disk", old=tmp_path / "old", python=sys.executable)
    unshare = shutil.which("unshare")
    command = [unshare or "unshare", "--map-root-user", "--mount", "sh", "-c"]
    attempt = [*command, "mount -t tmpfs none /tmp"]
    if not unshare or subprocess.run(attempt, capture_output=True, check=False).returncode:
        pytest.skip("this system lets no test mount a disk of its own")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([*command, script], capture_output=True, text=True, env=environment, check=False)
    said, *left = done.stdout.splitlines()
    full = rf"{os.strerror(errno.ENOSPC)} \(\d MiB free\)"
    assert re.fullmatch(rf"could not write {tmp_path}/disk/out: {full}; nothing was changed", said), done
    assert left == ["out"]

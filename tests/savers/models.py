"""What is saved into a mount, for servers of one's own."""

import hashlib
import os

import numpy as np
from safetensors.numpy import load_file, save_file

MIB = 1 << 20
# So little that a model does not fit.
SMALL = ("--memory", "64MiB", "--part-size", "5MiB", "--close-timeout", "30s")


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_what_is_saved(server):
    """What was saved is there, for a mount that knows nothing of it, and for MLflow's own client."""
    folder = server.run / "model"
    folder.mkdir()
    tensors = {f"layer{index}": np.full((MIB,), index, np.float32) for index in range(24)}
    save_file(tensors, folder / "model.safetensors")
    np.savez(folder / "arrays.npz", one=np.arange(MIB), two=np.ones(5))
    (folder / "a note ü+b.txt").write_text("small")
    (folder / "nothing").touch()
    # Larger than all memory that the mount may take.
    noise = np.random.default_rng(1).bytes(100 * MIB)
    (folder / "large.bin").write_bytes(noise)
    server.cold(*SMALL)
    folder = server.run / "model"
    names = ["a note ü+b.txt", "arrays.npz", "large.bin", "model.safetensors", "nothing"]
    assert sorted(os.listdir(folder)) == names
    for name in names:
        assert digest(server.download(f"model/{name}")) == digest(folder / name), name
    assert (load_file(folder / "model.safetensors")["layer23"] == 23).all()
    assert (folder / "large.bin").read_bytes() == noise
    assert np.load(folder / "arrays.npz")["one"][-1] == MIB - 1
    assert (folder / "nothing").stat().st_size == 0

"""A pyfunc model with a large artifact, saved into the mount and loaded from there."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

MIB = 1 << 20

MODEL = """
import mlflow.pyfunc
from safetensors import safe_open

class Model(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.path = context.artifacts["weights"]

    def predict(self, context, model_input, params=None):
        with safe_open(self.path, "np") as file:
            return [float(file.get_tensor("layer5")[0])]

mlflow.models.set_model(Model())
"""
SAVE = """
import mlflow.pyfunc, sys
mlflow.pyfunc.save_model(sys.argv[1], python_model=sys.argv[2], artifacts={"weights": sys.argv[3]},
                         pip_requirements=["mlflow"])
"""
LOAD = """
import mlflow.pyfunc, sys
print(mlflow.pyfunc.load_model(sys.argv[1]).predict([[0]])[0])
"""


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    tensors = {f"layer{index}": np.full((8 * MIB,), index, np.float32) for index in range(8)}
    save_file(tensors, tmp_path / "weights.safetensors")
    return [tmp_path / "model.py", tmp_path / "weights.safetensors"]


def read_from_store(mount):
    return json.loads((mount.path / ".mlfs" / "status").read_text())["store"]["bytes_in"]


def test_only_what_is_touched_is_fetched(saved, arguments):
    path = saved.folder / "model"
    subprocess.run([sys.executable, "-c", SAVE, path, *arguments], check=True, timeout=300)
    saved.mount.cold()
    done = subprocess.run([sys.executable, "-c", LOAD, path], check=True, timeout=300,
                          stdout=subprocess.PIPE, text=True)
    assert done.stdout.splitlines()[-1] == "5.0"
    # One tensor of 32 MiB of the eight, and some small files.
    assert read_from_store(saved.mount) < 34 * MIB


def test_a_model_that_is_half_written_does_not_load(saved, arguments):
    path = saved.folder / "model"
    saving = subprocess.Popen([sys.executable, "-c", SAVE, path, *arguments])
    weights = path / "artifacts" / "weights.safetensors"
    deadline = time.monotonic() + 120
    while not (weights.exists() and weights.stat().st_size > 32 * MIB):
        assert saving.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    saving.send_signal(signal.SIGKILL)
    saving.wait()
    done = subprocess.run([sys.executable, "-c", LOAD, path], timeout=300, capture_output=True,
                          text=True)
    assert done.returncode != 0 and "MLmodel" in done.stderr
    # What was killed is not published as if it were whole: it can only be discarded, or written anew.
    assert "model/MLmodel" not in saved.names()
    subprocess.run(["rm", "-r", path], check=True, timeout=60)
    subprocess.run([sys.executable, "-c", SAVE, path, *arguments], check=True, timeout=300)
    done = subprocess.run([sys.executable, "-c", LOAD, path], check=True, timeout=300,
                          stdout=subprocess.PIPE, text=True)
    assert done.stdout.splitlines()[-1] == "5.0"
    assert os.listdir(path / "artifacts") == ["weights.safetensors"]

"""Runs whose artifacts an MLflow server proxies: from a directory of its own, and from S3."""

import errno
import hashlib
import os

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from servers import Server

MIB = 1 << 20
# So little that a model does not fit.
SMALL = ("--memory", "64MiB", "--part-size", "5MiB", "--close-timeout", "30s")


@pytest.fixture(scope="module", params=["directory", "s3"])
def proxied(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("proxied")
    destination = {"directory": str(folder / "artifacts"), "s3": f"s3://mlflow/{folder.name}"}
    proxied = Server(folder, "--artifacts-destination", destination[request.param])
    proxied.kind = request.param
    proxied.mount(*SMALL)
    yield proxied
    proxied.stop()


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_what_is_saved_is_what_mlflow_downloads(proxied):
    folder = proxied.run / "model"
    folder.mkdir()
    tensors = {f"layer{index}": np.full((MIB,), index, np.float32) for index in range(24)}
    save_file(tensors, folder / "model.safetensors")
    np.savez(folder / "arrays.npz", one=np.arange(MIB), two=np.ones(5))
    (folder / "a note ü+b.txt").write_text("small")
    (folder / "nothing").touch()
    # Larger than all memory that the mount may take.
    noise = np.random.default_rng(1).bytes(100 * MIB)
    (folder / "large.bin").write_bytes(noise)
    proxied.cold(*SMALL)
    folder = proxied.run / "model"
    names = ["a note ü+b.txt", "arrays.npz", "large.bin", "model.safetensors", "nothing"]
    assert sorted(os.listdir(folder)) == names
    for name in names:
        assert digest(proxied.download(f"model/{name}")) == digest(folder / name), name
    assert (load_file(folder / "model.safetensors")["layer23"] == 23).all()
    assert (folder / "large.bin").read_bytes() == noise
    assert np.load(folder / "arrays.npz")["one"][-1] == MIB - 1
    assert (folder / "nothing").stat().st_size == 0


def test_what_mlflow_logs_is_there_and_one_tensor_of_it_costs_what_it_must(proxied):
    tensors = {f"layer{index}": np.full((4 * MIB,), index, np.float32) for index in range(8)}
    logged = proxied.folder / "logged.safetensors"
    save_file(tensors, logged)
    proxied.client("MlflowClient().log_artifact(sys.argv[2], sys.argv[3], 'logged')",
                   proxied.run_id, logged)
    proxied.cold(*SMALL)
    before = proxied.bodies()
    with safe_open(proxied.run / "logged" / "logged.safetensors", "np") as file:
        assert (file.get_tensor("layer5") == 5).all()
    told = proxied.store()
    assert told["bytes_in"] < 17 * MIB, told
    # S3 sends them itself.
    assert (proxied.bodies() > before) == (proxied.kind == "directory")


def test_names_move_go_and_come_back(proxied):
    folder = proxied.run / "names"
    folder.mkdir()
    (folder / "first").write_bytes(b"1" * (6 * MIB))
    (folder / "first").rename(folder / "second")
    assert sorted(os.listdir(folder)) == ["second"]
    (folder / "second").write_bytes(b"short")
    with open(folder / "second", "ab") as file:
        file.write(b" and longer")
    proxied.cold(*SMALL)
    assert (folder / "second").read_bytes() == b"short and longer"
    os.rename(folder, proxied.run / "moved")
    assert sorted(os.listdir(proxied.run / "moved")) == ["second"]
    assert not folder.exists()
    (proxied.run / "moved" / "second").unlink()
    (proxied.run / "moved").rmdir()
    proxied.cold(*SMALL)
    for name in ["moved", "names"]:
        # SeaweedFS goes on listing directories that have nothing in them, and the server has no way
        # to remove those.
        if proxied.kind == "directory":
            assert not (proxied.run / name).exists()
        elif (proxied.run / name).exists():
            assert os.listdir(proxied.run / name) == []
    # What the server would take for another name.
    for name in ["a#b", "100%41"]:
        with pytest.raises(OSError) as caught:
            (proxied.run / name).write_text("lost?")
        assert caught.value.errno == errno.EINVAL, name


def test_a_model_is_saved_and_loaded(proxied):
    script = """
import mlflow.sklearn, sklearn.linear_model
path = sys.argv[2]
model = sklearn.linear_model.LinearRegression().fit([[1], [2]], [2, 4])
mlflow.sklearn.save_model(model, path)
print(mlflow.pyfunc.load_model(path).predict([[3]])[0], end="")
"""
    told = proxied.client(script, proxied.run / "sklearn")
    assert round(float(told)) == 6
    proxied.cold(*SMALL)
    script = "print(mlflow.pyfunc.load_model(sys.argv[2]).predict([[5]])[0], end='')"
    assert round(float(proxied.client(script, proxied.run / "sklearn"))) == 10
    # As does MLflow by its own way.
    uri = f"runs:/{proxied.run_id}/sklearn"
    assert round(float(proxied.client(script, uri))) == 10

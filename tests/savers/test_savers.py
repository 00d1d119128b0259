"""Real savers save through the mount, and their loaders load, mapping files where they do."""

import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import h5py
import joblib
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file, save_file


@pytest.fixture(scope="module")
def array():
    return np.random.default_rng(1).random((1500, 1000))


def test_safetensors(saved, array):
    path = saved.folder / "model.safetensors"
    save_file({"weight": array, "bias": array[0].copy()}, path)
    saved.check("model.safetensors")
    assert (load_file(path)["weight"] == array).all()
    with safe_open(path, framework="numpy") as file:
        assert (file.get_slice("weight")[10:20] == array[10:20]).all()


def test_safetensors_in_shards(saved, array):
    folder = saved.folder / "model"
    folder.mkdir()
    names = []
    for index in range(3):
        name = f"model-{index + 1:05}-of-00003.safetensors"
        save_file({f"layer{index}": array + index}, folder / name)
        names.append(f"model/{name}")
    (folder / "model.safetensors.index.json").write_text("{}")
    saved.check(*names, "model/model.safetensors.index.json")
    for index, name in enumerate(names):
        assert (load_file(saved.folder / name)[f"layer{index}"] == array + index).all()


def test_numpy_save(saved, array):
    np.save(saved.folder / "a.npy", array)
    saved.check("a.npy")
    for mode in [None, "r", "c"]:
        assert (np.load(saved.folder / "a.npy", mmap_mode=mode) == array).all()


def test_numpy_savez(saved, array):
    np.savez(saved.folder / "a.npz", x=array, y=array[:10])
    np.savez_compressed(saved.folder / "b.npz", x=array)
    saved.check("a.npz", "b.npz")
    with np.load(saved.folder / "a.npz") as file:
        assert (file["x"] == array).all() and (file["y"] == array[:10]).all()
    with np.load(saved.folder / "b.npz") as file:
        assert (file["x"] == array).all()


def test_numpy_open_memmap(saved, array):
    path = saved.folder / "a.npy"
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=array.dtype, shape=array.shape)
    mapped[:] = array
    mapped.flush()
    del mapped
    subprocess.run(["sync", "-f", path], check=True)
    saved.mount.cold()
    saved.check("a.npy")
    assert (np.load(path) == array).all()


def test_joblib_and_pickle(saved, array):
    joblib.dump({"a": array}, saved.folder / "a.joblib")
    with open(saved.folder / "a.pickle", "wb") as file:
        pickle.dump(array, file)
    saved.check("a.joblib", "a.pickle")
    assert (joblib.load(saved.folder / "a.joblib", mmap_mode="r")["a"] == array).all()
    with open(saved.folder / "a.pickle", "rb") as file:
        assert (pickle.load(file) == array).all()


def test_h5py(saved, array):
    path = saved.folder / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = array
        file["y"] = array[:10]
    with h5py.File(path, "a") as file:
        file["z"] = array[:20]
    saved.check("a.h5")
    with h5py.File(path, "r") as file:
        assert (file["x"][:] == array).all() and (file["z"][5] == array[5]).all()


def test_onnx_with_external_data(saved, array):
    tensors = [numpy_helper.from_array(array[i * 50:(i + 1) * 50], name=f"t{i}") for i in range(20)]
    model = helper.make_model(helper.make_graph([], "graph", [], [], initializer=tensors))
    onnx.save_model(model, saved.folder / "m.onnx", save_as_external_data=True,
                    all_tensors_to_one_file=True, location="m.data", size_threshold=0)
    saved.check("m.data", "m.onnx")
    loaded = onnx.load(saved.folder / "m.onnx")
    assert (numpy_helper.to_array(loaded.graph.initializer[7]) == array[350:400]).all()


def test_zip(saved, array):
    with zipfile.ZipFile(saved.folder / "a.zip", "w") as archive:
        archive.writestr("one", array.tobytes())
        archive.writestr("two", b"two")
    saved.check("a.zip")
    with zipfile.ZipFile(saved.folder / "a.zip") as archive:
        assert archive.read("two") == b"two" and archive.testzip() is None


def test_copies_moves_and_shells(saved, tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "one").write_bytes(os.urandom(100_000))
    (source / "sub" / "two").write_bytes(os.urandom(6_000_000))
    shutil.copytree(source, saved.folder / "tree")
    shutil.copy2(source / "one", saved.folder / "copy")
    shutil.move(saved.folder / "copy", saved.folder / "moved")
    shutil.move(str(source / "sub" / "two"), saved.folder / "moved2")
    subprocess.run("echo a > f; echo b >> f; dd if=moved of=dd bs=7k 2>/dev/null; "
                   "cat f dd > all; tar cf t.tar tree; mkdir x; tar xf t.tar -C x; rm t.tar",
                   shell=True, check=True, cwd=saved.folder)
    saved.check("all", "dd", "f", "moved", "moved2", "tree/one", "tree/sub/two",
                "x/tree/one", "x/tree/sub/two")


def test_mlflow_sklearn(saved, tmp_path):
    import mlflow
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression().fit([[0.0], [1.0], [2.0], [3.0]], [0, 0, 1, 1])
    path = saved.folder / "model"
    mlflow.sklearn.save_model(model, path)
    assert "model/MLmodel" in saved.names()
    assert saved.uploads() == []
    saved.mount.cold()
    assert list(mlflow.sklearn.load_model(path).predict([[3.0]])) == [1]

    name = f"savers-{saved.run_id}"
    version = mlflow.register_model(f"runs:/{saved.run_id}/model", name)
    # A client that does not use the mount.
    script = ("import sys, mlflow.pyfunc, pandas; "
              "model = mlflow.pyfunc.load_model(sys.argv[1]); "
              "print(list(model.predict(pandas.DataFrame([[3.0]]))))")
    loaded = subprocess.run([sys.executable, "-c", script, f"models:/{name}/{version.version}"],
                            check=True, capture_output=True, text=True, cwd=tmp_path)
    assert loaded.stdout.strip().endswith("[1]") or "1" in loaded.stdout.splitlines()[-1]


def test_a_run_is_listed_and_found(saved, mount):
    assert saved.run_id in os.listdir(mount.path)
    (saved.folder / "seen.txt").write_text("seen")
    import mlflow
    listed = mlflow.MlflowClient().list_artifacts(saved.run_id)
    assert [(file.path, file.file_size) for file in listed] == [("seen.txt", 4)]

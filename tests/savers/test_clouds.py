"""Runs whose artifacts lie in Azure's or Google's store, as far as their emulators go."""

import errno
import os
import time

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from models import MIB, SMALL, check_what_is_saved
from servers import Server, expect_log


def cloud(tmp_path_factory, name, root):
    folder = tmp_path_factory.mktemp(name)
    cloud = Server(folder, "--default-artifact-root", root, "--no-serve-artifacts")
    cloud.mount(*SMALL)
    yield cloud
    cloud.stop()


@pytest.fixture(scope="module")
def azure(tmp_path_factory):
    yield from cloud(tmp_path_factory, "azure",
                     "wasbs://mlflow@devstoreaccount1.blob.core.windows.net/root")


@pytest.fixture(scope="module")
def google(tmp_path_factory):
    """Its emulator takes no objects by the API that the mount writes with, and can only be read."""
    yield from cloud(tmp_path_factory, "google", "gs://mlflow/root")


def test_what_is_saved_is_what_mlflow_downloads(azure):
    check_what_is_saved(azure)
    written = (azure.run / "model" / "large.bin").stat().st_mtime
    assert abs(written - time.time()) < 300


@pytest.mark.parametrize("name", ["azure", "google"])
def test_one_tensor_of_what_mlflow_logs_costs_what_it_must(name, request):
    cloud = request.getfixturevalue(name)
    tensors = {f"layer{index}": np.full((4 * MIB,), index, np.float32) for index in range(8)}
    logged = cloud.folder / "logged.safetensors"
    save_file(tensors, logged)
    cloud.client("MlflowClient().log_artifact(sys.argv[2], sys.argv[3], 'logged')",
                 cloud.run_id, logged)
    cloud.cold(*SMALL)
    assert os.listdir(cloud.run / "logged") == ["logged.safetensors"]
    with safe_open(cloud.run / "logged" / "logged.safetensors", "np") as file:
        assert (file.get_tensor("layer5") == 5).all()
    assert cloud.store()["bytes_in"] < 17 * MIB


def test_names_move_go_and_come_back(azure):
    folder = azure.run / "names"
    folder.mkdir()
    (folder / "first").write_bytes(b"1" * (4 * MIB))
    (folder / "first").rename(folder / "second")
    azure.cold(*SMALL)
    (folder / "second").rename(folder / "third")
    assert sorted(os.listdir(folder)) == ["third"]
    with open(folder / "third", "r+b") as file:
        file.seek(2 * MIB)
        file.write(b"changed")
    azure.cold(*SMALL)
    expected = b"1" * (2 * MIB) + b"changed"
    expected += b"1" * (4 * MIB - len(expected))
    assert (folder / "third").read_bytes() == expected
    os.remove(folder / "third")
    assert os.listdir(azure.run / "names") == []


def test_a_name_that_the_store_cannot_have_is_refused(azure):
    with pytest.raises(OSError) as refused:
        (azure.run / "new\nline").write_text("x")
    assert refused.value.errno == errno.EINVAL


def test_without_credentials_the_error_says_what_to_set(azure, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("PATH", "/nowhere")
    azure.unmount()
    azure.mount()
    try:
        with pytest.raises(OSError) as refused:
            os.listdir(azure.run)
        assert refused.value.errno == errno.EACCES
        expect_log(azure.folder / "log", "AZURE_STORAGE_CONNECTION_STRING")
    finally:
        azure.unmount()
        monkeypatch.undo()
        azure.mount(*SMALL)

"""Runs whose artifacts an MLflow server proxies: from a directory of its own, and from S3."""

import errno
import json
import os
import signal
import subprocess

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from models import MIB, SMALL, check_what_is_saved
from servers import Server, wait_until


@pytest.fixture(scope="module", params=["directory", "s3", "azure"])
def proxied(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("proxied")
    destination = {
        "directory": str(folder / "artifacts"),
        "s3": f"s3://mlflow/{folder.name}",
        "azure": f"wasbs://mlflow@devstoreaccount1.blob.core.windows.net/{folder.name}",
    }
    proxied = Server(folder, "--artifacts-destination", destination[request.param])
    proxied.kind = request.param
    proxied.mount(*SMALL)
    yield proxied
    proxied.stop()


def test_what_is_saved_is_what_mlflow_downloads(proxied):
    check_what_is_saved(proxied)


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
    # The server has all of a blob before it sends the first byte of it, and sends all of it.
    if proxied.kind != "azure":
        assert told["bytes_in"] < 17 * MIB, told
    # S3 sends them itself.
    assert (proxied.bodies() > before) == (proxied.kind != "s3")


def test_a_large_file_goes_straight_to_the_store_where_that_takes_parts(proxied):
    content = os.urandom(MIB) * 40
    (proxied.run / "large.bin").write_bytes(content)
    with open(proxied.download("large.bin"), "rb") as file:
        assert file.read() == content
    asked = proxied.store()["requests"]
    # Azure's blocks belong to a name: two uploads at once would mix.
    assert (asked["upload_part"] >= 3) == (proxied.kind == "s3"), asked
    assert (asked["complete_multipart"] == 1) == (proxied.kind == "s3"), asked


def test_a_large_file_goes_through_the_server_while_it_is_written_where_that_takes_no_parts(proxied):
    if proxied.kind == "s3":
        pytest.skip("it takes parts")
    content = os.urandom(MIB) * 48

    def bodies():
        log = (proxied.folder / "server.log").read_text()
        return sum("PUT /api/2.0/mlflow-artifacts" in line for line in log.splitlines())

    def asked():
        log = (proxied.folder / "server.log").read_text()
        return sum("PUT" in line and "a%23b" in line for line in log.splitlines())

    proxied.cold(*SMALL)
    before, questions, sent = bodies(), asked(), proxied.store()["bytes_out"]
    os.listdir(proxied.run)
    with open(proxied.run / "followed.bin", "wb") as file:
        file.write(content[:40 * MIB])
        file.flush()
        wait_until("a body", lambda: proxied.store()["bytes_out"] >= sent + 30 * MIB)
        assert "followed.bin" not in {it.path for it in proxied.api.list_artifacts(proxied.run_id)}
        file.write(content[40 * MIB:])
    # One to ask whether it is taken so.
    assert (bodies(), asked()) == (before + 2, questions + 1)
    with open(proxied.download("followed.bin"), "rb") as file:
        assert file.read() == content
    # The plug is pulled: the server has nothing of it, and keeps nothing.
    file = open(proxied.run / "killed.bin", "wb", buffering=0)
    file.write(content[:40 * MIB])
    status = json.loads((proxied.path / ".mlfs" / "status").read_text())
    wait_until("a body", lambda: proxied.store()["bytes_out"] >= sent + 78 * MIB)
    os.kill(status["pid"], signal.SIGKILL)
    with pytest.raises(OSError):
        file.close()
        os.stat(proxied.run)
    subprocess.run(["umount", "-l", proxied.path], check=True)
    proxied.mounted = False
    proxied.mount(*SMALL)
    assert not (proxied.run / "killed.bin").exists()
    assert "killed.bin" not in {it.path for it in proxied.api.list_artifacts(proxied.run_id)}
    if proxied.kind == "directory":
        kept = proxied.folder / "artifacts"
        wait_until("nothing to be kept", lambda: not [
            path for path in kept.rglob("*") if "killed" in path.name or "uploading" in path.name])


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
        if proxied.kind != "s3":
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

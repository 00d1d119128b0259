"""Runs whose artifacts lie where mlfs has no way to, but the tracking server may."""

import errno
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from models import MIB
from servers import Server, expect_log, free_port


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "ftp").mkdir()
    port = free_port()
    # In a process of its own: a page fault of this one holds all of its threads.
    ftp = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "pyftpdlib", "-i", "127.0.0.1", "-p", str(port), "-w",
         "-u", "mlflow", "-P", "geheim", "-d", folder / "ftp"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            break
        except OSError:
            assert ftp.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOWED_HOST_ADDRESSED_ARTIFACT_SCHEMES", "hdfs")
        foreign = Server(folder, "--default-artifact-root", f"ftp://mlflow:geheim@127.0.0.1:{port}/root",
                         "--no-serve-artifacts")
    tensors = {f"layer{index}": np.full((MIB,), index, np.float32) for index in range(8)}
    logged = folder / "logged.safetensors"
    save_file(tensors, logged)
    foreign.client("MlflowClient().log_artifact(sys.argv[2], sys.argv[3], 'model')",
                   foreign.run_id, logged)
    foreign.mount()
    yield foreign
    foreign.stop()
    ftp.kill()
    ftp.wait()


def test_they_are_read_through_the_server_each_once(foreign):
    path = foreign.run / "model" / "logged.safetensors"
    assert os.listdir(foreign.run) == ["model"]
    assert path.stat().st_size == (foreign.folder / "logged.safetensors").stat().st_size
    with safe_open(path, "np") as file:
        assert (file.get_tensor("layer7") == 7).all()
        assert (file.get_tensor("layer2") == 2).all()
    assert path.read_bytes() == (foreign.folder / "logged.safetensors").read_bytes()
    asked = (foreign.folder / "server.log").read_text().count("GET /get-artifact?")
    assert asked == 1
    log = foreign.folder / "log"
    expect_log(log, "ftp")
    assert "geheim" not in log.read_text()


def test_they_are_not_written(foreign):
    path = foreign.run / "model" / "logged.safetensors"
    for change in (lambda: (foreign.run / "new").write_text("x"),
                   lambda: open(path, "r+b"),
                   lambda: os.truncate(path, 1),
                   lambda: path.unlink(),
                   lambda: path.rename(foreign.run / "other"),
                   lambda: (foreign.run / "folder").mkdir(),
                   lambda: (foreign.run / "model").rmdir()):
        with pytest.raises(OSError) as refused:
            change()
        assert refused.value.errno == errno.EROFS
    assert path.is_file()


def test_where_the_server_has_no_way_either_the_scheme_is_named(foreign):
    run = foreign.client(
        "experiment = MlflowClient().create_experiment('far', 'hdfs://namenode:1/root')\n"
        "print(MlflowClient().create_run(experiment).info.run_id, end='')")
    with pytest.raises(OSError) as refused:
        os.listdir(foreign.path / run)
    assert refused.value.errno == errno.EOPNOTSUPP
    expect_log(foreign.folder / "log", "hdfs")

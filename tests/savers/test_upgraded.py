"""A server is upgraded under a mount, from an MLflow that knows no logged models."""

import contextlib
import json
import os
import sys
import threading

import pytest

from servers import Server, wait_until

OLDER = """
import json, sklearn.linear_model, mlflow.sklearn
model = sklearn.linear_model.LinearRegression().fit([[1], [2]], [2, 4])
mlflow.set_experiment("fraud")
with mlflow.start_run(run_name="older") as run:
    mlflow.sklearn.log_model(model, "model", registered_model_name="fraud")
    mlflow.log_text("hello", "note.txt")
MlflowClient().set_registered_model_alias("fraud", "champion", 1)
print(json.dumps([mlflow.__version__, run.info.run_id]))
"""
NEWER = """
import json, sklearn.linear_model, mlflow.sklearn
model = sklearn.linear_model.LinearRegression().fit([[1], [2]], [2, 4])
mlflow.set_experiment("fraud")
with mlflow.start_run(run_name="newer") as run:
    logged = mlflow.sklearn.log_model(model, name="model", registered_model_name="fraud")
MlflowClient().set_registered_model_alias("fraud", "champion", 2)
print(json.dumps([mlflow.__version__, run.info.run_id, logged.model_id]))
"""


class Look(threading.Thread):
    """Reads what it knows, over and over, until it is left."""

    def __init__(self, root, run):
        super().__init__()
        self.root, self.run_id = root, run
        self.looks, self.faults, self.over = 0, [], threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()

    def run(self):
        run, version = self.root / self.run_id, self.root / "models" / "fraud" / "1"
        while not self.over.is_set():
            try:
                assert (run / "note.txt").read_text() == "hello"
                assert (version / "MLmodel").samefile(run / "model" / "MLmodel")
                assert {"model", "note.txt"} <= set(os.listdir(run))
                assert (self.root / "experiments" / "fraud" / "older" / "note.txt").is_file()
            except (OSError, AssertionError) as fault:
                self.faults.append(repr(fault))
            self.looks += 1


@pytest.fixture
def server(tmp_path):
    """An older one, of which the server and its database are mounted."""
    server = Server(tmp_path, "--default-artifact-root", str(tmp_path / "artifacts"),
                    "--no-serve-artifacts", python=os.environ["MLFLOW_OLDER"])
    server.roots = []
    try:
        for name, uri in [("runs", server.uri), ("database", server.database)]:
            root = tmp_path / name
            root.mkdir(exist_ok=True)
            server.mlfs("mount", root, "--spill-dir", tmp_path / f"{name}-spill", "--log-file",
                        tmp_path / f"{name}-log", "--metadata-ttl", "200ms",
                        env={**os.environ, "MLFLOW_TRACKING_URI": uri,
                             "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
                             "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"})
            server.roots.append(root)
        yield server
    finally:
        for root in server.roots:
            server.mlfs("unmount", root, "--timeout", "60s")
        server.stop()


def test_a_server_that_is_upgraded_under_a_mount(server):
    version, run = json.loads(server.client(OLDER))
    assert version.startswith("2."), version
    with contextlib.ExitStack() as files:
        opened, looks = [], []
        for root in server.roots:
            models = root / "models"
            wait_until("the alias", lambda: os.path.lexists(models / "fraud@champion"))
            assert sorted(os.listdir(models)) == ["fraud", "fraud@champion"]
            assert sorted(os.listdir(root / run)) == ["model", "note.txt"]
            assert (models / "fraud@champion" / "MLmodel").samefile(root / run / "model" / "MLmodel")
            # There are none, which is no fault.
            assert not os.path.lexists(models / ("m-" + "0" * 32))
            assert run in (root / run / ".mlflow" / "run.json").read_text()
            opened.append(files.enter_context(open(root / run / "note.txt")))
            looks.append(files.enter_context(Look(root, run)))
        for look in looks:
            wait_until("a look", lambda: look.looks)
        server.upgrade(sys.executable)
        version, newer, model = json.loads(server.client(NEWER))
        assert version.startswith("3."), version
        for root, look, file in zip(server.roots, looks, opened):
            champion = root / "models" / "fraud@champion"
            wait_until("the alias to move", lambda: os.readlink(champion) == "fraud/2")
            seen = look.looks
            wait_until("looks at the new one", lambda: look.looks > seen + 2)
            assert file.read() == "hello"
    for root, look in zip(server.roots, looks):
        assert not look.faults, (root, look.looks, look.faults[:5])
        models = root / "models"
        assert os.readlink(models / "fraud" / "2") == f"../{model}"
        assert os.readlink(root / newer / "model") == f"../models/{model}"
        assert set(os.listdir(models)) == {"fraud", "fraud@champion", model}
        assert sorted(os.listdir(root / "experiments" / "fraud")) == ["newer", "older"]
        assert model in (models / model / ".mlflow" / "model.json").read_text()
        # What the older one has made is as it was, and to be written to.
        (root / run / "added").write_bytes(b"by the mount")
        assert sorted(os.listdir(root / run)) == ["added", "model", "note.txt"]
        (root / run / "added").unlink()
        with pytest.raises(FileNotFoundError):
            os.stat(models / "unheard of")
    script = ("print([round(float(mlflow.pyfunc.load_model(path).predict([[3]])[0])) "
              "for path in sys.argv[2:]], end='')")
    paths = [f"{root}/models/fraud@champion/" for root in server.roots]
    assert json.loads(server.client(script, *paths)) == [6, 6]

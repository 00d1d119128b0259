"""MLflow and a mount in one folder, with no server: the client's own defaults on both sides."""

import json
import os
import subprocess
import sys

import mlflow.pyfunc
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from servers import wait_until

LOG = """
import mlflow
with mlflow.start_run(run_name="it's: a 'run'") as run:
    mlflow.log_text("by mlflow", "notes/a.txt")
print(run.info.run_id, end="")
"""
DOWNLOAD = """
import mlflow, sys
print(mlflow.artifacts.download_artifacts(run_id=sys.argv[1], artifact_path=sys.argv[2]), end="")
"""


class Folder:
    """What somebody who tries MLflow has: a folder, and no variable set."""

    def __init__(self, path, **more):
        self.path = path
        keep = {name: value for name, value in os.environ.items()
                if not name.startswith(("MLFLOW_", "AWS_"))}
        self.environment = {**keep, "HOME": str(path), **more}

    def run(self, *command):
        done = subprocess.run(command, cwd=self.path, env=self.environment, check=True,
                              timeout=120, stdout=subprocess.PIPE, text=True)
        return done.stdout

    def mlfs(self, *arguments):
        return self.run(os.environ["MLFS_BIN"], *arguments)


@pytest.mark.parametrize("store", ["database", "files"])
def test_in_the_folder_where_mlflow_was_tried(tmp_path, store):
    told = {"MLFLOW_TRACKING_URI": "./mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}
    by_mlflow = Folder(tmp_path, **(told if store == "files" else {}))
    run_id = by_mlflow.run(sys.executable, "-c", LOG)
    assert (tmp_path / "mlflow.db").exists() == (store == "database")
    folder = Folder(tmp_path)
    (tmp_path / "runs").mkdir()
    folder.mlfs("mount", "./runs")
    try:
        run = tmp_path / "runs" / run_id
        assert sorted(os.listdir(run.parent)) == sorted([run_id, "experiments", "models"])
        assert (run / "notes" / "a.txt").read_text() == "by mlflow"
        tensors = {f"layer{index}": np.full((700, 1000), index) for index in range(4)}
        (run / "model").mkdir()
        save_file(tensors, run / "model" / "model.safetensors")
        # MLflow finds it, and what it downloads is the same.
        name = "model/model.safetensors"
        downloaded = by_mlflow.run(sys.executable, "-c", DOWNLOAD, run_id, name)
        assert (load_file(downloaded.splitlines()[-1])["layer3"] == 3).all()
        assert (load_file(run / name)["layer2"] == 2).all()
        assert not list(tmp_path.glob("mlruns/**/.artifact.uploading.*"))
    finally:
        folder.mlfs("unmount", "./runs", "--timeout", "30s")


MODELS = """
import json, mlflow, mlflow.sklearn, sklearn.linear_model
client = mlflow.MlflowClient()
fitted = sklearn.linear_model.LinearRegression().fit([[1], [2]], [2, 4])
told = {}
with mlflow.start_run(run_name="first") as run:
    mlflow.log_params({"depth": 3, "optimizer/name": "adam"})
    for step, value in enumerate([0.5, float("nan"), 0.25]):
        mlflow.log_metric("loss", value, step=step)
    mlflow.log_metric("worst", float("inf"))
    mlflow.set_tag("lines", "one\\ntwo")
    for _ in range(2):
        logged = mlflow.sklearn.log_model(fitted, name="clf", pip_requirements=[])
    told["run"], told["model"] = run.info.run_id, logged.model_id
    told["deleted"] = mlflow.sklearn.log_model(fitted, name="gone", pip_requirements=[]).model_id
client.delete_logged_model(told["deleted"])
for name in ["fraud", "empty", "odd name"]:
    client.create_registered_model(name)
client.create_model_version("fraud", f"models:/{logged.model_id}", run.info.run_id,
                            model_id=logged.model_id)
client.create_model_version("fraud", f"runs:/{run.info.run_id}/notes", run.info.run_id)
client.create_model_version("fraud", "s3://nowhere/at/all")
client.delete_model_version("fraud", "3")
client.set_registered_model_alias("fraud", "champion", 1)
mlflow.log_text("a note", "notes/a.txt", run_id=run.info.run_id)
print(json.dumps(told), end="")
"""


def test_the_models_of_mlflows_folders_are_shown(tmp_path):
    by_mlflow = Folder(tmp_path, MLFLOW_TRACKING_URI="./mlruns", MLFLOW_ALLOW_FILE_STORE="true")
    told = json.loads(by_mlflow.run(sys.executable, "-c", MODELS).splitlines()[-1])
    folder = Folder(tmp_path)
    root = tmp_path / "runs"
    root.mkdir()
    folder.mlfs("mount", "./runs", "--metadata-ttl", "200ms")
    try:
        models, run = root / "models", root / told["run"]
        assert set(os.listdir(models)) > {"fraud", "empty", "odd name", "fraud@champion", told["model"]}
        assert told["deleted"] not in os.listdir(models)
        assert not (models / told["deleted"]).exists()
        assert os.listdir(models / "fraud") == ["1", "2"]
        assert os.listdir(models / "empty") == []
        assert sorted(os.listdir(run)) == ["clf", "notes"]
        assert os.path.basename(os.readlink(run / "clf")) == told["model"]
        for path in [models / "fraud@champion", models / "fraud" / "1", models / told["model"],
                     run / "clf", root / "experiments" / "Default" / "first" / "clf"]:
            loaded = mlflow.pyfunc.load_model(f"{path}/")
            assert round(loaded.predict(np.array([[3]]))[0]) == 6, path
        assert (models / "fraud" / "2" / "a.txt").read_text() == "a note"
        for name in ["fraud/3", "fraud/01", "fraud@challenger", "fraud@..", "..%2F0", "m-" + 32 * "0"]:
            assert not (models / name).exists(), name
        (models / told["model"] / "more.txt").write_text("by hand")
        alias = "MlflowClient().set_registered_model_alias('fraud', 'champion', 2)"
        by_mlflow.run(sys.executable, "-c", f"from mlflow import MlflowClient; {alias}")
        wait_until("the alias to move", lambda: os.readlink(models / "fraud@champion") == "fraud/2")

        document = json.loads((run / ".mlflow" / "run.json").read_text())
        assert document["info"]["run_name"] == "first" and document["info"]["status"] == "FINISHED"
        read = {name: json.loads((run / ".mlflow" / f"{name}.json").read_text())
                for name in ["params", "metrics", "tags"]}
        assert read["params"] == {"depth": "3", "optimizer/name": "adam"}
        assert read["metrics"]["loss"]["value"] == 0.25 and read["metrics"]["loss"]["step"] == 2
        assert read["metrics"]["worst"]["value"] == "Infinity"
        assert read["tags"]["lines"] == "one\ntwo"
        model = json.loads((models / told["model"] / ".mlflow" / "model.json").read_text())
        assert model["info"]["status"] == "LOGGED_MODEL_READY" and model["info"]["name"] == "clf"
        assert {"key": "depth", "value": "3"} in model["data"]["params"]
    finally:
        folder.mlfs("unmount", "./runs", "--timeout", "30s")
    logged = tmp_path.glob(f"mlruns/*/models/{told['model']}/artifacts/more.txt")
    assert [path.read_text() for path in logged] == ["by hand"]

"""MLflow and a mount in one folder, with no server: the client's own defaults on both sides."""

import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

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

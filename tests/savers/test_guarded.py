"""A server that asks who one is, and one with workspaces: what is shown of their experiments and models."""

import json
import os
import subprocess
import urllib.request

import pytest

from servers import Server

ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "only for this test"}
MADE = """
client = MlflowClient()
experiment = client.create_experiment(sys.argv[2])
client.create_run(experiment, run_name="first")
client.create_registered_model(sys.argv[3])
"""


@pytest.fixture
def environment():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def refused(server, environment):
    done = subprocess.run([os.environ["MLFS_BIN"], "mount", server.path], capture_output=True, text=True,
                          timeout=60, env={**os.environ, "MLFLOW_TRACKING_URI": server.uri})
    assert done.returncode == 1, done
    return done.stderr


def test_a_server_that_asks_who_one_is(environment, tmp_path):
    environment.setenv("MLFLOW_FLASK_SERVER_SECRET_KEY", "for this test")
    environment.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", ADMIN["MLFLOW_TRACKING_PASSWORD"])
    for name, value in ADMIN.items():
        environment.setenv(name, value)
    server = Server(tmp_path, "--app-name", "basic-auth", "--artifacts-destination",
                    str(tmp_path / "artifacts"))
    try:
        server.client(MADE, "guarded", "secret model")
        server.mount()
        assert "first" in os.listdir(server.path / "experiments" / "guarded")
        assert os.listdir(server.path / "models") == ["secret model"]
        run = server.path / "experiments" / "guarded" / "second"
        run.mkdir()
        (run / "note.txt").write_text("for those who may")
        server.mlfs("run", "end", run)
        told = "print(mlflow.get_run(sys.argv[2]).info.status, end='')"
        assert server.client(told, os.path.basename(os.readlink(run))) == "FINISHED"
        server.unmount()
        environment.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        assert "credentials" in refused(server, environment)
        environment.delenv("MLFLOW_TRACKING_PASSWORD")
        assert "credentials" in refused(server, environment)
    finally:
        server.stop()


def test_a_server_with_workspaces(environment, tmp_path):
    server = Server(tmp_path, "--enable-workspaces", "--artifacts-destination",
                    str(tmp_path / "artifacts"))
    try:
        body = json.dumps({"name": "team"}).encode()
        asked = urllib.request.Request(f"{server.uri}/api/3.0/mlflow/workspaces", body,
                                       {"Content-Type": "application/json"})
        urllib.request.urlopen(asked, timeout=10).close()
        server.client(MADE, "everybody's", "common model")
        environment.setenv("MLFLOW_WORKSPACE", "team")
        server.client(MADE, "the team's", "our model")
        database = f"sqlite:///{tmp_path}/mlflow.db"
        for source in (server.uri, database):
            for workspace, experiment, model in (("default", "everybody's", "common model"),
                                                 ("team", "the team's", "our model")):
                environment.setenv("MLFLOW_WORKSPACE", workspace)
                server.mlfs("mount", server.path, "--spill-dir", tmp_path / "spill", "--log-file",
                            tmp_path / "log", env={**os.environ, "MLFLOW_TRACKING_URI": source})
                server.mounted = True
                experiments = set(os.listdir(server.path / "experiments"))
                assert experiments - {"Default"} == {experiment}, source
                assert os.listdir(server.path / "experiments" / experiment) == ["first"]
                assert os.listdir(server.path / "models") == [model], source
                others = {"everybody's", "the team's"} - {experiment}
                assert not (server.path / "experiments" / others.pop()).exists()
                others = {"common model", "our model"} - {model}
                assert not (server.path / "models" / others.pop()).exists()
                server.unmount()
    finally:
        server.stop()

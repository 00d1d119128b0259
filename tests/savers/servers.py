"""MLflow servers of one's own, and mounts of them."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

from mlflow import MlflowClient

CLIENT = """
import mlflow, sys
from mlflow import MlflowClient
mlflow.set_tracking_uri(sys.argv[1])
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until(what, holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def expect_log(path, *words):
    """Waits until a mount's log says so: its lines are written by a thread of their own."""
    for word in words:
        wait_until(f"{path} to say {word}", lambda: word in path.read_text())


class Server:
    """A server, started so by an interpreter that has MLflow, a run of it, and a mount."""

    def __init__(self, folder, *how, python=sys.executable):
        self.folder = folder
        self.how = how
        self.python = python
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.log = open(folder / "server.log", "wb")
        self.start()
        self.run_id = self.client("print(MlflowClient().create_run('0').info.run_id, end='')")
        self.path = folder / "runs"
        self.path.mkdir()
        self.mounted = False

    @property
    def program(self):
        return pathlib.Path(self.python).parent / "mlflow"

    @property
    def database(self):
        return f"sqlite:///{self.folder}/mlflow.db"

    def start(self):
        self.server = subprocess.Popen(
            [self.program, "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
             "--backend-store-uri", self.database, *self.how],
            cwd=self.folder, stdout=self.log, stderr=self.log, start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                break
            except OSError:
                assert self.server.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)

    def upgrade(self, python):
        """Goes on with what another interpreter has, as whoever runs a server is told to."""
        self.end()
        self.python = python
        subprocess.run([self.program, "db", "upgrade", self.database], check=True, timeout=120,
                       stdout=self.log, stderr=self.log)
        self.start()

    def signal(self, number):
        """To the server and its workers."""
        os.killpg(self.server.pid, number)

    def end(self):
        self.signal(signal.SIGTERM)
        self.server.wait(timeout=30)

    @property
    def api(self):
        """MLflow's own client, in this process."""
        return MlflowClient(self.uri, self.uri)

    def client(self, script, *arguments):
        """MLflow's own client, in a process of its own."""
        done = subprocess.run([self.python, "-c", CLIENT + script, self.uri, *map(str, arguments)],
                              check=True, timeout=300, stdout=subprocess.PIPE, text=True)
        return done.stdout.splitlines()[-1] if done.stdout else ""

    def download(self, name):
        script = ("print(mlflow.artifacts.download_artifacts(run_id=sys.argv[2], "
                  "artifact_path=sys.argv[3]), end='')")
        return self.client(script, self.run_id, name)

    @property
    def run(self):
        return self.path / self.run_id

    def mlfs(self, *arguments, **more):
        more = {"env": {**os.environ, "MLFLOW_TRACKING_URI": self.uri}, **more}
        return subprocess.run([os.environ["MLFS_BIN"], *arguments], check=True, timeout=120, **more)

    def mount(self, *flags):
        self.mlfs("mount", self.path, "--spill-dir", self.folder / "spill", "--log-file",
                  self.folder / "log", *flags)
        self.mounted = True

    def unmount(self):
        if self.mounted:
            self.mlfs("unmount", self.path, "--timeout", "60s")
        self.mounted = False

    def cold(self, *flags):
        self.unmount()
        self.mount(*flags)

    def store(self):
        """What the stores were asked."""
        return json.loads((self.path / ".mlfs" / "status").read_text())["store"]

    def bodies(self):
        """How often the server was asked for an object of the mount's."""
        lines = (self.folder / "server.log").read_text().splitlines()
        return sum("GET /api/2.0/mlflow-artifacts/artifacts/" in line for line in lines)

    def stop(self):
        self.unmount()
        self.end()
        self.log.close()

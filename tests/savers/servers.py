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


class Server:
    """A server, started so, a run of it, and a mount."""

    def __init__(self, folder, *how):
        self.folder = folder
        self.how = how
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.log = open(folder / "server.log", "wb")
        self.start()
        self.run_id = self.client("print(MlflowClient().create_run('0').info.run_id, end='')")
        self.path = folder / "runs"
        self.path.mkdir()
        self.mounted = False

    def start(self):
        program = pathlib.Path(sys.executable).parent / "mlflow"
        self.server = subprocess.Popen(
            [program, "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
             "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", *self.how],
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
        done = subprocess.run([sys.executable, "-c", CLIENT + script, self.uri, *map(str, arguments)],
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

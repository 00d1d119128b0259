"""A tracking server with 100 000 runs in 1 000 experiments and 10 000 registered models, and what a mount
of it costs: time, requests, memory."""

import json
import os
import pathlib
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid

TOP = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP / "tests" / "savers"))

from servers import Server  # noqa: E402

EXPERIMENTS = 1_000
RUNS = 100_000
MODELS = 10_000
MIB = 1 << 20


def fill(database):
    """Straight into the database: through the API it would take an hour."""
    connection = sqlite3.connect(database, timeout=60)
    now = 1_700_000_000_000
    ids = [uuid.uuid4().hex for _ in range(RUNS)]
    connection.executemany(
        "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage, "
        "creation_time, last_update_time, workspace) VALUES (?, ?, ?, 'active', ?, ?, 'default')",
        [(number, f"experiment {number:04}", f"s3://bucket/{number}", now, now)
         for number in range(1, EXPERIMENTS + 1)])
    connection.executemany(
        "INSERT INTO runs (run_uuid, name, source_type, source_name, entry_point_name, user_id, status, "
        "start_time, end_time, source_version, lifecycle_stage, artifact_uri, experiment_id) "
        "VALUES (?, ?, 'LOCAL', '', '', 'me', 'FINISHED', ?, ?, '', 'active', ?, ?)",
        [(run, f"run {number // EXPERIMENTS:03}", now + number, now + number,
          f"s3://bucket/{number % EXPERIMENTS + 1}/{run}/artifacts", number % EXPERIMENTS + 1)
         for number, run in enumerate(ids)])
    # Where MLflow looks for names.
    connection.executemany(
        "INSERT INTO tags (key, value, run_uuid) VALUES ('mlflow.runName', ?, ?)",
        [(f"run {number // EXPERIMENTS:03}", run) for number, run in enumerate(ids)])
    connection.executemany(
        "INSERT INTO registered_models (name, creation_time, last_updated_time, workspace) "
        "VALUES (?, ?, ?, 'default')",
        [(f"model-{number:05}", now, now) for number in range(MODELS)])
    connection.executemany(
        "INSERT INTO model_versions (name, version, creation_time, last_updated_time, description, "
        "user_id, current_stage, source, run_id, status, workspace) "
        "VALUES (?, 1, ?, ?, '', 'me', 'None', ?, ?, 'READY', 'default')",
        [(f"model-{number:05}", now, now,
          f"s3://bucket/{number % EXPERIMENTS + 1}/{ids[number]}/artifacts/model", ids[number])
         for number in range(MODELS)])
    connection.executemany(
        "INSERT INTO registered_model_aliases (name, alias, version, workspace) "
        "VALUES (?, 'champion', 1, 'default')",
        [(f"model-{number:05}",) for number in range(0, MODELS, 10)])
    connection.commit()
    connection.close()
    return ids


class Scale:
    def __init__(self, folder):
        self.server = Server(folder, "--default-artifact-root", "s3://bucket/", "--no-serve-artifacts")
        self.ids = fill(folder / "mlflow.db")

    def requests(self):
        lines = (self.server.folder / "server.log").read_text().splitlines()
        return sum(" /api/" in line for line in lines)

    def resident(self):
        """MiB of the mount's process."""
        lines = subprocess.run(["pgrep", "-f", f"mlfs mount --background-process {self.server.path}"],
                               check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        status = pathlib.Path(f"/proc/{lines[0]}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    def inodes(self):
        return json.loads((self.server.path / ".mlfs" / "status").read_text())["inodes"]

    def measure(self, what, act):
        before, started = self.requests(), time.monotonic()
        told = act()
        took = time.monotonic() - started
        time.sleep(0.3)  # What it asks for ahead.
        print(f"| {what} | {took * 1000:.1f} | {self.requests() - before} | {told or ''} "
              f"| {self.resident():.0f} |", flush=True)


def first(path):
    with os.scandir(path) as entries:
        return next(entries).name


def rest(path):
    with os.scandir(path) as entries:
        return sum(1 for _ in entries)


def beyond(path, count):
    """Until so many names have come."""
    with os.scandir(path) as entries:
        for _ in range(count):
            next(entries)


def main():
    with tempfile.TemporaryDirectory() as folder:
        scale = Scale(pathlib.Path(folder))
        root, run = scale.server.path, scale.ids[RUNS // 2]
        experiment = f"experiment {RUNS // 2 % EXPERIMENTS + 1:04}"
        print("| what | ms | requests | | resident, MiB |\n|---|---|---|---|---|")
        try:
            scale.measure("mount", scale.server.mount)
            scale.measure("a run by its id", lambda: os.stat(root / run) and None)
            scale.measure("a run by its name", lambda: os.readlink(
                root / "experiments" / experiment / f"run {RUNS // 2 // EXPERIMENTS:03}"))
            scale.measure("a version of a model", lambda: os.readlink(
                root / "models" / "model-09000" / "1")[:12] + "…")
            scale.measure("an alias", lambda: os.readlink(root / "models" / "model-09000@champion"))
            scale.measure("ls of one experiment", lambda: f"{rest(root / 'experiments' / experiment)} names")
            scale.measure("first run of the root", lambda: beyond(root, 3))
            scale.measure("first experiment", lambda: first(root / "experiments"))
            scale.measure("first model", lambda: first(root / "models"))
            scale.measure("all of experiments", lambda: f"{rest(root / 'experiments')} names")
            scale.measure("all of models", lambda: f"{rest(root / 'models')} names")
            scale.measure("all of the root", lambda: f"{rest(root)} names")
            scale.measure("the same with stat", lambda: sum(
                1 for entry in os.scandir(root) if entry.stat()) and None)
            pathlib.Path("/proc/sys/vm/drop_caches").write_text("2")
            # Beyond the TTL, and until what is free has gone back.
            time.sleep(25)
            scale.measure("forgotten by the kernel", lambda: f"{scale.inodes()} inodes")
        finally:
            scale.server.stop()


main()

"""A real mount of a real MLflow server and a real S3 server, both started by scripts/test."""

import gc
import hashlib
import os
import pathlib
import subprocess
import tempfile

import boto3
import mlflow
import pytest

BUCKET = "mlflow"


class Mount:
    """A mount of the tracking server's runs."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.path = self.folder / "runs"
        self.program = os.environ["MLFS_BIN"]

    def start(self):
        self.path.mkdir(exist_ok=True)
        subprocess.run(
            [self.program, "mount", self.path, "--spill-dir", self.folder / "spill",
             "--log-file", self.folder / "log", "--memory", "256MiB", "--part-size", "5MiB"],
            check=True, timeout=60)

    def stop(self):
        subprocess.run([self.program, "unmount", self.path, "--timeout", "60s"],
                       check=True, timeout=120)

    def cold(self):
        """Mounts anew, with nothing cached by anybody."""
        # A mapping that a test left to the collector would keep the mount busy.
        gc.collect()
        self.stop()
        self.start()


@pytest.fixture(scope="session")
def mount():
    with tempfile.TemporaryDirectory(prefix="mlfs-savers-") as folder:
        mount = Mount(folder)
        mount.start()
        yield mount
        mount.stop()
        log = (mount.folder / "log").read_text()
        assert "ERROR" not in log, log


@pytest.fixture
def run():
    with mlflow.start_run() as run:
        yield run


class Saved:
    """A run's artifacts: as a directory, and as the store has them."""

    def __init__(self, mount, run):
        self.mount = mount
        self.run_id = run.info.run_id
        self.prefix = run.info.artifact_uri.removeprefix(f"s3://{BUCKET}/") + "/"
        self.s3 = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT"],
                               region_name="us-east-1")

    @property
    def folder(self):
        return self.mount.path / self.run_id

    def names(self):
        pages = self.s3.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=self.prefix)
        return sorted(item["Key"].removeprefix(self.prefix)
                      for page in pages for item in page.get("Contents", []))

    def uploads(self):
        found = self.s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        return [upload["Key"] for upload in found if upload["Key"].startswith(self.prefix)]

    def digest(self, name):
        body = self.s3.get_object(Bucket=BUCKET, Key=self.prefix + name)["Body"]
        return hashlib.file_digest(body, "sha256").hexdigest()

    def check(self, *names):
        """The store has exactly these names, whole, and a cold mount reads the same bytes."""
        assert self.names() == sorted(names)
        assert self.uploads() == []
        self.mount.cold()
        for name in names:
            with open(self.folder / name, "rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == self.digest(name), name


@pytest.fixture
def saved(mount, run):
    return Saved(mount, run)

"""Experiments, logged and registered models in the tree, of a real MLflow server and of its database."""

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import uuid

import pytest

from servers import Server, expect_log, wait_until

MADE = """
import json, sklearn.linear_model, mlflow.sklearn
client = MlflowClient()
model = sklearn.linear_model.LinearRegression().fit([[1], [2]], [2, 4])
told = {}
mlflow.set_experiment("team/fraud")
told["experiment"] = mlflow.get_experiment_by_name("team/fraud").experiment_id
for index in range(2):
    with mlflow.start_run(run_name="first try") as run:
        told[f"run{index}"] = run.info.run_id
        logged = mlflow.sklearn.log_model(model, name="model", registered_model_name="fraud")
        told[f"model{index}"] = logged.model_id
        mlflow.log_text("hello", "note.txt")
client.set_registered_model_alias("fraud", "champion", 1)
for name in [".hidden", "a%41b", "new\\nline", "x" * 500, "both ' and \\"", "back\\\\slash", "ünï ✓"]:
    with mlflow.start_run(run_name=name) as run:
        told[name] = run.info.run_id
client.create_registered_model("empty")
client.create_registered_model("odd@name")
version = client.create_model_version("fraud", sys.argv[2], None)
told["elsewhere"] = version.version
print(json.dumps(told))
"""


class Made:
    def __init__(self, folder):
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        (self.elsewhere / "MLmodel").write_text("from elsewhere")
        # Whoever tells of it decides where it lies.
        self.server = Server(folder, "--default-artifact-root", str(folder / "artifacts"),
                             "--no-serve-artifacts")
        self.told = json.loads(self.server.client(MADE, f"s3://mlflow/{folder.name}"))
        self.sources = {"server": self.server.uri, "database": self.server.database}

    def mount(self, source, *flags):
        self.server.unmount()
        self.server.mlfs("mount", self.server.path, "--spill-dir", self.server.folder / "spill",
                         "--log-file", self.server.folder / "log", *flags,
                         env={**os.environ, "MLFLOW_TRACKING_URI": self.sources[source]})
        self.server.mounted = True
        return self.server.path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    made = Made(tmp_path_factory.mktemp("tree"))
    yield made
    made.server.stop()


@pytest.fixture(params=["server", "database"])
def root(made, request):
    yield made.mount(request.param, "--metadata-ttl", "200ms")
    made.server.unmount()


def test_every_path_that_names_a_model_leads_to_it(made, root):
    told = made.told
    text = (root / "models" / told["model0"] / "MLmodel").read_text()
    assert told["model0"] in text
    for path in [root / told["run0"] / "model", root / "models" / "fraud" / "1",
                 root / "models" / "fraud@champion",
                 root / "experiments" / "team%2Ffraud" / "first try" / "model"]:
        assert (path / "MLmodel").read_text() == text, path
        assert (path / "MLmodel").samefile(root / "models" / told["model0"] / "MLmodel"), path
    assert os.readlink(root / "models" / "fraud@champion") == "fraud/1"
    assert os.readlink(root / told["run1"] / "model") == f"../models/{told['model1']}"
    # MLflow takes a link that leads out of its folder for an attack; what has a slash behind it is
    # no link but where it leads. It decodes what looks like a URL's escape, too.
    paths = [root / "models" / "fraud@champion", root / "models" / told["model0"],
             os.path.realpath(root / "experiments" / "team%2Ffraud" / "first try" / "model")]
    ends = [f"{root / path}/" for path in [f"{told['run0']}/model", "models/fraud/1",
                                           "models/fraud@champion"]]
    script = ("print([round(float(mlflow.pyfunc.load_model(path).predict([[3]])[0])) "
              "for path in sys.argv[2:]], end='')")
    assert json.loads(made.server.client(script, *paths, *ends)) == [6] * 6


def test_what_there_is_is_listed(made, root):
    told = made.told
    listed = set(os.listdir(root))
    assert {"experiments", "models", told["run0"], told["run1"]} <= listed
    assert sorted(os.listdir(root / "experiments")) == ["Default", "team%2Ffraud"]
    runs = os.listdir(root / "experiments" / "team%2Ffraud")
    assert len(runs) == len(set(runs)) == 9, runs
    for name in runs:
        link = root / "experiments" / "team%2Ffraud" / name
        assert os.readlink(link).removeprefix("../../") in told.values(), name
        assert link.is_dir(), name
    first = f"first try-{told['run1'][:8]}"
    assert {"first try", first, "%2Ehidden", "a%2541b", "new%0Aline", "ünï ✓"} <= set(runs)
    assert os.readlink(root / "experiments" / "team%2Ffraud" / first).endswith(told["run1"])
    models = set(os.listdir(root / "models"))
    assert models == {"fraud", "fraud@champion", "empty", "odd@name", told["model0"],
                      told["model1"]}
    assert sorted(os.listdir(root / "models" / "fraud")) == ["1", "2", told["elsewhere"]]
    assert os.listdir(root / "models" / "empty") == os.listdir(root / "models" / "odd@name") == []
    assert sorted(os.listdir(root / told["run0"])) == ["model", "note.txt"]
    for entry in os.scandir(root / told["run0"]):
        assert entry.is_symlink() == (entry.name == "model")


def test_names_that_are_not_there_are_not(root):
    for path in ["models/nothing", "models/nothing@champion", "models/fraud@nobody",
                 "models/fraud/99", "models/fraud/01", "models/fraud/x", "models/m-" + "0" * 32,
                 "experiments/team", "experiments/team%2ffraud", "experiments/Default/x",
                 "experiments/team%2Ffraud/first try-00000000", "m-" + "0" * 32]:
        assert not os.path.lexists(root / path), path


def test_a_version_from_elsewhere_has_a_directory_of_its_own(made, root):
    version = root / "models" / "fraud" / made.told["elsewhere"]
    assert not version.is_symlink() and version.is_dir()
    (version / "added").write_bytes(b"by the mount")
    assert (version / "added").read_bytes() == b"by the mount"
    assert os.listdir(version) == ["added"]
    (version / "added").unlink()


def test_files_are_written_into_a_logged_model(made, root):
    model = root / "models" / made.told["model0"]
    (model / "extra").mkdir()
    (model / "extra" / "weights").write_bytes(b"w" * 100_000)
    script = ("print(mlflow.artifacts.download_artifacts(artifact_uri=sys.argv[2], "
              "dst_path=sys.argv[3]), end='')")
    to = made.server.folder / f"download-{time.monotonic_ns()}"
    made.server.client(script, f"models:/{made.told['model0']}", to)
    assert (to / "extra" / "weights").read_bytes() == b"w" * 100_000
    (model / "extra" / "weights").unlink()
    (model / "extra").rmdir()


def test_names_are_the_servers_to_give(made, root):
    for act, path in [(os.mkdir, "models/new"), (os.mkdir, "models/fraud/7"), (os.rmdir, "models/empty"),
                      (os.unlink, "models/fraud@champion"), (os.rmdir, "experiments"),
                      (os.unlink, f"{made.told['run0']}/model"),
                      (lambda it: os.symlink("x", it), "models/link"),
                      (lambda it: open(it, "w"), "experiments/file")]:
        with pytest.raises(OSError) as caught:
            act(root / path)
        assert caught.value.errno in (errno.EPERM, errno.EROFS, errno.ENOSYS), path
    with pytest.raises(OSError):
        os.rename(root / made.told["run0"] / "note.txt", root / made.told["run0"] / "model")
    assert (root / made.told["run0"] / "note.txt").read_text() == "hello"


def test_what_mlflow_knows_is_told_as_files_and_attributes(made, root):
    told = made.told
    made.server.client("client = MlflowClient()\n"
                       "client.log_param(sys.argv[2], 'depth', 3)\n"
                       "client.log_metric(sys.argv[2], 'loss', 0.5, step=7)\n"
                       "client.set_tag(sys.argv[2], 'team', 'fraud')", told["run0"])
    run, model = root / told["run0"], root / "models" / told["model0"]
    hidden = run / ".mlflow"
    assert ".mlflow" not in os.listdir(run)
    assert sorted(os.listdir(hidden)) == ["metrics.json", "params.json", "run.json", "tags.json"]
    info = json.loads((hidden / "run.json").read_text())["info"]
    assert (info["run_id"], info["run_name"]) == (told["run0"], "first try")
    assert json.loads((hidden / "params.json").read_text())["depth"] == "3"
    loss = json.loads((hidden / "metrics.json").read_text())["loss"]
    assert (loss["value"], int(loss["step"])) == (0.5, 7)
    assert json.loads((hidden / "tags.json").read_text())["team"] == "fraud"
    info = json.loads((model / ".mlflow" / "model.json").read_text())["info"]
    assert (info["model_id"], info["status"]) == (told["model0"], "LOGGED_MODEL_READY")
    for act in [lambda: (hidden / "run.json").write_text("x"), hidden.rmdir,
                lambda: (hidden / "run.json").unlink(), lambda: (hidden / "new").write_text("x"),
                lambda: (run / ".mlflow").mkdir(), lambda: (hidden / "d").mkdir()]:
        with pytest.raises(OSError) as caught:
            act()
        assert caught.value.errno in (errno.EPERM, errno.EACCES, errno.EEXIST), caught.value
    assert os.getxattr(run / "note.txt", "user.mlflow.run_id").decode() == told["run0"]
    assert os.getxattr(model / "MLmodel", "user.mlflow.model_id").decode() == told["model0"]
    uri = os.getxattr(model / "MLmodel", "user.mlflow.artifact_uri").decode()
    assert uri.endswith(f"{told['model0']}/artifacts/MLmodel"), uri
    assert os.getxattr(model, "user.mlfs.state") == b"stored"


def revive(made):
    """There is no call for it."""
    with sqlite3.connect(made.server.folder / "mlflow.db", timeout=30) as database:
        database.execute("UPDATE logged_models SET lifecycle_stage = 'active' WHERE model_id = ?",
                         (made.told["model1"],))


def test_what_changes_on_the_server_is_seen(made, root):
    api, told = made.server.api, made.told
    champion = root / "models" / "fraud@champion"
    with open(champion / "MLmodel") as opened:
        api.set_registered_model_alias("fraud", "champion", 2)
        wait_until("the alias to move", lambda: os.readlink(champion) == "fraud/2")
        # What is open stays what it was.
        assert told["model0"] in opened.read()
    assert told["model1"] in (champion / "MLmodel").read_text()
    api.set_registered_model_alias("fraud", "champion", 1)
    # A version outlives what it was made from.
    api.delete_logged_model(told["model1"])
    version = root / "models" / "fraud" / "2"
    wait_until("the end of the model", lambda: not version.is_symlink())
    assert told["model1"] in (version / "MLmodel").read_text()
    revive(made)
    wait_until("the model", version.is_symlink)
    empty = root / "models" / "empty"
    api.create_model_version("empty", "s3://mlflow/anything", None)
    wait_until("a version", lambda: len(os.listdir(empty)) == 1)
    version = os.listdir(empty)[0]
    api.delete_model_version("empty", version)
    wait_until("its end", lambda: not os.listdir(empty) and not (empty / version).exists())
    api.create_registered_model("passing")
    wait_until("a model", (root / "models" / "passing").is_dir)
    api.rename_registered_model("passing", "passed")
    wait_until("its new name", (root / "models" / "passed").is_dir)
    wait_until("the end of the old name", lambda: not (root / "models" / "passing").exists())
    api.delete_registered_model("passed")
    wait_until("its end", lambda: not (root / "models" / "passed").exists())


def test_runs_renamed_deleted_and_restored_are_seen(made, root):
    api, run = made.server.api, made.told["run1"]
    experiment = root / "experiments" / "team%2Ffraud"
    second = experiment / f"first try-{run[:8]}"
    assert os.path.lexists(second) and os.path.lexists(experiment / "first try")
    with open(second / "note.txt") as opened:
        api.update_run(run, name="second try")
        renamed = experiment / "second try"
        wait_until("the new name", lambda: os.path.lexists(renamed))
        wait_until("the end of the old name", lambda: not os.path.lexists(second))
        assert {"first try", "second try"} <= set(os.listdir(experiment))
        assert (renamed / "note.txt").samefile(root / run / "note.txt")
        assert os.readlink(experiment / "first try").endswith(made.told["run0"])
        # A name that two runs have again.
        api.update_run(run, name="first try")
        wait_until("the old name", lambda: os.path.lexists(second))
        wait_until("the end of the new name", lambda: not os.path.lexists(renamed))
        api.delete_run(run)
        wait_until("the end of the run", lambda: not os.path.lexists(second))
        wait_until("its end in the root", lambda: run not in os.listdir(root))
        # What is open stays what it was.
        assert opened.read() == "hello"
    api.restore_run(run)
    wait_until("the run", second.is_dir)
    assert (second / "note.txt").read_text() == "hello" and run in os.listdir(root)


def test_experiments_renamed_deleted_and_restored_are_seen(made, root):
    api, told = made.server.api, made.told
    experiments = root / "experiments"
    fraud, renamed = experiments / "team%2Ffraud", experiments / "renamed"
    note = fraud / "first try" / "note.txt"
    with note.open() as opened:
        api.rename_experiment(told["experiment"], "renamed")
        wait_until("the new name", (renamed / "first try").is_dir)
        wait_until("the end of the old name", lambda: not fraud.exists())
        assert sorted(os.listdir(experiments)) == ["Default", "renamed"]
        assert (renamed / "first try" / "note.txt").read_text() == "hello"
        api.rename_experiment(told["experiment"], "team/fraud")
        wait_until("the old name", (fraud / "first try").is_dir)
        wait_until("the end of the new name", lambda: not renamed.exists())
        api.delete_experiment(told["experiment"])
        wait_until("its end", lambda: not fraud.exists())
        assert os.listdir(experiments) == ["Default"]
        wait_until("the end of its runs", lambda: told["run0"] not in os.listdir(root))
        wait_until("the end of a run's name", lambda: not os.path.lexists(root / told["run0"]))
        # What is open stays what it was.
        assert opened.read() == "hello"
    api.restore_experiment(told["experiment"])
    wait_until("the experiment", note.is_file)
    assert note.read_text() == "hello"
    wait_until("its runs", lambda: told["run0"] in os.listdir(root))
    assert (root / told["run0"] / "model" / "MLmodel").is_file()


def crowd(made, count):
    """An experiment with so many runs, put where MLflow keeps them; its name and their ids."""
    name = f"crowd {uuid.uuid4().hex}"
    experiment = made.server.api.create_experiment(name)
    ids = [uuid.uuid4().hex for _ in range(count)]
    with sqlite3.connect(made.server.folder / "mlflow.db", timeout=30) as database:
        database.executemany(
            "INSERT INTO runs (run_uuid, name, source_type, source_name, entry_point_name, user_id, "
            "status, start_time, source_version, lifecycle_stage, artifact_uri, experiment_id) "
            "VALUES (?, ?, 'LOCAL', '', '', 'me', 'FINISHED', ?, '', 'active', ?, ?)",
            [(run, f"run {number}", 1_700_000_000_000 + number, f"/nowhere/{run}", int(experiment))
             for number, run in enumerate(ids)])
    return experiment, name, ids


def test_runs_that_come_and_go_during_a_listing(made, root):
    api = made.server.api
    experiment, name, ids = crowd(made, 2500)
    try:
        wait_until("the experiment", (root / "experiments" / name).is_dir)
        gone = set()
        for folder, names in [(root / "experiments" / name, {f"run {it}" for it in range(2500)}),
                              (root, set(ids))]:
            seen, fresh = [], 0
            with os.scandir(folder) as entries:
                for number, entry in enumerate(entries):
                    seen.append(entry.name)
                    if number % 500 == 100:
                        api.create_run(experiment, run_name="late")
                        fresh += 1
                    if number % 500 == 300:
                        victim = ids.pop()
                        api.delete_run(victim)
                        gone |= {victim, f"run {len(ids)}"}
            assert len(seen) == len(set(seen)), folder
            assert names - gone <= set(seen), (folder, sorted(names - gone - set(seen))[:5])
            assert fresh > 3
    finally:
        api.delete_experiment(experiment)


def error_of(path):
    with pytest.raises(OSError) as caught:
        os.stat(path)
    return caught.value.errno


def test_a_server_that_hangs_or_is_restarted(made, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    root = made.mount("server", "--metadata-ttl", "200ms")
    server, champion = made.server, root / "models" / "fraud@champion"

    def known_names_go_on(opened):
        for _ in range(3):
            assert os.readlink(champion) == "fraud/1"
            assert made.told["model0"] in (champion / "MLmodel").read_text()
            assert os.listdir(root / made.told["run0"] / "model")
            opened.seek(0)
            assert made.told["model0"] in opened.read()
        for unknown in ["models/unheard of", "experiments/unheard of", "f" * 32]:
            assert error_of(root / unknown) == errno.EIO, unknown

    try:
        with open(champion / "MLmodel") as opened:
            assert os.listdir(root / made.told["run0"])
            server.signal(signal.SIGSTOP)
            try:
                known_names_go_on(opened)
            finally:
                server.signal(signal.SIGCONT)
            wait_until("an answer", lambda: error_of(root / "models" / "unheard of") == errno.ENOENT)
            server.end()
            try:
                known_names_go_on(opened)
            finally:
                server.start()
            server.client("MlflowClient().set_registered_model_alias('fraud', 'champion', 2)")
            wait_until("the alias to move", lambda: os.readlink(champion) == "fraud/2")
            opened.seek(0)
            assert made.told["model0"] in opened.read()
        expect_log(server.folder / "log", "the tracking server fails",
                   "the tracking server answers again")
    finally:
        server.client("MlflowClient().set_registered_model_alias('fraud', 'champion', 1)")
        server.unmount()


def test_commands_follow_the_links(made, root):
    champion = root / "models" / "fraud@champion"
    made.server.mlfs("wait", champion)
    made.server.mlfs("prefetch", champion)
    # All that a run has, its models too.
    run = root / "experiments" / "team%2Ffraud" / "first try"
    told = made.server.mlfs("prefetch", run, stdout=subprocess.PIPE, text=True)
    files = sum(len(names) for _, _, names in os.walk(root / "models" / made.told["model0"]))
    assert told.stdout.startswith(f"{files + 1} files"), (told.stdout, files)


SCRIPT = """
set -euo pipefail
mkdir -p "$ROOT/experiments/by%2Fhand/run one/with/folders"
cd "$ROOT/experiments/by%2Fhand/run one"
echo text > note.txt
model=$("$MLFS_BIN" log-model . clf)
"$PYTHON" - "$model" <<'END'
import sys, sklearn.linear_model, mlflow.sklearn
model = sklearn.linear_model.LinearRegression().fit([[1], [2]], [2, 4])
mlflow.sklearn.save_model(model, sys.argv[1])
END
"$MLFS_BIN" log-model --ready "$model"
broken=$("$MLFS_BIN" log-model "$ROOT/experiments/by%2Fhand/run one" broken)
"$MLFS_BIN" log-model --failed "$broken"
cd /
"$MLFS_BIN" run end "$ROOT/experiments/by%2Fhand/run one" --status finished
mkdir "$ROOT/experiments/by%2Fhand/run two"
"$MLFS_BIN" run end "$ROOT/experiments/by%2Fhand/run two" --status KILLED
"""
TOLD = """
client = MlflowClient()
experiment = client.get_experiment_by_name("by/hand").experiment_id
runs = {run.info.run_name: run for run in client.search_runs([experiment])}
one, two = runs["run one"], runs["run two"]
assert one.info.status == "FINISHED" and one.info.end_time, one
assert two.info.status == "KILLED", two
models = {model.name: model for model in client.search_logged_models([experiment])}
assert models["clf"].status == "READY" and models["clf"].source_run_id == one.info.run_id, models
assert models["broken"].status == "FAILED", models
assert {it.model_id for it in one.outputs.model_outputs} == {it.model_id for it in models.values()}
loaded = mlflow.pyfunc.load_model(f"runs:/{one.info.run_id}/clf")
assert round(loaded.predict([[3]])[0]) == 6
print("told", end="")
"""


def test_a_shell_script_does_what_log_model_does(made):
    root = made.mount("server")
    try:
        subprocess.run(["bash", "-c", SCRIPT], check=True, timeout=120,
                       env={**os.environ, "MLFLOW_TRACKING_URI": made.server.uri, "ROOT": str(root),
                            "PYTHON": sys.executable})
        assert made.server.client(TOLD) == "told"
        run = root / "experiments" / "by%2Fhand" / "run one"
        assert (run / "note.txt").read_text() == "text\n"
        # Other processes made the models: they are seen within the metadata TTL.
        entries = ["broken", "clf", "note.txt", "with"]
        wait_until("the models to be seen", lambda: sorted(os.listdir(run)) == entries)
        assert os.listdir(run / "with") == ["folders"]
        assert "run one" in os.listdir(root / "experiments" / "by%2Fhand")
        # What others have made since nothing was there.
        assert not (root / "experiments" / "by%2Fhand" / "late").exists()
        made.server.client("e = MlflowClient().get_experiment_by_name('by/hand'); "
                           "MlflowClient().create_run(e.experiment_id, run_name='late')")
        for name in ["by%2Fhand", "by%2Fhand/run one", "by%2Fhand/late"]:
            with pytest.raises(FileExistsError):
                os.mkdir(root / "experiments" / name)
        for name in [".hidden", "a%2fb"]:
            with pytest.raises(OSError) as caught:
                os.mkdir(root / "experiments" / name)
            assert caught.value.errno == errno.EINVAL, name
    finally:
        made.server.client("e = MlflowClient().get_experiment_by_name('by/hand'); "
                           "MlflowClient().delete_experiment(e.experiment_id)")
        made.server.unmount()


def test_commands_say_what_is_wrong(made):
    root = made.mount("database")
    for arguments, told in [(["run", "end", root / "models"], "not a run's directory"),
                            (["log-model", root / made.told["run0"], "--ready"],
                             "not a logged model's directory"),
                            (["log-model", root / made.told["run0"]], "required"),
                            (["run", "end", root / made.told["run0"]], "only read"),
                            (["run", "end", made.server.folder], "not on a mount")]:
        done = subprocess.run([os.environ["MLFS_BIN"], *arguments], capture_output=True, text=True,
                              timeout=60,
                              env={**os.environ, "MLFLOW_TRACKING_URI": made.sources["database"]})
        assert done.returncode != 0 and told in done.stderr, (arguments, done)
    # What is exported may be another server's, and its password too.
    done = subprocess.run([os.environ["MLFS_BIN"], "run", "end", root / made.told["run0"]], timeout=60,
                          capture_output=True, text=True,
                          env={**os.environ, "MLFLOW_TRACKING_URI": made.server.uri})
    assert done.returncode == 2 and f"MLFLOW_TRACKING_URI names {made.server.uri}" in done.stderr, done
    for path in [root / "experiments" / "new", root / "experiments" / "Default" / "new"]:
        with pytest.raises(OSError) as caught:
            path.mkdir()
        assert caught.value.errno == errno.EROFS
    made.server.unmount()

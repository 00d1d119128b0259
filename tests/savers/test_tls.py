"""A store behind TLS, by a certificate authority of one's own."""

import os
import socket
import ssl
import subprocess
import threading
import urllib.parse

import mlflow
import pytest

from servers import expect_log


def pass_on(source, target):
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
    except OSError:
        pass
    finally:
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


@pytest.fixture
def endpoint(tmp_path):
    """The S3 server behind TLS, and the file of its authority."""
    authority, certificate, key = (tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem"))

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=tmp_path)

    new = ["-newkey", "rsa:2048", "-nodes"]
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", authority, "-subj", "/CN=lab CA")
    openssl("req", *new, "-keyout", key, "-out", "request.pem", "-subj", "/CN=lab")
    (tmp_path / "extensions").write_text("subjectAltName=IP:127.0.0.1")
    openssl("x509", "-req", "-in", "request.pem", "-CA", authority, "-CAkey", "ca.key",
            "-CAcreateserial", "-out", certificate, "-extfile", "extensions")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    behind = urllib.parse.urlparse(os.environ["S3_ENDPOINT"])
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(near):
        try:
            near = context.wrap_socket(near, server_side=True)
        except OSError:
            return
        far = socket.create_connection((behind.hostname, behind.port))
        threading.Thread(target=pass_on, args=(near, far), daemon=True).start()
        pass_on(far, near)

    def accept():
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(near,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"https://127.0.0.1:{listener.getsockname()[1]}", authority
    listener.close()


def mounted(tmp_path, endpoint, check=True, **more):
    path = tmp_path / "runs"
    path.mkdir(exist_ok=True)
    done = subprocess.run(
        [os.environ["MLFS_BIN"], "mount", path, "--spill-dir", tmp_path / "spill", "--log-file",
         tmp_path / "log", "--close-timeout", "5s"],
        check=check, timeout=60, capture_output=True, text=True,
        env={**os.environ, "MLFLOW_S3_ENDPOINT_URL": endpoint, **more})
    return path if check else done


def unmount(path):
    subprocess.run([os.environ["MLFS_BIN"], "unmount", path], check=True, timeout=120)


def test_an_authority_that_is_named_is_trusted_and_no_other(tmp_path, endpoint):
    endpoint, authority = endpoint
    run_id = mlflow.MlflowClient().create_run("0").info.run_id
    path = mounted(tmp_path, endpoint, AWS_CA_BUNDLE=str(authority))
    content = os.urandom(20 << 20)
    (path / run_id / "model.bin").write_bytes(content)
    unmount(path)
    path = mounted(tmp_path, endpoint, AWS_CA_BUNDLE=str(authority))
    assert (path / run_id / "model.bin").read_bytes() == content
    unmount(path)
    path = mounted(tmp_path, endpoint)
    with pytest.raises(OSError):
        os.listdir(path / run_id)
    unmount(path)
    expect_log(tmp_path / "log", "certificate")


def test_an_authority_that_is_none_is_told_at_once(tmp_path, endpoint):
    done = mounted(tmp_path, endpoint[0], check=False, AWS_CA_BUNDLE="/dev/null")
    assert done.returncode == 2 and "AWS_CA_BUNDLE" in done.stderr

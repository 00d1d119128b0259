//! As much of an MLflow tracking server as a mount needs, for tests without a real one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use http_body_util::BodyExt;
use hyper::Request;
use hyper::body::Incoming;
use hyper::header::SERVER;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::artifacts::{Answer, Artifacts, ROUTES, told};

#[derive(Default)]
struct State {
    /// Run id → artifact URI.
    runs: Mutex<BTreeMap<String, String>>,
    /// Ids of the runs that have ended; the others go on.
    finished: Mutex<BTreeSet<String>>,
    /// Answer everything with this status.
    broken: Mutex<Option<u16>>,
    requests: Mutex<Vec<String>>,
    artifacts: Artifacts,
}

/// A running server, with a thread of its own. Ends when dropped.
pub struct TrackingServer {
    address: SocketAddr,
    state: Arc<State>,
    runtime: Option<Runtime>,
}

impl TrackingServer {
    pub fn start(listen: SocketAddr) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("the server's thread")?;
        let listener = runtime
            .block_on(TcpListener::bind(listen))
            .with_context(|| format!("listening on {listen}"))?;
        let address = listener.local_addr().context("the server's address")?;
        let state = Arc::new(State::default());
        runtime.spawn(accept(listener, Arc::clone(&state)));
        Ok(Self {
            address,
            state,
            runtime: Some(runtime),
        })
    }

    pub fn uri(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn add_run(&self, run_id: &str, artifact_uri: &str) {
        self.state
            .runs
            .lock()
            .insert(run_id.to_owned(), artifact_uri.to_owned());
    }

    /// The run has ended well.
    pub fn finish_run(&self, run_id: &str) {
        self.state.finished.lock().insert(run_id.to_owned());
    }

    pub fn remove_run(&self, run_id: &str) {
        self.state.runs.lock().remove(run_id);
    }

    /// From now on everything is answered with `status`; `None`: as it should be.
    pub fn set_broken(&self, status: Option<u16>) {
        *self.state.broken.lock() = status;
    }

    /// What it proxies.
    pub fn artifacts(&self) -> &Artifacts {
        &self.state.artifacts
    }

    /// Paths asked for so far.
    pub fn requests(&self) -> Vec<String> {
        self.state.requests.lock().clone()
    }
}

impl Drop for TrackingServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            let service = service_fn(|request| handle(Arc::clone(&state), request));
            let _ = http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn handle(state: Arc<State>, request: Request<Incoming>) -> io::Result<Answer> {
    let server = state.artifacts.server();
    let mut answer = route(state, request).await?;
    if let Some(server) = server {
        answer.headers_mut().insert(SERVER, server);
    }
    Ok(answer)
}

async fn route(state: Arc<State>, request: Request<Incoming>) -> io::Result<Answer> {
    let path = request.uri().path().to_owned();
    state.requests.lock().push(path.clone());
    let broken = *state.broken.lock();
    if let Some(status) = broken {
        let document = json!({"error_code": "BROKEN", "message": "on purpose"});
        return Ok(told(status, &document));
    }
    if path == "/api/3.0/mlflow/server-info" {
        let document = json!({
            "multipart_downloads_enabled": true,
            "multipart_uploads_enabled": state.artifacts.takes_parts(),
        });
        return Ok(told(200, &document));
    }
    if path == "/version" {
        return Ok(told(200, &json!(state.artifacts.version())));
    }
    if path.starts_with(ROUTES) {
        return state.artifacts.handle(request).await;
    }
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let query = parts.uri.query().unwrap_or_default();
    let (status, document) = answer(&state, &path, query, &body);
    Ok(told(status, &document))
}

fn answer(state: &State, path: &str, query: &str, body: &[u8]) -> (u16, Value) {
    match path.trim_start_matches("/api/2.0/mlflow/") {
        "experiments/search" => (200, json!({"experiments": [{"experiment_id": "0"}]})),
        "runs/search" => {
            let asked: Value = serde_json::from_slice(body).unwrap_or_default();
            let most = asked["max_results"].as_u64().unwrap_or(1000) as usize;
            let from: usize = asked["page_token"]
                .as_str()
                .and_then(|token| token.parse().ok())
                .unwrap_or(0);
            let runs = state.runs.lock();
            let page: Vec<Value> = runs
                .iter()
                .skip(from)
                .take(most)
                .map(|(id, uri)| run(state, id, uri))
                .collect();
            let next = from + page.len();
            let mut answer = json!({"runs": page});
            if next < runs.len() {
                answer["next_page_token"] = json!(next.to_string());
            }
            (200, answer)
        }
        "runs/get" => {
            let id = query
                .split('&')
                .find_map(|pair| pair.strip_prefix("run_id="));
            let runs = state.runs.lock();
            match id.and_then(|id| Some((id, runs.get(id)?))) {
                Some((id, uri)) => (200, json!({"run": run(state, id, uri)})),
                None => (
                    404,
                    json!({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}),
                ),
            }
        }
        _ => (
            404,
            json!({"error_code": "ENDPOINT_NOT_FOUND", "message": "not in the lab"}),
        ),
    }
}

fn run(state: &State, id: &str, artifact_uri: &str) -> Value {
    let finished = state.finished.lock().contains(id);
    json!({
        "info": {
            "run_id": id,
            "run_name": format!("run {id}"),
            "experiment_id": "0",
            "artifact_uri": artifact_uri,
            "lifecycle_stage": "active",
            "status": if finished { "FINISHED" } else { "RUNNING" },
            "start_time": 1_700_000_000_000_u64,
            "end_time": finished.then_some(1_700_000_100_000_u64),
        },
        "data": {},
    })
}

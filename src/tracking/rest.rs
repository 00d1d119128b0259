//! MLflow's tracking REST API (`/api/2.0`), as of MLflow 3.17.

use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::settings::{Authentication, TrackingSettings};
use super::{Lifecycle, Page, Run, Tracking, TrackingError, TrackingResult};

/// Runs of one page; MLflow's limit is 50 000.
const RUNS_PER_PAGE: u32 = 1000;
const EXPERIMENTS_PER_PAGE: u32 = 1000;
/// A call is given up after this long, retries included: somebody waits in `ls`.
const LONGEST_CALL: Duration = Duration::from_secs(30);
/// The same at start-up, where somebody waits for the mount.
const LONGEST_PROBE: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Of an answer that is no JSON, this much goes into messages.
const EXCERPT: usize = 160;

/// A tracking server.
#[derive(Debug)]
pub struct RestTracking {
    client: Client,
    settings: TrackingSettings,
    name: String,
}

#[derive(Deserialize)]
struct RunInfo {
    run_id: String,
    #[serde(default)]
    run_name: String,
    experiment_id: String,
    #[serde(default)]
    artifact_uri: String,
    #[serde(default)]
    lifecycle_stage: String,
    #[serde(default)]
    status: String,
    start_time: Option<Value>,
    end_time: Option<Value>,
}

#[derive(Deserialize)]
struct RunDocument {
    info: RunInfo,
}

#[derive(Deserialize)]
struct RunAnswer {
    run: RunDocument,
}

#[derive(Deserialize)]
struct RunsAnswer {
    #[serde(default)]
    runs: Vec<RunDocument>,
    next_page_token: Option<String>,
}

#[derive(Deserialize)]
struct ExperimentDocument {
    experiment_id: String,
}

#[derive(Deserialize)]
struct ExperimentsAnswer {
    #[serde(default)]
    experiments: Vec<ExperimentDocument>,
    next_page_token: Option<String>,
}

#[derive(Deserialize, Default)]
struct ErrorAnswer {
    #[serde(default)]
    error_code: String,
    #[serde(default)]
    message: String,
}

/// Whether trying again can help, and how long the server asks to wait.
enum Failure {
    Final(TrackingError),
    Transient(TrackingError, Option<Duration>),
}

impl RestTracking {
    /// A client for the server; sends nothing.
    ///
    /// # Errors
    /// A certificate file that cannot be read.
    pub fn new(settings: TrackingSettings) -> TrackingResult<Self> {
        let name = settings.url.as_str().trim_end_matches('/').to_owned();
        let broken = |detail: String| TrackingError::Unavailable {
            server: name.clone(),
            detail,
        };
        let mut builder = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(settings.request_timeout)
            .user_agent(concat!("mlfs/", env!("CARGO_PKG_VERSION")));
        if settings.insecure_tls {
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
        if let Some(path) = &settings.server_certificate {
            let pem = std::fs::read(path)
                .map_err(|error| broken(format!("{}: {error}", path.display())))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem)
                .map_err(|error| broken(format!("{}: {error}", path.display())))?;
            builder = builder.tls_certs_only(certificates);
        }
        if let Some(path) = &settings.client_certificate {
            let pem = std::fs::read(path)
                .map_err(|error| broken(format!("{}: {error}", path.display())))?;
            let identity = reqwest::Identity::from_pem(&pem)
                .map_err(|error| broken(format!("{}: {error}", path.display())))?;
            builder = builder.identity(identity);
        }
        let client = builder.build().map_err(|error| broken(chain(&error)))?;
        Ok(Self {
            client,
            settings,
            name,
        })
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self
            .client
            .request(method, format!("{}/api/2.0/mlflow/{path}", self.name));
        let request = match &self.settings.authentication {
            Authentication::None => request,
            Authentication::Basic { username, password } => {
                request.basic_auth(username, Some(password))
            }
            Authentication::Bearer(token) => request.bearer_auth(token),
        };
        match &self.settings.workspace {
            Some(workspace) => request.header("X-MLFLOW-WORKSPACE", workspace),
            None => request,
        }
    }

    /// Sends a request, again where that can help, for at most `longest`.
    async fn call<T: serde::de::DeserializeOwned>(
        &self,
        what: &str,
        longest: Duration,
        build: impl Fn() -> RequestBuilder + Send,
    ) -> TrackingResult<T> {
        let deadline = tokio::time::Instant::now() + longest;
        let mut attempt = 0;
        loop {
            let answer = tokio::time::timeout_at(deadline, self.attempt(what, build())).await;
            let (error, asked) = match answer {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(Failure::Final(error))) => return Err(error),
                Ok(Err(Failure::Transient(error, asked))) => (error, asked),
                Err(_) => {
                    let detail = format!("no answer to {what} within {} s", longest.as_secs());
                    return Err(TrackingError::Unavailable {
                        server: self.name.clone(),
                        detail,
                    });
                }
            };
            let doubled = FIRST_PAUSE * 2_u32.pow(attempt);
            let pause = asked.unwrap_or(doubled.mul_f64(rand::random_range(0.5..1.0)));
            attempt += 1;
            if attempt > self.settings.retries || tokio::time::Instant::now() + pause > deadline {
                return Err(error);
            }
            tracing::debug!(%error, "asking the tracking server again");
            tokio::time::sleep(pause).await;
        }
    }

    async fn attempt<T: serde::de::DeserializeOwned>(
        &self,
        what: &str,
        request: RequestBuilder,
    ) -> Result<T, Failure> {
        let server = || self.name.clone();
        let unreachable = |error: reqwest::Error| {
            let detail = chain(&error.without_url());
            Failure::Transient(
                TrackingError::Unavailable {
                    server: server(),
                    detail,
                },
                None,
            )
        };
        let answer = request.send().await.map_err(unreachable)?;
        let status = answer.status();
        let asked = answer
            .headers()
            .get("retry-after")
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        let body = answer.bytes().await.map_err(unreachable)?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| {
                let detail = format!("{error}; is this an MLflow server? {}", excerpt(&body));
                let what = what.to_owned();
                Failure::Final(TrackingError::Protocol {
                    server: server(),
                    what,
                    detail,
                })
            });
        }
        Err(self.failure(what, status, asked, &body))
    }

    fn failure(
        &self,
        what: &str,
        status: StatusCode,
        asked: Option<Duration>,
        body: &[u8],
    ) -> Failure {
        let told: ErrorAnswer = serde_json::from_slice(body).unwrap_or_default();
        let server = self.name.clone();
        let what = what.to_owned();
        let detail = if told.message.is_empty() {
            format!("HTTP {}: {}", status.as_u16(), excerpt(body))
        } else {
            format!("HTTP {}: {}", status.as_u16(), told.message)
        };
        let error = match (status.as_u16(), told.error_code.as_str()) {
            (404, "RESOURCE_DOES_NOT_EXIST") | (_, "RESOURCE_DOES_NOT_EXIST") => {
                TrackingError::NotFound { server, what }
            }
            (401, _) => TrackingError::Unauthenticated { server, detail },
            (403, _) => TrackingError::PermissionDenied {
                server,
                what,
                detail,
            },
            (408 | 429 | 500 | 502 | 503 | 504, _) => {
                let error = TrackingError::Unavailable { server, detail };
                return Failure::Transient(error, asked);
            }
            _ => TrackingError::Protocol {
                server,
                what,
                detail,
            },
        };
        Failure::Final(error)
    }
}

#[async_trait]
impl Tracking for RestTracking {
    fn name(&self) -> &str {
        &self.name
    }

    async fn probe(&self) -> TrackingResult<()> {
        let _: ExperimentsAnswer = self
            .call("the experiments", LONGEST_PROBE, || {
                self.request(Method::GET, "experiments/search")
                    .query(&[("max_results", 1)])
            })
            .await?;
        Ok(())
    }

    async fn run(&self, run_id: &str) -> TrackingResult<Run> {
        let what = format!("run {run_id}");
        if !is_run_id(run_id) {
            return Err(TrackingError::NotFound {
                server: self.name.clone(),
                what,
            });
        }
        let answer: RunAnswer = self
            .call(&what, LONGEST_CALL, || {
                self.request(Method::GET, "runs/get")
                    .query(&[("run_id", run_id)])
            })
            .await?;
        Ok(answer.run.info.into())
    }

    async fn experiments(&self, token: Option<&str>) -> TrackingResult<Page<String>> {
        let answer: ExperimentsAnswer = self
            .call("the experiments", LONGEST_CALL, || {
                self.request(Method::POST, "experiments/search")
                    .json(&json!({
                        "max_results": EXPERIMENTS_PER_PAGE,
                        "view_type": "ACTIVE_ONLY",
                        "order_by": ["experiment_id ASC"],
                        "page_token": token.unwrap_or_default(),
                    }))
            })
            .await?;
        let items = answer
            .experiments
            .into_iter()
            .map(|it| it.experiment_id)
            .collect();
        Ok(Page {
            items,
            next: answer.next_page_token.filter(|token| !token.is_empty()),
        })
    }

    async fn runs(&self, experiments: &[String], token: Option<&str>) -> TrackingResult<Page<Run>> {
        let answer: RunsAnswer = self
            .call("the runs", LONGEST_CALL, || {
                self.request(Method::POST, "runs/search").json(&json!({
                    "experiment_ids": experiments,
                    "run_view_type": "ACTIVE_ONLY",
                    "max_results": RUNS_PER_PAGE,
                    // Pages are offsets on the server: an order in which new runs come last keeps
                    // them from shifting.
                    "order_by": ["start_time ASC"],
                    "page_token": token.unwrap_or_default(),
                }))
            })
            .await?;
        let items = answer.runs.into_iter().map(|run| run.info.into()).collect();
        Ok(Page {
            items,
            next: answer.next_page_token.filter(|token| !token.is_empty()),
        })
    }
}

impl From<RunInfo> for Run {
    fn from(info: RunInfo) -> Self {
        Self {
            lifecycle: if info.lifecycle_stage == "deleted" {
                Lifecycle::Deleted
            } else {
                Lifecycle::Active
            },
            start_time: info.start_time.as_ref().and_then(milliseconds),
            end_time: info.end_time.as_ref().and_then(milliseconds),
            run_id: info.run_id,
            run_name: info.run_name,
            experiment_id: info.experiment_id,
            artifact_uri: info.artifact_uri,
            status: info.status,
        }
    }
}

/// Milliseconds since 1970; protobuf's JSON writes 64-bit numbers as strings.
fn milliseconds(value: &Value) -> Option<SystemTime> {
    let number = value.as_u64().or_else(|| value.as_str()?.parse().ok())?;
    SystemTime::UNIX_EPOCH
        .checked_add(Duration::from_millis(number))
        .filter(|_| number > 0)
}

/// What can be a run id; anything else is not asked for.
fn is_run_id(text: &str) -> bool {
    (1..=256).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(EXCERPT)]);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// An error with its causes, which is where reqwest keeps "connection refused".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

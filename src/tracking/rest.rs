//! MLflow's tracking REST API (`/api/2.0`), as of MLflow 3.17.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use reqwest::Method;
use serde_json::{Value, json};

use super::failure::{Failure, Subject};
use super::settings::{SettingError, TrackingSettings};
use super::transport::{Call, Patience, Transport, settle};
use super::wire::{ExperimentsAnswer, RunAnswer, RunsAnswer};
use super::{Page, Run, Tracking, TrackingError, TrackingResult};

/// Runs of one page; MLflow's limit is 50 000. The smaller sizes are for servers whose runs are so
/// large (parameters, metrics and tags come along) that a page exceeds what is read of an answer.
const RUNS_PER_PAGE: [u32; 3] = [1000, 100, 10];
/// Experiments of one page; MLflow's limit is 50 000.
const EXPERIMENTS_PER_PAGE: u32 = 1000;
/// Longest run id, bytes: MLflow's own limit.
const LONGEST_RUN_ID: usize = 256;
/// At start-up somebody waits for the mount: a server that refuses connections is told within a
/// second, one that does not answer within ten.
const PROBE: Patience = Patience {
    longest: Duration::from_secs(10),
    retries: 2,
};

/// A tracking server.
#[derive(Debug)]
pub struct RestTracking {
    transport: Transport,
    /// Index into [`RUNS_PER_PAGE`]; only grows.
    page_size: AtomicUsize,
}

impl RestTracking {
    /// A client for the server; sends nothing.
    ///
    /// # Errors
    /// A certificate file that cannot be used, a token or workspace that fits no header.
    pub fn new(settings: TrackingSettings) -> Result<Self, SettingError> {
        Ok(Self {
            transport: Transport::new(settings)?,
            page_size: AtomicUsize::new(0),
        })
    }

    fn not_found(&self, run_id: &str) -> TrackingError {
        TrackingError::NotFound {
            server: self.transport.name().to_owned(),
            what: Subject::Run(run_id).to_string(),
        }
    }

    async fn search<T: serde::de::DeserializeOwned>(
        &self,
        subject: Subject<'_>,
        path: &'static str,
        body: Value,
    ) -> Result<T, Failure> {
        let call = Call {
            subject,
            method: Method::POST,
            path,
            query: &[],
            body: Some(body),
        };
        self.transport.call(&call, self.transport.patience()).await
    }

    async fn search_runs(
        &self,
        experiments: &[String],
        token: Option<&str>,
        maximum: u32,
    ) -> Result<RunsAnswer, Failure> {
        let body = json!({
            "experiment_ids": experiments,
            "run_view_type": "ACTIVE_ONLY",
            "max_results": maximum,
            // Pages are offsets on the server: an order in which new runs come last keeps them
            // from shifting while they are read.
            "order_by": ["start_time ASC", "run_id ASC"],
            "page_token": token.unwrap_or_default(),
        });
        self.search(Subject::Runs, "runs/search", body).await
    }
}

#[async_trait]
impl Tracking for RestTracking {
    fn name(&self) -> &str {
        self.transport.name()
    }

    async fn probe(&self) -> TrackingResult<()> {
        let call = Call {
            subject: Subject::Experiments,
            method: Method::GET,
            path: "experiments/search",
            query: &[("max_results", "1")],
            body: None,
        };
        settle(self.transport.call::<ExperimentsAnswer>(&call, PROBE).await)?;
        Ok(())
    }

    async fn run(&self, run_id: &str) -> TrackingResult<Run> {
        if !is_run_id(run_id) {
            return Err(self.not_found(run_id));
        }
        let call = Call {
            subject: Subject::Run(run_id),
            method: Method::GET,
            path: "runs/get",
            query: &[("run_id", run_id)],
            body: None,
        };
        let patience = self.transport.patience();
        let answer: RunAnswer = settle(self.transport.call(&call, patience).await)?;
        let run = Run::from(answer.run.info);
        // Some databases compare without regard to case: only its own name is a run's name.
        if run.run_id != run_id {
            return Err(self.not_found(run_id));
        }
        Ok(run)
    }

    async fn experiments(&self, token: Option<&str>) -> TrackingResult<Page<String>> {
        let body = json!({
            "max_results": EXPERIMENTS_PER_PAGE,
            "view_type": "ACTIVE_ONLY",
            "order_by": ["experiment_id ASC"],
            "page_token": token.unwrap_or_default(),
        });
        let subject = Subject::Experiments;
        let answer = self.search(subject, "experiments/search", body).await;
        let answer: ExperimentsAnswer = settle(answer)?;
        let experiments = answer.experiments.into_iter();
        Ok(Page {
            items: experiments.map(|it| it.experiment_id).collect(),
            next: answer.next_page_token.filter(|token| !token.is_empty()),
        })
    }

    async fn runs(&self, experiments: &[String], token: Option<&str>) -> TrackingResult<Page<Run>> {
        let mut index = self.page_size.load(Ordering::Relaxed);
        let answer = loop {
            let maximum = RUNS_PER_PAGE[index];
            let answer = self.search_runs(experiments, token, maximum).await;
            if matches!(answer, Err(Failure::TooLarge(_))) && index + 1 < RUNS_PER_PAGE.len() {
                // The token says where the page begins, not how long it is.
                index += 1;
                self.page_size.fetch_max(index, Ordering::Relaxed);
                continue;
            }
            break settle(answer)?;
        };
        let runs = answer.runs.into_iter().map(|run| Run::from(run.info));
        Ok(Page {
            // What is no run id could not be looked up again, and might be no file name either.
            items: runs.filter(|run| is_run_id(&run.run_id)).collect(),
            next: answer.next_page_token.filter(|token| !token.is_empty()),
        })
    }
}

/// What can be a run id; anything else is not asked for.
pub(super) fn is_run_id(text: &str) -> bool {
    (1..=LONGEST_RUN_ID).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

#[cfg(test)]
mod tests;

//! What is made on a server, and changed. Nothing of that is sent a second time when an answer is lost, but
//! for what comes to the same.

use std::time::{SystemTime, UNIX_EPOCH};

use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::RestTracking;
use crate::tracking::failure::Subject;
use crate::tracking::transport::{Call, Patience, settle};
use crate::tracking::wire::{LoggedModelAnswer, RunAnswer};
use crate::tracking::{Experiment, LoggedModel, Run, TrackingResult};

#[derive(Deserialize)]
struct Made {
    experiment_id: String,
}

/// Whatever the server says besides that it is done.
#[derive(Deserialize)]
struct Done {}

impl RestTracking {
    async fn change<T: serde::de::DeserializeOwned>(
        &self,
        (what, method, path): (&str, Method, &str),
        body: Value,
        retries: u32,
    ) -> TrackingResult<T> {
        let call = Call {
            subject: Subject::Change(what),
            method,
            path,
            query: &[],
            body: Some(body),
        };
        let longest = self.transport.patience().longest;
        settle(
            self.transport
                .call(&call, Patience { longest, retries })
                .await,
        )
    }

    pub(super) async fn make_experiment(&self, name: &str) -> TrackingResult<Experiment> {
        let what = format!("making experiment {name:?}");
        let call = (what.as_str(), Method::POST, "experiments/create");
        let made: Made = self.change(call, json!({"name": name}), 0).await?;
        Ok(Experiment {
            experiment_id: made.experiment_id,
            name: name.to_owned(),
            modified: Some(SystemTime::now()),
        })
    }

    pub(super) async fn make_run(&self, experiment: &str, name: &str) -> TrackingResult<Run> {
        let what = format!("making run {name:?}");
        let call = (what.as_str(), Method::POST, "runs/create");
        let body = json!({
            "experiment_id": experiment,
            "run_name": name,
            "start_time": now(),
        });
        let made: RunAnswer = self.change(call, body, 0).await?;
        Ok(Run::from(made.run.info))
    }

    pub(super) async fn finish_run(&self, run_id: &str, status: &str) -> TrackingResult<()> {
        let what = format!("ending run {run_id}");
        let call = (what.as_str(), Method::POST, "runs/update");
        let body = json!({"run_id": run_id, "status": status, "end_time": now()});
        let retries = self.transport.patience().retries;
        let _: Done = self.change(call, body, retries).await?;
        Ok(())
    }

    pub(super) async fn make_logged_model(
        &self,
        run: &Run,
        name: &str,
    ) -> TrackingResult<LoggedModel> {
        let run_id = &run.run_id;
        let what = format!("making model {name:?} of run {run_id}");
        let body = json!({
            "experiment_id": run.experiment_id,
            "name": name,
            "source_run_id": run_id,
        });
        let call = (what.as_str(), Method::POST, "logged-models");
        let made: LoggedModelAnswer = self.change(call, body, 0).await?;
        let model = LoggedModel::from(made.model);
        let body = json!({
            "run_id": run_id,
            "models": [{"model_id": model.model_id, "step": 0}],
        });
        let call = (what.as_str(), Method::POST, "runs/outputs");
        // To tell it twice comes to the same.
        let retries = self.transport.patience().retries;
        if let Err(error) = self.change::<Done>(call, body, retries).await {
            let _ = self.mark_logged_model(&model.model_id, false).await;
            return Err(error);
        }
        Ok(model)
    }

    pub(super) async fn mark_logged_model(
        &self,
        model_id: &str,
        ready: bool,
    ) -> TrackingResult<()> {
        let what = format!("marking model {model_id}");
        let status = match ready {
            true => "LOGGED_MODEL_READY",
            false => "LOGGED_MODEL_UPLOAD_FAILED",
        };
        let path = format!("logged-models/{model_id}");
        let call = (what.as_str(), Method::PATCH, path.as_str());
        let body = json!({"model_id": model_id, "status": status});
        let retries = self.transport.patience().retries;
        let _: Done = self.change(call, body, retries).await?;
        Ok(())
    }
}

/// Milliseconds, as MLflow keeps times.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

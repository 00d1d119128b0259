//! `mlfs log-model`: what `mlflow.log_model` does, for whoever writes the files.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::wait::{self, Place};
use super::{WrongUsage, run, server};
use crate::catalog::{MODELS, RootId};
use crate::config::parse_duration;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The directory of the run that makes the model; with --ready or --failed that of the model
    #[arg(value_name = "PATH")]
    path: PathBuf,

    /// The model's name in the run
    #[arg(value_name = "NAME", required_unless_present_any = ["ready", "failed"],
          conflicts_with_all = ["ready", "failed"])]
    name: Option<String>,

    /// Wait until the model at PATH is stored, then mark it as ready
    #[arg(long, conflicts_with = "failed")]
    ready: bool,

    /// Mark the model at PATH as one that could not be saved
    #[arg(long)]
    failed: bool,

    /// How long to wait for what is not stored yet (30s, 15m, 0, forever)
    #[arg(long, value_name = "DURATION", default_value = "forever", value_parser = parse_duration)]
    timeout: Duration,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let place = wait::place(&arguments.path)?;
    let tracking = server::of_mount(&place)?;
    let Some(name) = &arguments.name else {
        let model_id = model_of(arguments, &place)?;
        if arguments.ready {
            wait::until_stored(&arguments.path, &place, arguments.timeout)?;
        }
        return server::answer(tracking.finish_logged_model(&model_id, arguments.ready));
    };
    let run_id = run::run_of(&arguments.path, &place)?;
    let model = server::answer(async {
        let run = tracking.run(&run_id).await?;
        tracking.create_logged_model(&run, name).await
    })?;
    let directory = place.0.join(MODELS).join(model.model_id);
    Ok(writeln!(io::stdout(), "{}", directory.display())?)
}

/// The id of the logged model that the path leads to.
fn model_of(arguments: &Arguments, (_, below): &Place) -> anyhow::Result<String> {
    let root = below.to_str().and_then(RootId::of_path);
    let is_root = below.components().count() == 2;
    match root {
        Some(RootId::Model(model_id)) if is_root => Ok(model_id.to_string()),
        _ => Err(WrongUsage(format!(
            "{}: not a logged model's directory; give one like MOUNTPOINT/{MODELS}/m-…",
            arguments.path.display()
        ))
        .into()),
    }
}

//! Experiments and runs that are made by making a directory.

use std::sync::Arc;

use tokio::time::Instant;

use super::branch::{experiment, run_link};
use super::cache::KnownRoot;
use super::{Branch, Catalog, CatalogError, Item, RootId, naming};
use crate::tracking::TrackingError;

impl Catalog {
    /// Makes what a directory of this name in a branch is: an experiment; or a run, whose artifact root
    /// is returned, and to which the name leads from now on.
    ///
    /// # Errors
    /// `Invalid` for names that MLflow cannot give back; `ReadOnly` where nothing is made; the server's.
    pub async fn make(self: &Arc<Self>, branch: &Branch, name: &str) -> Result<Item, CatalogError> {
        let wanted = naming::decode(name).ok_or_else(|| TrackingError::Invalid {
            server: self.tracking.name().to_owned(),
            what: format!("making {name:?}"),
            detail:
                "give it as it is listed, with %2F for a slash and %2E for a dot at the beginning"
                    .to_owned(),
        })?;
        // Somebody else may have made it since it was not there.
        match self.find_anew(branch, name).await {
            Ok(_) => return Err(self.exists(name)),
            Err(CatalogError::Tracking(TrackingError::NotFound { .. })) => {}
            Err(error) => return Err(error),
        }
        // Whatever comes of it, that it is not there is no longer known.
        self.branches.forget(branch, name);
        let asked = Instant::now();
        let (known, made) = match branch {
            Branch::Experiments => {
                let made = self.tracking.create_experiment(&wanted).await;
                let made = experiment(&self.noted(made)?);
                (made.clone(), made)
            }
            Branch::Experiment(id) => {
                let made = self.noted(self.tracking.create_run(id, &wanted).await)?;
                let named = self.noted(self.tracking.runs_named(id, &wanted).await)?;
                if named
                    .first()
                    .is_some_and(|first| first.run_id != made.run_id)
                {
                    tracing::warn!(
                        run_id = made.run_id,
                        name,
                        "another run of that name was made at the same time, and has it"
                    );
                    return Err(self.exists(name));
                }
                let id = RootId::run(&made.run_id);
                let root = Arc::new(KnownRoot::of_run(&made));
                let entry = root.entry(&id);
                self.cache.put(&id, Some(root), asked);
                (run_link(&made), Item::Root(entry))
            }
            Branch::Models | Branch::Versions(_) => {
                return Err(self.tracking.read_only(format!("making {name:?}")).into());
            }
        };
        self.branches
            .put(branch, &name.into(), Some(known), Instant::now());
        Ok(made)
    }

    fn exists(&self, name: &str) -> CatalogError {
        TrackingError::Exists {
            server: self.tracking.name().to_owned(),
            what: format!("{name:?}"),
        }
        .into()
    }
}

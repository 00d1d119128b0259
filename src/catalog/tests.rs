use std::sync::atomic::AtomicUsize;

use super::*;
use crate::tracking::{Page, TrackingResult};

#[derive(Debug, Default)]
struct Fake {
    asked: AtomicUsize,
    down: AtomicBool,
}

fn run(run_id: &str, lifecycle: Lifecycle) -> Run {
    Run {
        run_id: run_id.to_owned(),
        run_name: String::new(),
        experiment_id: "0".to_owned(),
        artifact_uri: format!("s3://bucket/{run_id}/artifacts"),
        lifecycle,
        status: "FINISHED".to_owned(),
        start_time: None,
        end_time: None,
    }
}

#[async_trait]
impl Tracking for Fake {
    fn name(&self) -> &str {
        "http://fake"
    }

    async fn probe(&self) -> TrackingResult<()> {
        Ok(())
    }

    async fn run(&self, run_id: &str) -> TrackingResult<Run> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        tokio::task::yield_now().await;
        let server = self.name().to_owned();
        if self.down.load(Ordering::Relaxed) {
            return Err(TrackingError::Unavailable {
                server,
                detail: "refused".to_owned(),
            });
        }
        match run_id {
            "here" => Ok(run(run_id, Lifecycle::Active)),
            "deleted" => Ok(run(run_id, Lifecycle::Deleted)),
            _ => Err(TrackingError::NotFound {
                server,
                what: run_id.to_owned(),
            }),
        }
    }

    async fn experiments(&self, token: Option<&str>) -> TrackingResult<Page<String>> {
        Ok(match token {
            None => Page {
                items: vec!["0".to_owned()],
                next: Some("more".to_owned()),
            },
            Some(_) => Page {
                items: vec!["1".to_owned()],
                next: None,
            },
        })
    }

    async fn runs(&self, experiments: &[String], token: Option<&str>) -> TrackingResult<Page<Run>> {
        let experiment = &experiments[0];
        let name = |index: usize| run(&format!("{experiment}-{index}"), Lifecycle::Active);
        Ok(match token {
            None => Page {
                items: vec![name(0), name(1)],
                next: Some("next".to_owned()),
            },
            // The page has shifted by one.
            Some(_) => Page {
                items: vec![name(1), name(2)],
                next: None,
            },
        })
    }
}

fn catalog(ttl: Duration) -> (Arc<Fake>, Arc<Catalog>) {
    let fake = Arc::new(Fake::default());
    let stores = Arc::new(Stores::new(crate::store::s3::S3Settings::default()));
    let tracking: Arc<dyn Tracking> = Arc::<Fake>::clone(&fake);
    (Arc::clone(&fake), Catalog::new(tracking, stores, ttl))
}

#[tokio::test(start_paused = true)]
async fn a_run_is_asked_for_once_per_ttl_and_so_is_one_that_is_missing() {
    let ttl = Duration::from_secs(5);
    let (fake, catalog) = catalog(ttl);
    for _ in 0..3 {
        catalog.run_entry("here").await.unwrap();
        let missing = catalog.run_entry("nowhere").await.unwrap_err();
        assert_eq!(missing.errno(), libc::ENOENT);
    }
    assert_eq!(fake.asked.load(Ordering::Relaxed), 2);
    tokio::time::advance(ttl).await;
    catalog.run_entry("here").await.unwrap();
    assert_eq!(fake.asked.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn concurrent_callers_share_one_request_even_without_a_ttl() {
    let (fake, catalog) = catalog(Duration::ZERO);
    let (one, two) = tokio::join!(catalog.run_entry("here"), catalog.run_entry("here"));
    assert_eq!(one.unwrap(), two.unwrap());
    assert_eq!(fake.asked.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_deleted_run_is_not_shown() {
    let (_, catalog) = catalog(Duration::from_secs(5));
    assert_eq!(
        catalog.run_entry("deleted").await.unwrap_err().errno(),
        libc::ENOENT
    );
}

#[tokio::test(start_paused = true)]
async fn known_runs_go_on_while_the_server_is_away_and_unknown_ones_are_eio() {
    let ttl = Duration::from_secs(5);
    let (fake, catalog) = catalog(ttl);
    catalog.run_entry("here").await.unwrap();
    fake.down.store(true, Ordering::Relaxed);
    tokio::time::advance(ttl * 2).await;
    catalog.run_entry("here").await.unwrap();
    assert_eq!(
        catalog.run_entry("other").await.unwrap_err().errno(),
        libc::EIO
    );
}

#[tokio::test]
async fn a_listing_pages_through_all_experiments_and_shows_no_run_twice() {
    let (fake, catalog) = catalog(Duration::from_secs(5));
    let mut listing = catalog.list_runs();
    let mut names = Vec::new();
    while let Some(page) = listing.next_page().await.unwrap() {
        names.extend(page.into_iter().map(|run| run.run_id));
    }
    assert_eq!(names, ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]);
    // What was listed is known.
    catalog.run_entry("0-1").await.unwrap();
    assert_eq!(fake.asked.load(Ordering::Relaxed), 0);
}

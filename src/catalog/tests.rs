mod branches;

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use tokio::sync::Semaphore;

use super::*;
use crate::tracking::{Experiment, Page, Run};

const TTL: Duration = Duration::from_secs(5);

/// How the fake server answers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Mood {
    #[default]
    Well,
    Down,
    Denying,
    Nonsense,
    Panicking,
}

/// A tracking server in memory; experiment ids are numbers, pages have two entries.
#[derive(Debug)]
struct Fake {
    runs: Mutex<BTreeMap<String, Run>>,
    experiments: Mutex<Vec<String>>,
    mood: Mutex<Mood>,
    asked: AtomicUsize,
    /// Lookups wait for a permit each.
    gate: Semaphore,
    /// Done once, after the first page of runs was answered.
    meanwhile: Mutex<Option<Run>>,
    stuck_token: bool,
}

impl Fake {
    fn new() -> Self {
        Self {
            runs: Mutex::default(),
            experiments: Mutex::new(vec!["0".to_owned()]),
            mood: Mutex::default(),
            asked: AtomicUsize::new(0),
            gate: Semaphore::new(Semaphore::MAX_PERMITS),
            meanwhile: Mutex::default(),
            stuck_token: false,
        }
    }

    fn add(&self, run: Run) {
        self.runs.lock().insert(run.run_id.clone(), run);
    }

    fn feel(&self, mood: Mood) {
        *self.mood.lock() = mood;
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    async fn respond<T>(&self, answer: impl FnOnce() -> TrackingResult<T>) -> TrackingResult<T> {
        let server = self.name().to_owned();
        let (what, detail) = (String::new(), String::new());
        let mood = *self.mood.lock();
        match mood {
            Mood::Well => answer(),
            Mood::Down => Err(TrackingError::Unavailable { server, detail }),
            Mood::Denying => Err(TrackingError::PermissionDenied {
                server,
                what,
                detail,
            }),
            Mood::Nonsense => Err(TrackingError::Protocol {
                server,
                what,
                detail,
            }),
            Mood::Panicking => panic!("on purpose"),
        }
    }
}

fn experiment(experiment_id: String) -> Experiment {
    Experiment {
        name: format!("name of {experiment_id}"),
        experiment_id,
        modified: None,
    }
}

fn run(run_id: &str) -> Run {
    let start = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
    Run {
        run_id: run_id.to_owned(),
        run_name: String::new(),
        experiment_id: "0".to_owned(),
        artifact_uri: format!("s3://bucket/{run_id}/artifacts"),
        lifecycle: Lifecycle::Active,
        status: "FINISHED".to_owned(),
        start_time: Some(start),
        end_time: None,
    }
}

fn page<T: Clone>(all: &[T], token: Option<&str>) -> Page<T> {
    let from: usize = token.map_or(0, |token| token.parse().unwrap());
    let end = (from + 2).min(all.len());
    Page {
        items: all[from.min(end)..end].to_vec(),
        next: (end < all.len()).then(|| end.to_string()),
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
        self.asked.fetch_add(1, Ordering::SeqCst);
        let _permit = self.gate.acquire().await;
        self.respond(|| {
            let found = self.runs.lock().get(run_id).cloned();
            found.ok_or_else(|| TrackingError::NotFound {
                server: self.name().to_owned(),
                what: run_id.to_owned(),
            })
        })
        .await
    }

    async fn experiments(&self, token: Option<&str>) -> TrackingResult<Page<Experiment>> {
        let answer = self.respond(|| Ok(page(&self.experiments.lock(), token)));
        let Page { items, next } = answer.await?;
        Ok(Page {
            items: items.into_iter().map(experiment).collect(),
            next,
        })
    }

    async fn runs(&self, experiments: &[String], token: Option<&str>) -> TrackingResult<Page<Run>> {
        let answer = self
            .respond(|| {
                let wanted: HashSet<&String> = experiments.iter().collect();
                let runs = self.runs.lock();
                let runs: Vec<Run> = runs
                    .values()
                    .filter(|run| wanted.contains(&run.experiment_id))
                    .cloned()
                    .collect();
                let mut answer = page(&runs, token);
                if self.stuck_token && answer.next.is_some() {
                    answer.next = Some("2".to_owned());
                }
                Ok(answer)
            })
            .await;
        if let Some(run) = self.meanwhile.lock().take() {
            self.add(run);
        }
        answer
    }
}

fn catalog_of(fake: Fake, ttl: Duration) -> (Arc<Fake>, Arc<Catalog>) {
    let fake = Arc::new(fake);
    let stores = Arc::new(Stores::new(crate::store::s3::S3Settings::default()));
    let tracking: Arc<dyn Tracking> = Arc::<Fake>::clone(&fake);
    (fake, Catalog::new(tracking, stores, ttl))
}

/// A server with the active run "here" and the deleted run "deleted".
fn catalog(ttl: Duration) -> (Arc<Fake>, Arc<Catalog>) {
    let fake = Fake::new();
    fake.add(run("here"));
    fake.add(Run {
        lifecycle: Lifecycle::Deleted,
        ..run("deleted")
    });
    catalog_of(fake, ttl)
}

async fn errno(catalog: &Arc<Catalog>, run_id: &str) -> i32 {
    match catalog.root_entry(&RootId::run(run_id)).await {
        Ok(_) => 0,
        Err(error) => error.errno(),
    }
}

/// Lets the tasks that wait for nothing run.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

async fn list(catalog: &Arc<Catalog>) -> Vec<String> {
    let mut listing = catalog.list_runs();
    let mut names = Vec::new();
    while let Some(page) = listing.next_page().await.unwrap() {
        assert!(!page.is_empty());
        names.extend(page.into_iter().map(|run| run.id.name().to_string()));
    }
    names
}

#[tokio::test(start_paused = true)]
async fn a_run_is_asked_for_once_per_ttl_and_so_is_one_that_is_missing_or_deleted() {
    let (fake, catalog) = catalog(TTL);
    for _ in 0..3 {
        assert_eq!(errno(&catalog, "here").await, 0);
        assert_eq!(errno(&catalog, "nowhere").await, libc::ENOENT);
        assert_eq!(errno(&catalog, "deleted").await, libc::ENOENT);
    }
    assert_eq!(fake.asked(), 3);
    tokio::time::advance(TTL).await;
    assert_eq!(errno(&catalog, "here").await, 0);
    assert_eq!(fake.asked(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_is_deleted_or_restored_is_seen_so_after_the_ttl() {
    let (fake, catalog) = catalog(TTL);
    assert_eq!(errno(&catalog, "here").await, 0);
    assert_eq!(errno(&catalog, "deleted").await, libc::ENOENT);
    fake.runs.lock().remove("here");
    fake.add(run("deleted"));
    tokio::time::advance(TTL).await;
    assert_eq!(errno(&catalog, "here").await, libc::ENOENT);
    assert_eq!(errno(&catalog, "deleted").await, 0);
}

#[tokio::test(start_paused = true)]
async fn the_ttl_may_be_for_ever_and_never() {
    let (fake, for_ever) = catalog(Duration::MAX);
    assert_eq!(errno(&for_ever, "here").await, 0);
    tokio::time::advance(Duration::from_secs(1 << 40)).await;
    assert_eq!(errno(&for_ever, "here").await, 0);
    assert_eq!(fake.asked(), 1);
    let (fake, never) = catalog(Duration::ZERO);
    for _ in 0..3 {
        assert_eq!(errno(&never, "here").await, 0);
        assert_eq!(errno(&never, "nowhere").await, libc::ENOENT);
    }
    assert_eq!(fake.asked(), 6);
    assert_eq!(never.known_root(&RootId::run("here")), None);
}

#[tokio::test(start_paused = true)]
async fn concurrent_callers_share_one_request_and_its_failure_even_without_a_ttl() {
    let (fake, catalog) = catalog(Duration::ZERO);
    for mood in [Mood::Well, Mood::Down, Mood::Panicking] {
        let before = fake.asked();
        fake.feel(mood);
        let permits = fake.gate.forget_permits(usize::MAX);
        let callers: Vec<_> = (0..20)
            .map(|_| {
                let catalog = Arc::clone(&catalog);
                tokio::spawn(async move { errno(&catalog, "other").await })
            })
            .collect();
        settle().await;
        fake.gate.add_permits(permits);
        let expected = if mood == Mood::Well {
            libc::ENOENT
        } else {
            libc::EIO
        };
        for caller in callers {
            assert_eq!(caller.await.unwrap(), expected, "{mood:?}");
        }
        assert_eq!(fake.asked() - before, 1, "{mood:?}");
        assert!(catalog.flights.lock().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_gives_up_leaves_the_request_to_the_others() {
    let (fake, catalog) = catalog(TTL);
    let permits = fake.gate.forget_permits(usize::MAX);
    let waiting = timeout(
        Duration::from_secs(1),
        catalog.root_entry(&RootId::run("here")),
    )
    .await;
    assert!(waiting.is_err());
    fake.gate.add_permits(permits);
    assert_eq!(errno(&catalog, "here").await, 0);
    assert_eq!(fake.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn failures_are_not_remembered() {
    let (fake, catalog) = catalog(TTL);
    for (mood, expected) in [
        (Mood::Down, libc::EIO),
        (Mood::Nonsense, libc::EIO),
        (Mood::Denying, libc::EACCES),
        (Mood::Well, 0),
    ] {
        fake.feel(mood);
        assert_eq!(errno(&catalog, "here").await, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn known_runs_go_on_while_the_server_is_away_and_unknown_ones_are_eio() {
    for mood in [Mood::Down, Mood::Nonsense] {
        let (fake, catalog) = catalog(TTL);
        assert_eq!(errno(&catalog, "here").await, 0);
        fake.feel(mood);
        tokio::time::advance(TTL * 2).await;
        assert_eq!(errno(&catalog, "here").await, 0);
        assert_eq!(errno(&catalog, "other").await, libc::EIO);
        tokio::time::advance(GRACE).await;
        // The outage is known, but there is nothing left to go on with.
        assert_eq!(errno(&catalog, "here").await, libc::EIO);
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_not_asked_into_by_every_call_and_ends_by_itself() {
    let (fake, catalog) = catalog(TTL);
    assert_eq!(errno(&catalog, "here").await, 0);
    fake.feel(Mood::Down);
    tokio::time::advance(TTL).await;
    for _ in 0..50 {
        assert_eq!(errno(&catalog, "here").await, 0);
        settle().await;
    }
    assert_eq!(fake.asked(), 2);
    assert!(catalog.outage.is_known());
    // The server is back, and the run is gone: the first call asks behind the scenes, the next
    // one knows.
    fake.feel(Mood::Well);
    fake.runs.lock().remove("here");
    tokio::time::advance(Duration::from_secs(60)).await;
    assert_eq!(errno(&catalog, "here").await, 0);
    settle().await;
    assert!(!catalog.outage.is_known());
    assert_eq!(errno(&catalog, "here").await, libc::ENOENT);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_ends_an_outage_and_counts() {
    let (fake, catalog) = catalog(TTL);
    assert_eq!(errno(&catalog, "here").await, 0);
    tokio::time::advance(TTL).await;
    fake.feel(Mood::Down);
    assert_eq!(errno(&catalog, "here").await, 0);
    fake.feel(Mood::Denying);
    tokio::time::advance(Duration::from_secs(60)).await;
    assert_eq!(errno(&catalog, "here").await, 0);
    settle().await;
    assert_eq!(errno(&catalog, "here").await, libc::EACCES);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_hangs_holds_up_one_call_in_a_known_run_and_no_more() {
    let (fake, catalog) = catalog(TTL);
    assert_eq!(errno(&catalog, "here").await, 0);
    tokio::time::advance(TTL).await;
    let permits = fake.gate.forget_permits(usize::MAX);
    let begun = Instant::now();
    assert_eq!(errno(&catalog, "here").await, 0);
    assert_eq!(begun.elapsed(), PATIENCE);
    assert_eq!(errno(&catalog, "here").await, 0);
    assert_eq!(begun.elapsed(), PATIENCE);
    // The answer, when it comes, ends the outage and counts.
    fake.gate.add_permits(permits);
    settle().await;
    assert!(!catalog.outage.is_known());
    assert_eq!(fake.asked(), 2);
}

#[tokio::test]
async fn a_listing_pages_through_all_experiments_and_what_it_lists_is_known() {
    let fake = Fake::new();
    *fake.experiments.lock() = (0..5).map(|id| id.to_string()).collect();
    for experiment in [0, 1, 4] {
        for index in 0..3 {
            fake.add(Run {
                experiment_id: experiment.to_string(),
                ..run(&format!("{experiment}-{index}"))
            });
        }
    }
    let (fake, catalog) = catalog_of(fake, TTL);
    let names = list(&catalog).await;
    let expected = [
        "0-0", "0-1", "0-2", "1-0", "1-1", "1-2", "4-0", "4-1", "4-2",
    ];
    assert_eq!(names, expected);
    let entry = catalog.root_entry(&RootId::run("0-1")).await.unwrap();
    assert_eq!(catalog.known_root(&RootId::run("0-1")), Some(entry));
    assert_eq!(catalog.known_root(&RootId::run("nowhere")), None);
    let root = catalog.root(&RootId::run("4-2")).await.unwrap();
    assert_eq!(root.location.prefix, "4-2/artifacts");
    assert_eq!(fake.asked(), 0);
}

#[tokio::test]
async fn no_request_of_a_listing_names_more_experiments_than_the_bound() {
    #[derive(Debug)]
    struct Wide(Mutex<Vec<usize>>);

    #[async_trait]
    impl Tracking for Wide {
        fn name(&self) -> &str {
            "http://wide"
        }

        async fn probe(&self) -> TrackingResult<()> {
            Ok(())
        }

        async fn run(&self, _: &str) -> TrackingResult<Run> {
            Ok(run("any"))
        }

        async fn experiments(&self, _: Option<&str>) -> TrackingResult<Page<Experiment>> {
            let ids = (0..1050).map(|id| (id % 1030).to_string());
            Ok(Page {
                items: ids.map(experiment).collect(),
                next: None,
            })
        }

        async fn runs(&self, ids: &[String], _: Option<&str>) -> TrackingResult<Page<Run>> {
            self.0.lock().push(ids.len());
            Ok(Page {
                items: Vec::new(),
                next: None,
            })
        }
    }

    let wide = Arc::new(Wide(Mutex::default()));
    let stores = Arc::new(Stores::new(crate::store::s3::S3Settings::default()));
    let tracking: Arc<dyn Tracking> = Arc::<Wide>::clone(&wide);
    assert!(list(&Catalog::new(tracking, stores, TTL)).await.is_empty());
    let asked = wide.0.lock().clone();
    assert!(asked.iter().all(|count| *count <= 100), "{asked:?}");
    // Experiments that are listed twice are searched once.
    assert_eq!(asked.iter().sum::<usize>(), 1030);
}

#[tokio::test]
async fn pages_that_shift_while_they_are_read_show_no_run_twice() {
    let fake = Fake::new();
    for name in ["b", "c", "d", "e"] {
        fake.add(run(name));
    }
    *fake.meanwhile.lock() = Some(run("a"));
    let (_, catalog) = catalog_of(fake, TTL);
    assert_eq!(list(&catalog).await, ["b", "c", "d", "e"]);
}

#[tokio::test]
async fn a_listing_that_fails_goes_on_where_it_failed() {
    let fake = Fake::new();
    for name in ["a", "b", "c"] {
        fake.add(run(name));
    }
    let (fake, catalog) = catalog_of(fake, TTL);
    let mut listing = catalog.list_runs();
    assert_eq!(listing.next_page().await.unwrap().unwrap().len(), 2);
    fake.feel(Mood::Down);
    assert_eq!(listing.next_page().await.unwrap_err().errno(), libc::EIO);
    fake.feel(Mood::Well);
    assert_eq!(
        listing.next_page().await.unwrap().unwrap()[0].id,
        RootId::run("c")
    );
    assert_eq!(listing.next_page().await.unwrap(), None);
}

#[tokio::test]
async fn a_server_whose_pages_never_end_is_an_error() {
    let mut fake = Fake::new();
    fake.stuck_token = true;
    for index in 0..9 {
        fake.add(run(&index.to_string()));
    }
    let (_, catalog) = catalog_of(fake, TTL);
    let mut listing = catalog.list_runs();
    assert!(listing.next_page().await.unwrap().is_some());
    assert_eq!(listing.next_page().await.unwrap_err().errno(), libc::EIO);
}

#[tokio::test(start_paused = true)]
async fn a_page_that_arrives_late_does_not_undo_what_a_later_lookup_learned() {
    let (fake, catalog) = catalog(TTL);
    let asked = Instant::now();
    let listed = run("here");
    fake.runs.lock().remove("here");
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(errno(&catalog, "here").await, libc::ENOENT);
    let known = Some(Arc::new(KnownRoot::of_run(&listed)));
    catalog.cache.put(&RootId::run("here"), known, asked);
    assert_eq!(errno(&catalog, "here").await, libc::ENOENT);
}

#[tokio::test]
async fn a_run_in_a_store_that_is_not_served_is_found_and_only_entering_it_fails() {
    let fake = Fake::new();
    fake.add(Run {
        artifact_uri: "hdfs://namenode/path".to_owned(),
        ..run("elsewhere")
    });
    let (_, catalog) = catalog_of(fake, TTL);
    assert_eq!(errno(&catalog, "elsewhere").await, 0);
    let entered = catalog.root(&RootId::run("elsewhere")).await.unwrap_err();
    assert_eq!(entered.errno(), libc::EOPNOTSUPP);
}

#[tokio::test]
async fn times_are_the_runs_own_and_the_epoch_where_unknown() {
    let fake = Fake::new();
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    fake.add(run("running"));
    fake.add(Run {
        end_time: Some(at(200)),
        ..run("finished")
    });
    fake.add(Run {
        start_time: None,
        ..run("timeless")
    });
    let (_, catalog) = catalog_of(fake, TTL);
    for (run_id, created, modified) in [
        ("running", 100, 100),
        ("finished", 100, 200),
        ("timeless", 0, 0),
    ] {
        let entry = catalog.root_entry(&RootId::run(run_id)).await.unwrap();
        assert_eq!((entry.created, entry.modified), (at(created), at(modified)));
    }
}

//! Names of experiments and runs.

use super::*;

fn named(run_id: &str, name: &str) -> Run {
    Run {
        run_name: name.to_owned(),
        ..run(run_id)
    }
}

fn experiment_0() -> Branch {
    Branch::Experiment("0".into())
}

async fn names(catalog: &Arc<Catalog>, branch: &Branch) -> Vec<(String, Item)> {
    let mut listing = catalog.list(branch);
    let mut names = Vec::new();
    while let Some(page) = listing.next_page().await.unwrap() {
        assert!(!page.is_empty());
        names.extend(
            page.into_iter()
                .map(|(name, item)| (name.to_string(), item)),
        );
    }
    names
}

async fn find(catalog: &Arc<Catalog>, branch: &Branch, name: &str) -> Result<Item, i32> {
    let found = catalog.find(branch, name).await;
    found.map_err(|error| error.errno())
}

#[tokio::test(start_paused = true)]
async fn what_a_listing_calls_a_run_is_what_it_is_found_by() {
    let fake = Fake::new();
    let like_a_cut = format!("{}~y", "x".repeat(251));
    for (run_id, name) in [
        ("0ooooooo0", like_a_cut.as_str()),
        ("aaaaaaaa1", "same"),
        ("bbbbbbbb2", "same"),
        ("cccccccc3", "other/.."),
        ("dddddddd4", ""),
        ("eeeeeeee5", "same"),
    ] {
        fake.add(named(run_id, name));
    }
    let (_, listing) = catalog_of(fake, TTL);
    let listed = names(&listing, &experiment_0()).await;
    let shown: Vec<&str> = listed.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        shown,
        [
            like_a_cut.as_str(),
            "same",
            "same-bbbbbbbb",
            "other%2F..",
            "dddddddd4",
            "same-eeeeeeee"
        ]
    );
    // By who has listed nothing, too.
    let asked = Catalog::new(
        Arc::clone(&listing.tracking),
        Arc::clone(&listing.stores),
        Duration::ZERO,
    );
    for (name, item) in &listed {
        let found = find(&asked, &experiment_0(), name).await;
        assert_eq!(found.as_ref(), Ok(item), "{name}");
    }
    for name in [
        "same-cccccccc",
        "same-aaaaaaaa",
        "other",
        "aaaaaaaa1",
        "same-",
        "..",
    ] {
        let found = find(&asked, &experiment_0(), name).await;
        assert_eq!(found, Err(libc::ENOENT), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_that_is_made_while_its_experiment_is_listed_shows_nothing_twice_and_loses_nothing() {
    let fake = Fake::new();
    for index in 0..6 {
        fake.add(named(&format!("run{index}"), &format!("name {index}")));
    }
    // It comes first, and moves all others.
    *fake.meanwhile.lock() = Some(named("a-new-one", "new"));
    let (_, catalog) = catalog_of(fake, TTL);
    let listed = names(&catalog, &experiment_0()).await;
    let shown: Vec<String> = listed.into_iter().map(|(name, _)| name).collect();
    let expected: Vec<String> = (0..6).map(|index| format!("name {index}")).collect();
    assert_eq!(shown, expected);
}

#[tokio::test(start_paused = true)]
async fn known_names_go_on_while_the_server_is_away_and_a_refusal_counts() {
    for mood in [Mood::Down, Mood::Nonsense] {
        let (fake, catalog) = catalog(TTL);
        let known = find(&catalog, &Branch::Experiments, "name of 0").await;
        assert!(matches!(known, Ok(Item::Branch(..))), "{known:?}");
        fake.feel(mood);
        tokio::time::advance(TTL * 2).await;
        assert_eq!(
            find(&catalog, &Branch::Experiments, "name of 0").await,
            known
        );
        let unknown = find(&catalog, &Branch::Experiments, "name of 1").await;
        assert_eq!(unknown, Err(libc::EIO));
        // The models of a run that cannot be asked for keep nobody from its files.
        assert!(catalog.models_of_run("here").await.is_empty());
        fake.feel(Mood::Denying);
        tokio::time::advance(Duration::from_secs(60)).await;
        let refused = find(&catalog, &Branch::Experiments, "name of 0").await;
        assert_eq!(refused, Err(libc::EACCES));
        tokio::time::advance(GRACE).await;
        fake.feel(mood);
        let gone = find(&catalog, &Branch::Experiments, "name of 0").await;
        assert_eq!(gone, Err(libc::EIO));
    }
}

use super::*;

fn nothing(_: &str, _: Rank, _: &dyn Fn(&&'static str) -> bool) -> bool {
    false
}

/// Publishes everything that can be, one after the other, and tells in which order.
fn drain(queue: &mut Queue<&'static str>) -> Vec<&'static str> {
    let mut order = Vec::new();
    loop {
        let ready = queue.ready(nothing);
        if ready.is_empty() {
            return order;
        }
        for key in ready {
            order.push(key);
            queue.finished(&key, true);
        }
    }
}

fn queue(paths: &[&'static str]) -> Queue<&'static str> {
    let mut queue = Queue::new(16);
    for path in paths {
        queue.add(*path, path, false);
    }
    queue
}

#[test]
fn one_directory_is_published_in_the_order_of_closes_one_at_a_time() {
    let mut queue = queue(&["r/c", "r/a", "r/b"]);
    assert_eq!(queue.ready(nothing), ["r/c"]);
    assert!(queue.ready(nothing).is_empty());
    queue.finished(&"r/c", true);
    assert_eq!(drain(&mut queue), ["r/a", "r/b"]);
    assert_eq!(queue.len(), 0);
}

#[test]
fn directories_go_side_by_side_within_the_limit_and_who_waited_longest_first() {
    let mut queue = Queue::new(2);
    for path in ["r/z/1", "r/y/1", "r/x/1", "r/z/2"] {
        queue.add(path, path, false);
    }
    assert_eq!(queue.ready(nothing), ["r/z/1", "r/y/1"]);
    queue.finished(&"r/z/1", true);
    assert_eq!(queue.ready(nothing), ["r/x/1"]);
}

#[test]
fn manifests_come_last_and_after_everything_below() {
    let mut queue = queue(&[
        "r/m/MLmodel",
        "r/m/data/model.safetensors.index.json",
        "r/m/data/model-1.safetensors",
        "r/m/conda.yaml",
        "r/m-other/x",
    ]);
    let order = drain(&mut queue);
    let at = |key| order.iter().position(|it| *it == key).unwrap();
    let index = at("r/m/data/model.safetensors.index.json");
    assert!(at("r/m/data/model-1.safetensors") < index);
    assert_eq!(at("r/m/MLmodel"), order.len() - 1);
    assert_eq!(order.len(), 5);
}

#[test]
fn of_two_manifests_in_one_directory_the_index_goes_first() {
    let mut queue = queue(&["r/MLmodel", "r/a.index.json"]);
    assert_eq!(drain(&mut queue), ["r/a.index.json", "r/MLmodel"]);
}

#[test]
fn what_is_dirty_outside_of_the_queue_holds_a_manifest_unless_somebody_waits_for_it() {
    let mut queue = queue(&["r/m/MLmodel"]);
    assert!(queue.ready(|directory, _, _| directory == "r/m").is_empty());
    queue.add("r/m/MLmodel", "r/m/MLmodel", true);
    assert_eq!(queue.ready(|_, _, _| true), ["r/m/MLmodel"]);
}

#[test]
fn what_failed_holds_up_manifests_and_nobody_else() {
    let mut queue = queue(&["r/a", "r/b", "r/MLmodel"]);
    queue.ready(nothing);
    queue.finished(&"r/a", false);
    assert_eq!(drain(&mut queue), ["r/b"]);
    assert_eq!(queue.held_by(&"r/MLmodel"), Some(&"r/a"));
    assert!(queue.is_stuck(&"r/MLmodel"));
    queue.retry(&"r/a");
    assert!(!queue.is_stuck(&"r/MLmodel"));
    assert_eq!(drain(&mut queue), ["r/a", "r/MLmodel"]);
}

#[test]
fn a_file_that_is_closed_again_goes_to_the_end_also_while_it_is_being_published() {
    let mut queue = queue(&["r/a", "r/b"]);
    queue.add("r/a", "r/a", false);
    assert_eq!(queue.ready(nothing), ["r/b"]);
    queue.add("r/b", "r/b", false);
    queue.finished(&"r/b", true);
    assert_eq!(drain(&mut queue), ["r/a", "r/b"]);
}

#[test]
fn a_renamed_file_keeps_its_place_and_has_the_rank_of_its_new_name() {
    let mut queue = queue(&["r/MLmodel.tmp", "r/a", "r/b"]);
    queue.moved(&"r/MLmodel.tmp", "r/MLmodel");
    queue.moved(&"r/b", "q/b");
    assert_eq!(queue.ready(nothing), ["r/a", "r/b"]);
    queue.finished(&"r/b", true);
    queue.finished(&"r/a", true);
    assert_eq!(drain(&mut queue), ["r/MLmodel.tmp"]);
}

#[test]
fn what_is_removed_while_it_is_tried_frees_its_place() {
    let mut queue = Queue::new(1);
    queue.add("r/a", "r/a", false);
    queue.add("r/b", "r/b", false);
    assert_eq!(queue.ready(nothing), ["r/a"]);
    queue.remove(&"r/a");
    queue.finished(&"r/a", true);
    assert!(!queue.is_moving());
    assert_eq!(drain(&mut queue), ["r/b"]);
}

#[test]
fn a_failed_version_of_a_file_that_was_stored_since_matters_no_more() {
    let mut queue = queue(&["r/MLmodel"]);
    queue.add_failed("old", "r/weights");
    assert!(queue.is_stuck(&"r/MLmodel"));
    queue.supersede("r/weights", |key| *key == "old");
    assert_eq!(drain(&mut queue), ["r/MLmodel"]);
}

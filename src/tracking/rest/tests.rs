mod server;

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;

use super::super::sigv4::Signer;
use super::*;
use server::{Reply, Server};

const RUN: &str = r#"{"run":{"info":{"run_id":"r1","run_name":"a","experiment_id":"3",
    "artifact_uri":"s3://b/r1/artifacts","lifecycle_stage":"deleted","status":"FINISHED",
    "start_time":1700000000000},"data":{"tags":[{"key":"k","value":"v"}]},"inputs":{}}}"#;
const BUSY: &str = r#"{"error_code":"TEMPORARILY_UNAVAILABLE","message":"busy"}"#;

fn settings(uri: &str, pairs: &[(&str, &str)]) -> TrackingSettings {
    let lookup = |name: &str| {
        let found = pairs.iter().find(|(key, _)| *key == name);
        found.map(|(_, value)| (*value).to_owned())
    };
    TrackingSettings::new(uri, lookup, None).unwrap()
}

fn tracking(uri: &str, pairs: &[(&str, &str)]) -> RestTracking {
    RestTracking::new(settings(uri, pairs)).unwrap()
}

/// Tried again without a pause.
fn busy() -> Reply {
    Reply::status(503, BUSY).with("retry-after", "0")
}

#[tokio::test]
async fn a_run_is_asked_for_below_the_path_prefix_and_told_as_it_is() {
    let server = Server::start(|_, _| Reply::json(RUN)).await;
    let tracking = tracking(&format!("{}/a/prefix/", server.uri()), &[]);
    let run = tracking.run("r1").await.unwrap();
    assert_eq!(run.lifecycle, super::super::Lifecycle::Deleted);
    assert_eq!(run.artifact_uri, "s3://b/r1/artifacts");
    assert!(run.start_time.is_some() && run.end_time.is_none());
    let asked = &server.asked()[0];
    assert_eq!(
        asked.line,
        "GET /a/prefix/api/2.0/mlflow/runs/get?run_id=r1"
    );
    for absent in ["origin", "referer", "authorization", "x-mlflow-workspace"] {
        assert_eq!(asked.header(absent), None, "{absent}");
    }
}

#[tokio::test]
async fn what_cannot_be_a_run_id_is_not_found_without_a_request() {
    let server = Server::start(|_, _| Reply::json(RUN)).await;
    let tracking = tracking(&server.uri(), &[]);
    let long = "a".repeat(LONGEST_RUN_ID + 1);
    for wrong in ["", "..", "a/b", "a b", "é", "a%2f", ".Trash", &long] {
        let error = tracking.run(wrong).await.unwrap_err();
        assert_eq!(error.errno(), libc::ENOENT, "{wrong}");
    }
    assert!(server.asked().is_empty());
    // A database that ignores case finds r1 as R1; under that name there is no run.
    assert_eq!(tracking.run("R1").await.unwrap_err().errno(), libc::ENOENT);
}

#[tokio::test]
async fn listings_ask_for_what_is_active_in_rising_order_page_by_page() {
    let server = Server::start(|number, _| match number {
        0 => Reply::json(
            r#"{"experiments":[{"experiment_id":"0"},{"experiment_id":"7"}],
                "next_page_token":"more"}"#,
        ),
        1 => Reply::json("{}"),
        2 => Reply::json(
            r#"{"runs":[{"info":{"run_id":"r1","experiment_id":"0"}},
                {"info":{"run_id":"../r2","experiment_id":"0"}}],"next_page_token":""}"#,
        ),
        _ => Reply::json("{}"),
    })
    .await;
    let tracking = tracking(&server.uri(), &[]);
    let first = tracking.experiments(None).await.unwrap();
    let experiments: Vec<String> = first.items.into_iter().map(|it| it.experiment_id).collect();
    assert_eq!(experiments, ["0", "7"]);
    let second = tracking.experiments(first.next.as_deref()).await.unwrap();
    assert!(second.items.is_empty() && second.next.is_none());
    let runs = tracking.runs(&experiments, Some("token")).await.unwrap();
    // A name that leads elsewhere is not shown.
    assert_eq!(runs.items.len(), 1);
    assert_eq!(runs.next, None);
    let asked = server.asked();
    assert_eq!(asked[0].line, "POST /api/2.0/mlflow/experiments/search");
    assert_eq!(asked[0].json()["view_type"], "ACTIVE_ONLY");
    assert_eq!(asked[1].json()["page_token"], "more");
    assert_eq!(
        asked[2].json(),
        json!({
            "experiment_ids": ["0", "7"],
            "run_view_type": "ACTIVE_ONLY",
            "max_results": 1000,
            "order_by": ["start_time ASC", "run_id ASC"],
            "page_token": "token",
        })
    );
}

#[tokio::test]
async fn a_page_that_is_too_large_is_asked_for_in_smaller_ones() {
    let server = Server::start(|_, asked| match asked.json()["max_results"].as_u64() {
        Some(1000) => Reply::json(&" ".repeat(33 << 20)),
        _ => Reply::json(r#"{"runs":[{"info":{"run_id":"r1","experiment_id":"0"}}]}"#),
    })
    .await;
    let tracking = tracking(&server.uri(), &[]);
    for _ in 0..2 {
        let page = tracking.runs(&["0".to_owned()], Some("from")).await;
        assert_eq!(page.unwrap().items.len(), 1);
    }
    let asked = server.asked();
    let sizes: Vec<_> = asked
        .iter()
        .map(|asked| asked.json()["max_results"].clone())
        .collect();
    assert_eq!(sizes, [1000, 100, 100]);
    assert!(
        asked
            .iter()
            .all(|asked| asked.json()["page_token"] == "from")
    );
}

#[tokio::test]
async fn passing_trouble_is_tried_again_and_as_often_as_is_set_at_most() {
    let server = Server::start(|number, _| match number {
        0 | 2 => busy(),
        1 => Reply::HangUp,
        3 => Reply::json(RUN),
        _ => busy(),
    })
    .await;
    let twice = [("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")];
    let tracking = tracking(&server.uri(), &twice);
    tracking.run("r1").await.unwrap();
    assert_eq!(server.asked().len(), 4);
    let error = tracking.run("r1").await.unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
    assert!(error.to_string().contains("HTTP 503: busy"), "{error}");
    assert_eq!(server.asked().len(), 8);
}

#[tokio::test]
async fn what_is_refused_for_good_is_asked_once() {
    let server = Server::start(|_, _| Reply::status(403, "Permission denied")).await;
    let tracking = tracking(&server.uri(), &[]);
    assert_eq!(tracking.run("r1").await.unwrap_err().errno(), libc::EACCES);
    assert_eq!(server.asked().len(), 1);
}

#[tokio::test]
async fn a_pause_longer_than_the_call_may_take_is_not_waited_for() {
    let server = Server::start(|_, _| Reply::status(429, "").with("retry-after", "86400")).await;
    let error = tracking(&server.uri(), &[]).run("r1").await.unwrap_err();
    assert!(error.to_string().contains("HTTP 429"), "{error}");
    assert_eq!(server.asked().len(), 1);
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_given_up_after_the_longest_call() {
    let server = Server::start(|_, _| Reply::Silence).await;
    let mut settings = settings(&server.uri(), &[]);
    settings.longest_call = Duration::from_millis(50);
    let tracking = RestTracking::new(settings).unwrap();
    let error = tracking.run("r1").await.unwrap_err();
    assert!(error.to_string().contains("no answer to run r1 in 0.05 s"));
}

#[tokio::test]
async fn the_probe_gives_up_after_few_tries() {
    let server = Server::start(|_, _| Reply::HangUp).await;
    let error = tracking(&server.uri(), &[]).probe().await.unwrap_err();
    assert!(error.to_string().contains("cannot be reached"), "{error}");
    assert_eq!(server.asked().len(), 1 + PROBE.retries as usize);
}

#[tokio::test]
async fn an_answer_that_is_no_json_is_told_with_its_beginning() {
    let page = "<html><body>Welcome to <b>nginx</b></body></html>";
    let server = Server::start(move |_, _| Reply::json(page)).await;
    let error = tracking(&server.uri(), &[]).probe().await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("is this an MLflow server? Welcome to nginx"),
        "{text}"
    );
}

#[tokio::test]
async fn credentials_and_workspace_travel_in_headers_and_show_nowhere_else() {
    let server = Server::start(|_, _| Reply::status(401, "")).await;
    let with_user = format!("http://user:hidden%40word@127.0.0.1:{}", server.port());
    let token = [
        ("MLFLOW_TRACKING_TOKEN", "hidden-token"),
        ("MLFLOW_WORKSPACE", "team"),
    ];
    for (tracking, expected) in [
        // base64 of user:hidden@word
        (tracking(&with_user, &[]), "Basic dXNlcjpoaWRkZW5Ad29yZA=="),
        (tracking(&server.uri(), &token), "Bearer hidden-token"),
    ] {
        let error = tracking.run("r1").await.unwrap_err();
        assert_eq!(error.errno(), libc::EACCES);
        let shown = format!("{tracking:?} {error} {error:?} {}", tracking.name());
        assert!(
            !shown.contains("hidden") && !shown.contains("dXNlcj"),
            "{shown}"
        );
        let asked = server.asked().pop().unwrap();
        assert_eq!(asked.header("authorization"), Some(expected));
        assert_eq!(tracking.name(), server.uri());
    }
    let asked = server.asked();
    assert_eq!(asked[0].header("x-mlflow-workspace"), None);
    assert_eq!(asked[1].header("x-mlflow-workspace"), Some("team"));
}

#[tokio::test]
async fn aws_signatures_go_before_tokens_and_cover_the_workspace() {
    let server = Server::start(|_, _| Reply::json("{}")).await;
    let pairs = [
        ("MLFLOW_TRACKING_AWS_SIGV4", "true"),
        ("MLFLOW_TRACKING_TOKEN", "hidden-token"),
        ("MLFLOW_WORKSPACE", "team"),
    ];
    let credentials = Credentials::new("AKID", "hidden", None, None, "test");
    let provider = SharedCredentialsProvider::new(credentials);
    let mut tracking = tracking(&server.uri(), &pairs);
    tracking.transport = tracking
        .transport
        .with_signer(Signer::new("eu-west-1", provider));
    tracking.runs(&["0".to_owned()], None).await.unwrap();
    let asked = server.asked().pop().unwrap();
    let signature = asked.header("authorization").unwrap();
    assert!(signature.starts_with("AWS4-HMAC-SHA256 Credential=AKID/"));
    assert!(signature.contains("/eu-west-1/execute-api/aws4_request"));
    let signed = "SignedHeaders=content-type;host;x-amz-date;x-mlflow-workspace,";
    assert!(signature.contains(signed), "{signature}");
    assert_eq!(asked.header("x-mlflow-workspace"), Some("team"));
    assert!(!format!("{tracking:?} {asked:?}").contains("hidden"));
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirection() {
    let other = Server::start(|_, _| Reply::json(RUN)).await;
    let target = format!("{}/login?state=hidden", other.uri());
    let server =
        Server::start(move |_, _| Reply::status(302, "").with("location", target.clone())).await;
    let token = [("MLFLOW_TRACKING_TOKEN", "t")];
    let error = tracking(&server.uri(), &token).probe().await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("{}/login,", other.uri())), "{text}");
    assert!(!text.contains("hidden"), "{text}");
    assert!(other.asked().is_empty());
}

#[test]
fn a_certificate_file_that_cannot_be_used_names_variable_and_path() {
    let folder = tempfile::tempdir().unwrap();
    let garbage = folder.path().join("garbage.pem");
    std::fs::write(&garbage, "no certificate").unwrap();
    let missing = folder.path().join("missing.pem");
    for name in [
        "MLFLOW_TRACKING_SERVER_CERT_PATH",
        "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    ] {
        for path in [&garbage, &missing] {
            let path = path.to_str().unwrap();
            let error = RestTracking::new(settings("https://host", &[(name, path)]));
            let text = error.unwrap_err().to_string();
            assert!(text.contains(name) && text.contains(path), "{text}");
        }
    }
}

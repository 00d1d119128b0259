//! What goes wrong with stores that are reached by way of `object_store`: in Google's dialect, which the
//! S3 server in memory understands.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mlfs::store::cloud::GoogleSettings;
use mlfs::store::{
    Condition, PageStart, PartReceipt, Payload, Store, StoreError, StoreSettings, Stores,
    checksum::crc32c,
};
use mlfs_lab::s3::{Fault, Kind, Rule, S3Server, ServerOptions};

const BUCKET: &str = "bucket";
const KEY: &str = "folder/object";
const PART: usize = 5 << 20;

struct Case {
    lab: S3Server,
    store: Arc<dyn Store>,
}

impl Case {
    async fn new(patience: Duration) -> Self {
        let options = ServerOptions {
            verify_auth: false,
            wants_hashes: true,
            ..ServerOptions::default()
        };
        let started = tokio::task::spawn_blocking(|| S3Server::start(options));
        let lab = started.await.unwrap().unwrap();
        let endpoint = lab.endpoint();
        let variable = |name: &str| (name == "STORAGE_EMULATOR_HOST").then(|| endpoint.clone());
        let stores = Stores::new(StoreSettings {
            google: GoogleSettings::from_variables(variable, patience),
            ..StoreSettings::default()
        });
        let store = stores.locate("gs://bucket").await.unwrap().store;
        Self { lab, store }
    }

    fn fails(&self, rules: Vec<Rule>) {
        self.lab.set_faults(1, rules);
    }

    async fn parts(&self, fills: [u8; 2]) -> (String, Vec<PartReceipt>) {
        let upload = self.store.create_multipart(KEY).await.unwrap();
        let mut parts = Vec::new();
        for (number, fill) in (1..).zip(fills) {
            let sent = self.store.upload_part(KEY, &upload, number, payload(fill));
            parts.push(sent.await.unwrap());
        }
        (upload, parts)
    }

    async fn complete(
        &self,
        upload: &str,
        parts: &[PartReceipt],
        condition: Condition,
    ) -> Result<u64, StoreError> {
        let done = self.store.complete_multipart(KEY, upload, parts, condition);
        done.await.map(|stored| stored.size)
    }
}

fn payload(fill: u8) -> Payload {
    let bytes = Bytes::from(vec![fill; PART]);
    Payload {
        crc32c: crc32c(&bytes),
        bytes,
    }
}

const PATIENCE: Duration = Duration::from_secs(20);
const SIZE: u64 = 2 * PART as u64;

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_took_place_though_its_answer_was_lost_is_a_success() {
    for fault in [Fault::DoThenFail, Fault::DoThenReset] {
        let case = Case::new(PATIENCE).await;
        let (upload, parts) = case.parts([1, 2]).await;
        case.fails(vec![Rule::once(Kind::CompleteMultipart, fault.clone())]);
        let size = case.complete(&upload, &parts, Condition::IfAbsent).await;
        assert_eq!(size.unwrap(), SIZE, "{fault:?}");
        // Nor is one that is asked for once more.
        let size = case.complete(&upload, &parts, Condition::IfAbsent).await;
        assert_eq!(size.unwrap(), SIZE, "{fault:?}");
        case.fails(vec![Rule::once(Kind::Put, fault.clone())]);
        let put = || case.store.put("other", payload(3), Condition::IfAbsent);
        let _ = put().await;
        assert_eq!(put().await.unwrap().size, PART as u64, "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_wrote_is_no_proof_of_a_completion_however_large_it_is() {
    let case = Case::new(PATIENCE).await;
    let (upload, parts) = case.parts([1, 2]).await;
    case.store.abort_multipart(KEY, &upload).await.unwrap();
    let other = [vec![1; PART], vec![3; PART]].concat();
    case.lab.put(BUCKET, KEY, other.clone());
    for condition in [Condition::Always, Condition::IfAbsent] {
        let outcome = case.complete(&upload, &parts, condition).await;
        assert!(
            matches!(
                outcome,
                Err(StoreError::UploadGone { .. } | StoreError::Conflict { .. })
            ),
            "{outcome:?}"
        );
    }
    assert!(case.lab.bytes(BUCKET, KEY).unwrap() == other);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_is_not_answered_is_given_up_and_sent_again() {
    let case = Case::new(Duration::from_secs(1)).await;
    for fault in [Fault::Silent, Fault::Deaf] {
        case.fails(vec![Rule::once(Kind::Put, fault.clone())]);
        let sent = case.store.put(KEY, small(), Condition::Always).await;
        assert!(sent.is_ok(), "{fault:?}: {sent:?}");
    }
    // The head of an answer and half of its body.
    case.fails(vec![Rule::once(
        Kind::CreateMultipart,
        Fault::Stall(60_000),
    )]);
    let begun = case.store.create_multipart(KEY).await;
    assert!(begun.is_ok() || begun.is_err_and(|error| error.is_transient()));
}

fn small() -> Payload {
    let bytes = Bytes::from_static(b"small");
    Payload {
        crc32c: crc32c(&bytes),
        bytes,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_on_the_way_is_not_stored() {
    let case = Case::new(PATIENCE).await;
    case.fails(vec![Rule::every(Kind::Put, Fault::WrongByte)]);
    let sent = case.store.put(KEY, small(), Condition::Always).await;
    assert!(matches!(sent, Err(StoreError::Corrupt { .. })), "{sent:?}");
    assert!(case.lab.bytes(BUCKET, KEY).is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_told_as_what_it_is_whichever_call_meets_it() {
    let case = Case::new(PATIENCE).await;
    let (upload, parts) = case.parts([1, 2]).await;
    let refused = Fault::Status(403, "AccessDenied".to_owned());
    case.fails(vec![
        Rule::every(Kind::List, refused.clone()),
        Rule::every(Kind::Head, refused.clone()),
        Rule::every(Kind::Delete, refused.clone()),
        Rule::every(Kind::CompleteMultipart, refused),
    ]);
    let store = &case.store;
    let listed = store.list("", true, PageStart::First, None).await;
    let completed = case.complete(&upload, &parts, Condition::Always).await;
    for error in [
        listed.map(drop).unwrap_err(),
        store.head(KEY).await.unwrap_err(),
        store.delete(&[KEY.to_owned()]).await.unwrap_err(),
        completed.map(drop).unwrap_err(),
    ] {
        assert_eq!(error.errno(), libc::EACCES, "{error}");
        assert!(!error.is_transient());
    }
}

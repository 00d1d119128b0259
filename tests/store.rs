//! What the S3 store makes of trouble: which requests it sends again, and which it does not.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use futures_util::future::join_all;
use mlfs::store::s3::{S3Settings, SignPayload};
use mlfs::store::{
    Condition, ETag, PageStart, Payload, Store, StoreError, StoreResult, Stores, checksum::crc32c,
};
use mlfs_lab::s3::{Fault, Kind, Rule, S3Server, ServerOptions};

const BUCKET: &str = "bucket";
const SIZE: usize = 3 << 20;
/// Of stalls that are to be noticed soon.
const SHORT: Duration = Duration::from_secs(1);

/// Every kind of request that the store sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    List,
    Head,
    Get,
    Put,
    CreateMultipart,
    UploadPart,
    CopyPart,
    Complete,
    Abort,
    ListParts,
    Copy,
    Delete,
    DeleteMany,
}

const CALLS: [Call; 13] = [
    Call::List,
    Call::Head,
    Call::Get,
    Call::Put,
    Call::CreateMultipart,
    Call::UploadPart,
    Call::CopyPart,
    Call::Complete,
    Call::Abort,
    Call::ListParts,
    Call::Copy,
    Call::Delete,
    Call::DeleteMany,
];

impl Call {
    fn kind(self) -> Kind {
        match self {
            Self::List => Kind::List,
            Self::Head => Kind::Head,
            Self::Get => Kind::Get,
            Self::Put => Kind::Put,
            Self::CreateMultipart => Kind::CreateMultipart,
            Self::UploadPart => Kind::UploadPart,
            Self::CopyPart => Kind::CopyPart,
            Self::Complete => Kind::CompleteMultipart,
            Self::Abort => Kind::AbortMultipart,
            Self::ListParts => Kind::ListParts,
            Self::Copy => Kind::Copy,
            Self::Delete | Self::DeleteMany => Kind::Delete,
        }
    }

    /// Whether a successful answer has a body that can be damaged.
    fn is_answered_with_a_body(self) -> bool {
        !matches!(
            self,
            Self::Head | Self::Put | Self::UploadPart | Self::Abort | Self::Delete
        )
    }

    fn has_a_body(self) -> bool {
        matches!(
            self,
            Self::Put | Self::UploadPart | Self::Complete | Self::DeleteMany
        )
    }
}

async fn server() -> S3Server {
    server_with(ServerOptions::default()).await
}

async fn server_with(options: ServerOptions) -> S3Server {
    let options = ServerOptions {
        verify_auth: false,
        ..options
    };
    let started = tokio::task::spawn_blocking(|| S3Server::start(options));
    started.await.unwrap().unwrap()
}

async fn store(lab: &S3Server, patience: Option<Duration>) -> Arc<dyn Store> {
    let mut settings = S3Settings {
        endpoint: Some(lab.endpoint()),
        anonymous: true,
        ..S3Settings::default()
    };
    settings.patience = patience.unwrap_or(settings.patience);
    let stores = Stores::new(settings);
    stores
        .locate(&format!("s3://{BUCKET}"))
        .await
        .unwrap()
        .store
}

fn payload() -> Payload {
    let bytes = Bytes::from(vec![7; SIZE]);
    Payload {
        crc32c: crc32c(&bytes),
        bytes,
    }
}

async fn read(store: &dyn Store, key: &str) -> StoreResult<Vec<u8>> {
    let body = store.get(key, 0..SIZE as u64, None).await?;
    let frames: Vec<Bytes> = body.frames.try_collect().await?;
    Ok(frames.concat())
}

/// One call at one server, made ready before anything goes wrong.
struct Case {
    call: Call,
    lab: S3Server,
    store: Arc<dyn Store>,
    upload: String,
}

impl Case {
    async fn new(call: Call, patience: Option<Duration>) -> Self {
        let lab = server().await;
        let store = store(&lab, patience).await;
        Self::over(call, lab, store).await
    }

    async fn over(call: Call, lab: S3Server, store: Arc<dyn Store>) -> Self {
        for key in ["a", "b", "source"] {
            lab.put(BUCKET, key, payload().bytes);
        }
        let upload = store.create_multipart("target").await.unwrap();
        store
            .upload_part("target", &upload, 1, payload())
            .await
            .unwrap();
        lab.reset_stats();
        Self {
            call,
            lab,
            store,
            upload,
        }
    }

    /// Makes the call and checks what it returns.
    async fn run(&self) -> StoreResult<()> {
        let (store, upload) = (&self.store, self.upload.as_str());
        let all = 0..SIZE as u64;
        match self.call {
            Call::List => {
                let page = store.list("", false, PageStart::First, None).await?;
                let keys: Vec<_> = page.objects.iter().map(|object| &object.key).collect();
                assert_eq!(keys, ["a", "b", "source"]);
            }
            Call::Head => assert_eq!(store.head("source").await?.size, SIZE as u64),
            Call::Get => assert!(read(&**store, "source").await? == payload().bytes),
            Call::Put => {
                store.put("put", payload(), Condition::Always).await?;
            }
            Call::CreateMultipart => {
                store.create_multipart("other").await?;
            }
            Call::UploadPart => {
                store.upload_part("target", upload, 2, payload()).await?;
            }
            Call::CopyPart => {
                store
                    .copy_part("target", upload, 2, "source", all, None)
                    .await?;
            }
            Call::Complete => {
                let parts = store.list_parts("target", upload).await?;
                store
                    .complete_multipart("target", upload, &parts, Condition::Always)
                    .await?;
            }
            Call::Abort => store.abort_multipart("target", upload).await?,
            Call::ListParts => {
                assert_eq!(store.list_parts("target", upload).await?.len(), 1);
            }
            Call::Copy => {
                let source = store.head("source").await?;
                store.copy(&source, "copy").await?;
            }
            Call::Delete => store.delete(&["a".to_owned()]).await?,
            Call::DeleteMany => store.delete(&["a".to_owned(), "b".to_owned()]).await?,
        }
        Ok(())
    }

    /// Whether the server has what the call was to bring about.
    fn is_done(&self) -> bool {
        let holds = |key: &str| {
            self.lab
                .bytes(BUCKET, key)
                .is_some_and(|it| it == payload().bytes)
        };
        match self.call {
            Call::List | Call::Head | Call::Get | Call::ListParts => true,
            Call::Put => holds("put"),
            // One that was answered with an error although it was begun stays.
            Call::CreateMultipart => self.lab.uploads() >= 2,
            Call::UploadPart | Call::CopyPart => self.lab.parts() == 2,
            Call::Complete => holds("target") && self.lab.uploads() == 0,
            Call::Abort => self.lab.uploads() == 0,
            Call::Copy => holds("copy"),
            Call::Delete => self.lab.keys(BUCKET) == ["b", "source"],
            Call::DeleteMany => self.lab.keys(BUCKET) == ["source"],
        }
    }

    fn attempts(&self) -> u64 {
        self.lab.stats().of(self.call.kind()).requests
    }
}

/// The first attempt of each call meets `fault`; all succeed, by another one.
async fn all_get_over(fault: Fault, calls: &[Call], patience: Option<Duration>) {
    let fault = &fault;
    let cases = calls.iter().map(|&call| async move {
        let case = Case::new(call, patience).await;
        let rule = Rule::once(call.kind(), fault.clone());
        case.lab.set_faults(1, vec![rule]);
        let outcome = case.run().await;
        assert!(outcome.is_ok(), "{call:?} after {fault:?}: {outcome:?}");
        assert!(case.is_done(), "{call:?} after {fault:?}");
        assert!(case.attempts() > 1, "{call:?} after {fault:?}");
    });
    join_all(cases).await;
}

/// Each call meets `fault`, and is not tried again.
async fn none_tries_again(fault: Fault, is_right: fn(&StoreError) -> bool) {
    let fault = &fault;
    let cases = CALLS.iter().map(|&call| async move {
        let case = Case::new(call, None).await;
        let rule = Rule::every(call.kind(), fault.clone());
        case.lab.set_faults(1, vec![rule]);
        // What is to go is gone with its bucket.
        if let Err(error) = case.run().await {
            assert!(is_right(&error), "{call:?} after {fault:?}: {error:?}");
        }
        assert_eq!(case.attempts(), 1, "{call:?} after {fault:?}");
    });
    join_all(cases).await;
}

fn status(status: u16, code: &str) -> Fault {
    Fault::Status(status, code.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_errors_and_throttling_are_tried_again_whatever_the_request() {
    let faults = [
        status(500, "InternalError"),
        status(502, "BadGateway"),
        status(503, "SlowDown"),
        status(504, "GatewayTimeout"),
        status(429, "TooManyRequests"),
        status(400, "RequestTimeout"),
        status(408, "Timeout"),
        // Answered with 200, as S3 does when it finds out late.
        status(200, "InternalError"),
    ];
    let rows = faults.into_iter().map(|fault| async {
        let late = fault == status(200, "InternalError");
        let headless = |call: &Call| fault != status(400, "RequestTimeout") || *call != Call::Head;
        let calls = CALLS.into_iter();
        let calls =
            calls.filter(|call| headless(call) && (!late || call.is_answered_with_a_body()));
        let calls: Vec<Call> = calls.filter(|call| !late || *call != Call::Get).collect();
        all_get_over(fault, &calls, None).await;
    });
    join_all(rows).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_connections_and_lost_answers_are_tried_again_whatever_the_request() {
    for fault in [Fault::ResetBefore, Fault::DoThenReset, Fault::DoThenFail] {
        all_get_over(fault, &CALLS, None).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_are_cut_off_are_tried_again_whatever_the_request() {
    let calls = CALLS.into_iter();
    let calls: Vec<Call> = calls
        .filter(|call| call.is_answered_with_a_body())
        .collect();
    for fault in [
        Fault::ResetAfter(0),
        Fault::ResetAfter(60),
        Fault::Truncate(60),
        Fault::Truncate(10),
    ] {
        all_get_over(fault, &calls, None).await;
    }
    // The SDK takes a copy that is answered with nothing for one that took place: a copied part then
    // lacks its ETag, which is an error, and a copied object is looked at.
    let taken = |call: &Call| matches!(call, Call::Copy | Call::CopyPart);
    let calls: Vec<Call> = calls.into_iter().filter(|call| !taken(call)).collect();
    all_get_over(Fault::Truncate(0), &calls, None).await;
    let case = Case::new(Call::Copy, None).await;
    let rule = Rule::once(Kind::Copy, Fault::Truncate(0));
    case.lab.set_faults(1, vec![rule]);
    case.run().await.unwrap();
    assert!(case.is_done());
    assert_eq!(case.lab.stats().of(Kind::Head).requests, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_stops_answering_or_reading_is_tried_again_on_another_connection() {
    all_get_over(Fault::Silent, &CALLS, Some(SHORT)).await;
    let calls = CALLS.into_iter();
    let with_body: Vec<Call> = calls.clone().filter(|call| call.has_a_body()).collect();
    all_get_over(Fault::Deaf, &with_body, Some(SHORT)).await;
    let answered: Vec<Call> = calls
        .filter(|call| call.is_answered_with_a_body())
        .collect();
    let stall = Fault::Stall(3_600_000);
    all_get_over(stall, &answered, Some(SHORT)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_attempt_cannot_mend_is_not_tried_again() {
    none_tries_again(status(403, "AccessDenied"), |error| {
        matches!(error, StoreError::PermissionDenied { .. })
    })
    .await;
    none_tries_again(status(400, "ExpiredToken"), |error| {
        // The answer to a HEAD tells no code.
        matches!(
            error,
            StoreError::Unauthenticated { .. } | StoreError::Other { .. }
        )
    })
    .await;
    none_tries_again(status(404, "NoSuchBucket"), |error| {
        matches!(error, StoreError::NotFound { .. })
    })
    .await;
    none_tries_again(status(412, "PreconditionFailed"), |error| {
        matches!(error, StoreError::Changed { .. })
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_that_moves_is_not_cut_off_however_slow_it_is() {
    // More than three times the patience, and more than all buffers on the way.
    const BYTES: usize = 80 << 20;
    let lab = server_with(ServerOptions {
        connection_rate: Some(8 << 20),
        ..ServerOptions::default()
    })
    .await;
    let store = store(&lab, Some(Duration::from_secs(3))).await;
    let bytes = Bytes::from(vec![7; BYTES]);
    let payload = Payload {
        crc32c: crc32c(&bytes),
        bytes,
    };
    store.put("slow", payload, Condition::Always).await.unwrap();
    assert_eq!(lab.stats().of(Kind::Put).requests, 1);
    let read = store.get("slow", 0..BYTES as u64, None).await.unwrap();
    let frames: Vec<Bytes> = read.frames.try_collect().await.unwrap();
    assert_eq!(frames.iter().map(Bytes::len).sum::<usize>(), BYTES);
    assert_eq!(lab.stats().of(Kind::Get).requests, 1);
}

/// The conditions under which `key` may be written now.
fn conditions(old: &ETag) -> [(&'static str, Condition); 2] {
    [
        ("new", Condition::IfAbsent),
        ("old", Condition::IfMatch(old.clone())),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conditional_put_that_took_place_though_the_answer_was_lost_is_no_conflict() {
    for fault in [Fault::DoThenFail, Fault::DoThenReset] {
        let lab = server().await;
        lab.put(BUCKET, "old", "before");
        let store = store(&lab, None).await;
        let old = store.head("old").await.unwrap().etag.unwrap();
        for (key, condition) in conditions(&old) {
            lab.set_faults(1, vec![Rule::once(Kind::Put, fault.clone())]);
            let stored = store.put(key, payload(), condition.clone()).await;
            let stored = stored.unwrap_or_else(|error| panic!("{condition:?}: {error}"));
            assert_eq!(stored.etag, store.head(key).await.unwrap().etag);
            assert_eq!(stored.size, SIZE as u64);
        }
        // An empty object has no bytes to compare.
        lab.set_faults(1, vec![Rule::once(Kind::Put, fault)]);
        let empty = Payload {
            bytes: Bytes::new(),
            crc32c: 0,
        };
        store
            .put("empty", empty, Condition::IfAbsent)
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn somebody_elses_object_is_a_conflict_also_when_it_has_the_same_size() {
    let mut theirs = payload().bytes.to_vec();
    theirs[SIZE - 1] = 8;
    for theirs in [theirs, b"shorter".to_vec()] {
        let lab = server().await;
        lab.put(BUCKET, "old", "before");
        let store = store(&lab, None).await;
        let old = store.head("old").await.unwrap().etag.unwrap();
        lab.put(BUCKET, "old", theirs.clone());
        lab.put(BUCKET, "new", theirs);
        for (key, condition) in conditions(&old) {
            // A first attempt that did not take place.
            lab.set_faults(1, vec![Rule::once(Kind::Put, Fault::ResetBefore)]);
            let refused = store.put(key, payload(), condition).await;
            assert!(matches!(refused, Err(StoreError::Conflict { .. })));
        }
    }
}

/// Completes an upload over `key` while `faults` meet the requests for it.
async fn complete_over(
    options: ServerOptions,
    faults: Vec<Fault>,
    key: &str,
    condition: impl Fn(&ETag) -> Condition,
) -> StoreResult<()> {
    let lab = server_with(options).await;
    lab.put(BUCKET, "old", "before");
    let store = store(&lab, None).await;
    let old = store.head("old").await.unwrap().etag.unwrap();
    let upload = store.create_multipart(key).await.unwrap();
    let part = store.upload_part(key, &upload, 1, payload()).await.unwrap();
    let rules = faults.into_iter();
    let rules = rules.map(|fault| Rule::once(Kind::CompleteMultipart, fault));
    lab.set_faults(1, rules.collect());
    store
        .complete_multipart(key, &upload, &[part], condition(&old))
        .await?;
    assert!(lab.bytes(BUCKET, key).unwrap() == payload().bytes);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_that_took_place_though_the_answer_was_lost_is_no_conflict() {
    let refused = status(412, "PreconditionFailed");
    for lost in [Fault::DoThenFail, Fault::DoThenReset] {
        // A store may miss the upload first, or find the condition broken: by us.
        for faults in [vec![lost.clone()], vec![lost, refused.clone()]] {
            let absent = |_: &ETag| Condition::IfAbsent;
            let options = ServerOptions::default;
            complete_over(options(), faults.clone(), "new", absent)
                .await
                .unwrap();
            let same = |old: &ETag| Condition::IfMatch(old.clone());
            complete_over(options(), faults, "old", same).await.unwrap();
        }
    }
    let conflict = complete_over(
        ServerOptions::default(),
        vec![status(412, "PreconditionFailed")],
        "new",
        |_| Condition::IfAbsent,
    );
    assert!(matches!(conflict.await, Err(StoreError::Conflict { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_is_recognised_by_its_parts_whatever_the_stores_clock_says() {
    let options = ServerOptions {
        md5_etags: true,
        clock_behind: Duration::from_secs(3600),
        ..ServerOptions::default()
    };
    let always = |_: &ETag| Condition::Always;
    complete_over(options, vec![Fault::DoThenFail], "new", always)
        .await
        .unwrap();
}

/// `MLFLOW_S3_UPLOAD_EXTRA_ARGS` says who pays, and means all requests.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_pays_for_every_request_where_that_is_told() {
    for call in CALLS {
        let lab = server_with(ServerOptions {
            requester_pays: true,
            ..ServerOptions::default()
        });
        let lab = lab.await;
        let told = "{\"RequestPayer\": \"requester\"}";
        let endpoint = lab.endpoint();
        let variable = |name: &str| match name {
            "MLFLOW_S3_UPLOAD_EXTRA_ARGS" => Some(told.to_owned()),
            "MLFLOW_S3_ENDPOINT_URL" => Some(endpoint.clone()),
            "MLFLOW_EXPERIMENTAL_S3_SIGNATURE_VERSION" => Some("unsigned".to_owned()),
            _ => None,
        };
        let settings = S3Settings::from_variables(variable, SignPayload::default()).unwrap();
        let located = Stores::new(settings)
            .locate(&format!("s3://{BUCKET}"))
            .await;
        let case = Case::over(call, lab, located.unwrap().store).await;
        let outcome = case.run().await;
        assert!(outcome.is_ok(), "{call:?}: {outcome:?}");
        assert!(case.is_done(), "{call:?}");
    }
}

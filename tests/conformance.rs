//! What every store must do, whatever it is: one suite, run over each that a test can have. Those that
//! need a server of their own are ignored unless `scripts/test` starts it.

#[path = "conformance/cases.rs"]
mod cases;

use std::net::SocketAddr;
use std::time::Duration;

use mlfs::store::cloud::{AzureSettings, GoogleSettings};
use mlfs::store::s3::S3Settings;
use mlfs::store::{StoreSettings, Stores};
use mlfs_lab::artifacts::Behaviour;
use mlfs_lab::s3::{S3Server, ServerOptions};
use mlfs_lab::tracking::TrackingServer;

use cases::*;

/// Where MLflow's servers have the objects that they proxy.
const ROUTES: &str = "/api/2.0/mlflow-artifacts/artifacts";

/// Runs cases, each in a place of its own.
macro_rules! run {
    ($stores:ident, $root:ident, $by:expr; $($case:ident),* $(,)?) => {$(
        let uri = format!("{}/{}", $root, stringify!($case));
        let location = $stores.locate(&uri).await.unwrap();
        $case(&Place { location, by: $by }).await;
    )*};
}

async fn conforms(stores: &Stores, root: &str) {
    conforms_without_part_copy(stores, root).await;
    run!(stores, root, None; parts_are_copied_inside_the_store);
}

/// A store that copies no parts.
async fn conforms_without_part_copy(stores: &Stores, root: &str) {
    run!(
        stores,
        root,
        None;
        an_object_is_read_back_in_any_range,
        a_pinned_read_sees_its_version_or_fails,
        conditions_are_kept,
        parts_in_any_order_make_an_object_that_nobody_sees_before,
        an_upload_that_is_given_up_leaves_nothing,
        objects_are_copied_inside_the_store,
        listings_of_many_pages_are_whole_and_in_order,
        odd_names_are_names,
        what_is_not_there_is_told_and_deleted_in_peace,
    );
}

/// An emulator whose objects have to be put there by other means, which are at `by`.
async fn conforms_to_be_read(stores: &Stores, root: &str, by: String) {
    run!(
        stores,
        root,
        Some(by.clone());
        an_object_is_read_back_in_any_range,
        a_pinned_read_sees_its_version_or_fails,
        odd_names_are_names,
        what_is_not_there_is_told_and_deleted_in_peace,
    );
}

/// A store of whole objects, without versions.
async fn conforms_as_a_proxy(stores: &Stores, root: &str) {
    run!(
        stores,
        root,
        None;
        an_object_is_read_back_in_any_range,
        listings_of_many_pages_are_whole_and_in_order,
        a_long_body_is_an_object_or_nothing,
        what_is_not_there_is_told_and_deleted_in_peace,
    );
}

/// One that has addresses for parts in the store behind it.
async fn conforms_as_a_proxy_with_parts(stores: &Stores, root: &str) {
    conforms_as_a_proxy(stores, root).await;
    let location = stores.locate(root).await.unwrap();
    Place { location, by: None }.learns_to_take_parts().await;
    run!(
        stores,
        root,
        None;
        parts_in_any_order_make_an_object_that_nobody_sees_before,
        an_upload_that_is_given_up_leaves_nothing,
    );
}

fn stores(endpoint: Option<String>) -> Stores {
    Stores::new(S3Settings {
        endpoint,
        anonymous: true,
        ..S3Settings::default()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_s3_server_in_memory() {
    let options = ServerOptions {
        verify_auth: false,
        ..ServerOptions::default()
    };
    let started = tokio::task::spawn_blocking(|| S3Server::start(options));
    let lab = started.await.unwrap().unwrap();
    conforms(&stores(Some(lab.endpoint())), "s3://bucket/root").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_proxies() {
    for wholes_only in [false, true] {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let started = tokio::task::spawn_blocking(move || TrackingServer::start(address));
        let lab = started.await.unwrap().unwrap();
        lab.artifacts().behave(Behaviour {
            wholes_only,
            ..Behaviour::default()
        });
        let root = format!("{}{ROUTES}/root", lab.uri());
        conforms_as_a_proxy(&stores(None), &root).await;
        lab.artifacts().behave(Behaviour {
            wholes_only,
            parts: Some(lab.uri()),
            ..Behaviour::default()
        });
        let root = format!("{}{ROUTES}/with-parts", lab.uri());
        conforms_as_a_proxy_with_parts(&stores(None), &root).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs MLflow servers: scripts/test starts them"]
async fn mlflow_proxying_a_directory() {
    let root = root(&format!("{}{ROUTES}", variable("MLFLOW_PROXY_DIRECTORY")));
    conforms_as_a_proxy(&stores(None), &root).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs MLflow servers: scripts/test starts them"]
async fn mlflow_proxying_s3() {
    let root = root(&format!("{}{ROUTES}", variable("MLFLOW_PROXY_S3")));
    conforms_as_a_proxy_with_parts(&stores(None), &root).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_directory() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_str().unwrap();
    conforms(&stores(None), root).await;
    let left = std::process::Command::new("find")
        .args([root, "-name", ".artifact*"])
        .output();
    assert_eq!(left.unwrap().stdout, b"");
    let uri = format!("file://{root}/with%20space");
    let location = stores(None).locate(&uri).await.unwrap();
    let place = Place { location, by: None };
    place.put("f", b"x").await;
    assert!(folder.path().join("with space/f").is_file());
}

const PATIENCE: Duration = Duration::from_secs(30);

fn google(endpoint: &str) -> Stores {
    let variable = |name: &str| (name == "STORAGE_EMULATOR_HOST").then(|| endpoint.to_owned());
    Stores::new(StoreSettings {
        google: GoogleSettings::from_variables(variable, PATIENCE),
        ..StoreSettings::default()
    })
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run scripts/test"))
}

/// Where nobody has been before.
fn root(of: &str) -> String {
    format!("{of}/conformance-{:x}", std::process::id())
}

/// Google's own words, for what its emulators do not understand.
#[tokio::test(flavor = "multi_thread")]
async fn googles_dialect_in_memory() {
    let options = ServerOptions {
        verify_auth: false,
        wants_hashes: true,
        ..ServerOptions::default()
    };
    let started = tokio::task::spawn_blocking(|| S3Server::start(options));
    let lab = started.await.unwrap().unwrap();
    conforms_without_part_copy(&google(&lab.endpoint()), "gs://bucket/root").await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an S3 server: scripts/test starts one"]
async fn a_real_s3_server() {
    let settings = S3Settings {
        endpoint: Some(variable("S3_ENDPOINT")),
        ..S3Settings::default()
    };
    conforms(&Stores::new(settings), &root("s3://mlflow")).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Azurite: scripts/test starts it"]
async fn azurite() {
    let told = variable("AZURE_STORAGE_CONNECTION_STRING");
    let variable = |name: &str| (name == "AZURE_STORAGE_CONNECTION_STRING").then(|| told.clone());
    let stores = Stores::new(StoreSettings {
        azure: AzureSettings::from_variables(variable, PATIENCE),
        ..StoreSettings::default()
    });
    let container = "wasbs://mlflow@devstoreaccount1.blob.core.windows.net";
    conforms_without_part_copy(&stores, &root(container)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs fake-gcs-server: scripts/test starts it"]
async fn fake_gcs_server() {
    let endpoint = variable("STORAGE_EMULATOR_HOST");
    let by = format!("{endpoint}/upload/storage/v1/b/mlflow/o");
    conforms_to_be_read(&google(&endpoint), &root("gs://mlflow"), by).await;
}

//! Uploads in parts, whose parts go to addresses that are told when an upload is begun.

use std::collections::BTreeMap;
use std::io;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::Response;
use hyper::body::Incoming;
use hyper::header::ETAG;
use serde_json::{Value, json};

use super::{Answer, Artifacts, ROUTES, told};

/// Parts that belong to no object yet.
#[derive(Default)]
pub(super) struct Uploads {
    begun: u64,
    /// By the ids of their uploads, and their numbers.
    parts: BTreeMap<String, BTreeMap<u64, Bytes>>,
}

impl Artifacts {
    /// Uploads that are neither completed nor aborted.
    pub fn unfinished(&self) -> usize {
        self.uploads.lock().parts.len()
    }

    /// Begins, completes or aborts an upload, by the path of the request.
    pub(super) fn step_of_upload(&self, path: &str, body: &[u8]) -> Answer {
        let asked: Value = serde_json::from_slice(body).unwrap_or_default();
        let name = asked["path"].as_str().unwrap_or_default();
        let id = asked["upload_id"].as_str().unwrap_or_default();
        let Some(base) = self.behaviour.lock().parts.clone() else {
            return told(
                501,
                &json!({"message": "Multipart upload is not supported"}),
            );
        };
        let mut steps = path.splitn(3, '/').skip(1);
        let (step, folder) = (steps.next().unwrap_or_default(), steps.next());
        match step {
            "create" => {
                let most = asked["num_parts"].as_u64().unwrap_or_default();
                let mut uploads = self.uploads.lock();
                uploads.begun += 1;
                let id = format!("upload{}", uploads.begun);
                uploads.parts.insert(id.clone(), BTreeMap::new());
                let address = |number| {
                    let url = format!("{base}{ROUTES}parts/{id}/{number}");
                    json!({"url": url, "part_number": number, "headers": {}})
                };
                let addresses: Vec<Value> = (1..=most).map(address).collect();
                told(200, &json!({"upload_id": id, "credentials": addresses}))
            }
            "complete" => self.complete(folder, name, id, &asked["parts"]),
            "abort" => {
                self.uploads.lock().parts.remove(id);
                told(200, &json!({}))
            }
            _ => told(404, &json!({"detail": "Not Found"})),
        }
    }

    fn complete(&self, folder: Option<&str>, name: &str, id: &str, named: &Value) -> Answer {
        let wrong = |what: &str| {
            let message = format!("An error occurred ({what}) when calling the operation");
            told(
                500,
                &json!({"error_code": "INTERNAL_ERROR", "message": message}),
            )
        };
        if let Some(status) = self.behaviour.lock().instead_of_completing.pop_front() {
            let body = Full::from("<html>so Flask says it</html>");
            let body = BoxBody::new(body.map_err(|never| match never {}));
            let answer = Response::builder().status(status).body(body);
            return answer.unwrap_or_default();
        }
        let mut uploads = self.uploads.lock();
        let Some(parts) = uploads.parts.get(id) else {
            return wrong("NoSuchUpload");
        };
        let mut whole = Vec::new();
        for part in named.as_array().into_iter().flatten() {
            let number = part["part_number"].as_u64().unwrap_or_default();
            let kept = parts.get(&number);
            match kept.filter(|bytes| part["etag"].as_str() == Some(&etag(bytes))) {
                Some(bytes) => whole.extend_from_slice(bytes),
                None => return wrong("InvalidPart"),
            }
        }
        uploads.parts.remove(id);
        drop(uploads);
        self.put(&format!("{}/{name}", folder.unwrap_or_default()), whole);
        let status = self.behaviour.lock().after_completing.pop_front();
        told(status.unwrap_or(200), &json!({}))
    }

    /// Keeps a part, at `ID/NUMBER`.
    pub(super) async fn part(&self, path: &str, body: Incoming) -> io::Result<Answer> {
        let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
        if let Some(status) = self.behaviour.lock().instead_of_parts.pop_front() {
            return Ok(told(status, &json!({"message": "on purpose"})));
        }
        let (id, number) = path.split_once('/').unwrap_or_default();
        let mut uploads = self.uploads.lock();
        let (Some(parts), Ok(number)) = (uploads.parts.get_mut(id), number.parse()) else {
            return Ok(told(404, &json!({"message": "no such upload"})));
        };
        let answer = Response::builder().header(ETAG, etag(&body));
        parts.insert(number, body);
        Ok(answer.body(Default::default()).unwrap_or_default())
    }
}

fn etag(bytes: &[u8]) -> String {
    format!("\"{:08x}\"", crc_fast::crc32_iscsi(bytes))
}

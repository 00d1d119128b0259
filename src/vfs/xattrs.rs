//! Extended attributes: what MLflow and the store know of a file or directory. They are told to who asks for
//! one, and neither listed nor set: programs that copy files would try to set on the copy what is listed.

use std::ffi::OsStr;
use std::sync::Arc;

use super::error::{VfsError, VfsResult};
use super::tree::{Inode, Kind};
use super::{UploadStatus, Vfs};
use crate::catalog::RootId;

const RUN_ID: &str = "user.mlflow.run_id";
const MODEL_ID: &str = "user.mlflow.model_id";
const ARTIFACT_URI: &str = "user.mlflow.artifact_uri";
const ETAG: &str = "user.mlfs.etag";
const STATE: &str = "user.mlfs.state";
/// What user programs may name; the rest is the kernel's, and not known here.
const USERS: &str = "user.";

/// Where an inode is.
struct Whereabouts {
    /// The path below the mount point.
    path: String,
    root: RootId,
    /// The path below that.
    below: String,
}

impl Vfs {
    /// What is known of an inode under a name.
    ///
    /// # Errors
    /// ENODATA for names of user programs that mean nothing here, EOPNOTSUPP for the kernel's own.
    pub async fn attribute(&self, inode: Inode, name: &OsStr) -> VfsResult<Vec<u8>> {
        const NOTHING: VfsError = VfsError::plain(libc::ENODATA);
        let name = name.to_str().unwrap_or_default();
        if !name.starts_with(USERS) {
            return Err(VfsError::plain(libc::EOPNOTSUPP));
        }
        let place = self.whereabouts(inode)?.ok_or(NOTHING)?;
        let text = match (name, &place.root) {
            (RUN_ID, RootId::Run(id)) | (MODEL_ID, RootId::Model(id)) => id.to_string(),
            (ARTIFACT_URI, root) => {
                let uri = self.catalog.artifact_uri(root).await?;
                match place.below.as_str() {
                    "" => uri,
                    below => format!("{}/{below}", uri.trim_end_matches('/')),
                }
            }
            (ETAG, _) => self.etag(inode)?.ok_or(NOTHING)?,
            (STATE, _) => self.state_of(&place.path),
            _ => return Err(NOTHING),
        };
        Ok(text.into_bytes())
    }

    /// The errno of an attempt to set or remove an attribute.
    pub fn refuse_attribute(&self, name: &OsStr) -> VfsError {
        let known = [RUN_ID, MODEL_ID, ARTIFACT_URI, ETAG, STATE];
        match (
            self.check_writable(),
            known.iter().any(|known| name == *known),
        ) {
            (Err(error), _) => error,
            (Ok(()), true) => VfsError::NOT_PERMITTED,
            (Ok(()), false) => VfsError::plain(libc::EOPNOTSUPP),
        }
    }

    /// `None` for what is in no artifact root.
    fn whereabouts(&self, inode: Inode) -> VfsResult<Option<Whereabouts>> {
        let tree = self.tree.lock();
        let node = tree.get(inode).ok_or(VfsError::STALE)?;
        let is_stored = matches!(
            node.kind,
            Kind::File(_) | Kind::Directory(_) | Kind::Artifacts(..)
        );
        if !is_stored {
            return Ok(None);
        }
        let (root, below) = tree.place(inode).ok_or(VfsError::STALE)?;
        let root = match tree.get(root).map(|node| &node.kind) {
            Some(Kind::Artifacts(entry, _)) => entry.id.clone(),
            _ => return Err(VfsError::STALE),
        };
        let path = tree.path(inode);
        Ok(Some(Whereabouts { path, root, below }))
    }

    /// The version of a file that the store has, as the store tells it.
    fn etag(&self, inode: Inode) -> VfsResult<Option<String>> {
        let file = match self.tree.lock().get(inode).map(|node| &node.kind) {
            Some(Kind::File(file)) => Arc::clone(file),
            Some(_) => return Ok(None),
            None => return Err(VfsError::STALE),
        };
        let state = file.state();
        if state.is_dirty() {
            return Ok(None);
        }
        let etag = state.published.as_ref().and_then(|info| info.etag.as_ref());
        Ok(etag.map(|etag| etag.as_str().trim_matches('"').to_owned()))
    }

    /// How far everything at and below a path is.
    fn state_of(&self, path: &str) -> String {
        let meant = |upload: &UploadStatus| {
            let rest = upload.path.strip_prefix(path);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let all: Vec<UploadStatus> = self.unstored().into_iter().filter(meant).collect();
        if all.is_empty() {
            return "stored".to_owned();
        }
        let failed = all.iter().find(|upload| upload.state == "failed");
        if let Some(reason) = failed.and_then(|upload| upload.reason.as_ref()) {
            return format!("failed: {reason}");
        }
        let size: u64 = all.iter().map(|upload| upload.size).sum();
        let sent: u64 = all.iter().map(|upload| upload.sent).sum();
        // All of it only when it is an object.
        let percent = (sent * 100).checked_div(size).unwrap_or(0).min(99);
        format!("uploading {percent}%")
    }
}

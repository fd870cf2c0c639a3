//! A folder as a store.
//!
//! Guarantees: an object is complete or absent, is never replaced, and is on disk when `Store::create` returns.
//! Non-goals: protection of objects. A folder has no locks and no versions, so that anyone who can write to it can rewrite it. Retention is
//! ignored, and `Store::list_versions` reports none.

use std::{
    fs, io,
    io::Write,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use futures::future::BoxFuture;

use super::{PutError, Retention, Store, StoreError, StoredObject};

/// The beginning of the name of a file that is still being written. No key can begin like that, see [`Dir::path`].
pub(in crate::evidence) const UNFINISHED: &str = ".unfinished-";

/// Distinguishes the unfinished files of writers in this process.
static WRITERS: AtomicU64 = AtomicU64::new(0);

/// A folder as a store.
#[derive(Clone, Debug)]
pub struct Dir {
    root: PathBuf,
}

impl Dir {
    /// Returns a store in this folder. The folder is created with the first object.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Returns the file of a key. Keys come from names in a cluster, and a key must not lead out of the folder.
    fn path(&self, key: &str) -> Result<PathBuf, StoreError> {
        let plain = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', '\0']);
        if key.split('/').all(plain) { Ok(self.root.join(key)) } else { Err(StoreError::Key(key.to_owned())) }
    }

    fn error(&self, action: &'static str, key: &str, error: &io::Error) -> StoreError {
        let (key, place, detail) = (key.to_owned(), self.root.display().to_string(), error.to_string());
        match error.kind() {
            io::ErrorKind::NotFound => StoreError::NotFound { key, place },
            io::ErrorKind::PermissionDenied => StoreError::Forbidden { action, key, place, detail },
            _ => StoreError::Unavailable { action, key, place, detail },
        }
    }

    fn write(&self, key: &str, body: &[u8]) -> Result<String, PutError> {
        let path = self.path(key)?;
        match write_new(&path, body) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(PutError::Exists),
            Err(e) => Err(self.error("write", key, &e).into()),
            Ok(()) => Ok(VERSION.to_owned()),
        }
    }

    fn read(&self, key: &str) -> Result<Vec<u8>, StoreError> {
        fs::read(self.path(key)?).map_err(|e| self.error("read", key, &e))
    }

    fn objects(&self, prefix: &str) -> Result<Vec<StoredObject>, StoreError> {
        let mut found = Vec::new();
        // Keys with this prefix can only be below the last complete folder in the prefix.
        let start = match prefix.rsplit_once('/') {
            Some((folder, _)) => self.path(folder)?,
            None => self.root.clone(),
        };
        let mut folders = vec![start];
        while let Some(folder) = folders.pop() {
            let entries = match fs::read_dir(&folder) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                entries => entries.map_err(|e| self.error("list", prefix, &e))?,
            };
            for entry in entries {
                let entry = entry.map_err(|e| self.error("list", prefix, &e))?;
                let metadata = entry.metadata().map_err(|e| self.error("list", prefix, &e))?;
                if metadata.is_dir() {
                    folders.push(entry.path());
                } else if let Some(key) = self.key(&entry.path()).filter(|key| key.starts_with(prefix)) {
                    let written = metadata.modified().ok().and_then(|t| jiff::Timestamp::try_from(t).ok());
                    found.push(StoredObject {
                        key,
                        version_id: VERSION.to_owned(),
                        size: metadata.len(),
                        written,
                        retain_until: None,
                        mode: None,
                        is_latest: true,
                        delete_marker: false,
                    });
                }
            }
        }
        found.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(found)
    }

    /// Returns the key of a file. `None` for files that this store does not write.
    fn key(&self, path: &Path) -> Option<String> {
        let key = path.strip_prefix(&self.root).ok()?.to_str()?.to_owned();
        self.path(&key).is_ok().then_some(key)
    }
}

/// The version ID that S3 uses in a bucket without versions.
const VERSION: &str = "null";

/// Writes the file beside its place, then links it into its place. The link fails if a file is there already.
fn write_new(path: &Path, body: &[u8]) -> io::Result<()> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else {
        return Err(io::Error::other("the path has no folder"));
    };
    fs::create_dir_all(folder)?;
    let writer = (std::process::id(), WRITERS.fetch_add(1, Ordering::Relaxed));
    let unfinished = folder.join(format!("{UNFINISHED}{}-{}-{name}", writer.0, writer.1));
    let written = (|| {
        let mut file = fs::File::create(&unfinished)?;
        file.write_all(body)?;
        file.sync_all()?;
        fs::hard_link(&unfinished, path)
    })();
    // The unfinished name is not needed any more, whatever happened. If it cannot be removed, it is not listed either.
    let _ = fs::remove_file(&unfinished);
    written?;
    fs::File::open(folder)?.sync_all()
}

/// Runs file access on tokio's threads for blocking work.
async fn blocking<T: Send + 'static, E: Send + From<StoreError> + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(StoreError::Unavailable {
            action: "use",
            key: String::new(),
            place: "the folder".to_owned(),
            detail: e.to_string(),
        }
        .into()),
    }
}

impl Store for Dir {
    fn create<'a>(
        &'a self,
        key: &'a str,
        body: Bytes,
        _retention: Option<&'a Retention>,
    ) -> BoxFuture<'a, Result<String, PutError>> {
        let (store, key) = (self.clone(), key.to_owned());
        Box::pin(blocking(move || store.write(&key, &body)))
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Bytes, StoreError>> {
        let (store, key) = (self.clone(), key.to_owned());
        Box::pin(blocking(move || store.read(&key).map(Bytes::from)))
    }

    fn list_versions<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<StoredObject>, StoreError>> {
        let (store, prefix) = (self.clone(), prefix.to_owned());
        Box::pin(blocking(move || store.objects(&prefix)))
    }

    fn lock<'a>(&'a self, _key: &'a str) -> BoxFuture<'a, Result<Option<StoredObject>, StoreError>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<String>, StoreError>> {
        let (store, prefix) = (self.clone(), prefix.to_owned());
        Box::pin(blocking(move || Ok(store.objects(&prefix)?.into_iter().map(|o| o.key).collect())))
    }
}

#[cfg(test)]
mod tests;

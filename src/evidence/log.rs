//! Reads a whole log from a store.
//!
//! Guarantees: `Log::read` lists every version, so that it misses nothing that was replaced or hidden.
//! Non-goals: evaluating what it read, which [`verify`](crate::verify) does.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};

use super::{
    ending, segment,
    store::{Store, StoreError, StoredObject},
};

/// The folder of incidents under the log's prefix.
pub const INCIDENTS: &str = "incidents/";
/// The number of objects that are read at the same time.
const PARALLEL: usize = 8;

/// The objects of a log. Keys are relative to the log's prefix.
#[derive(Clone, Debug, Default)]
pub struct Log {
    /// The bytes of each segment that a plain read returns.
    pub segments: BTreeMap<String, Bytes>,
    /// The bytes of each incident: a request that the gateway denied outside any log.
    pub incidents: BTreeMap<String, Bytes>,
    /// The bytes of each object that was written once the log had ended, see [`ending`].
    pub ending: BTreeMap<String, Bytes>,
    /// Everything that is in the place of an object and is not one, by its key, with what was expected and found. An untrusted party may
    /// have put anything into a folder.
    pub odd: BTreeMap<String, String>,
    /// Every version of every object. `None` for a store without versions and locks.
    pub versions: Option<Vec<StoredObject>>,
}

impl Log {
    /// Reads the segments, the incidents and the ending under the prefix, which ends with a slash or is empty. `locks` says whether the
    /// store has versions and locks at all.
    ///
    /// # Errors
    /// Returns an error if the store fails. An object that is hidden by a delete marker is not an error; its bytes are absent.
    pub async fn read(store: &dyn Store, prefix: &str, locks: bool) -> Result<Self, StoreError> {
        let mut versions: Vec<StoredObject> = Vec::new();
        for folder in [segment::FOLDER, INCIDENTS, ending::FOLDER, ending::SUMMARY] {
            for object in store.list_versions(&format!("{prefix}{folder}")).await? {
                // Stores list by the beginning of the key. Other objects whose names begin like an object of the log do not belong to the
                // log.
                if let Some(key) = object.key.strip_prefix(prefix).filter(|key| Self::has(key)) {
                    versions.push(StoredObject { key: key.to_owned(), ..object });
                }
            }
        }
        let visible = versions.iter().filter(|v| v.is_latest && !v.delete_marker).map(|v| v.key.clone());
        let bytes: BTreeMap<String, Bytes> = futures::stream::iter(visible)
            .map(|key| async move {
                let bytes = store.get(&format!("{prefix}{key}")).await?;
                Ok::<_, StoreError>((key, bytes))
            })
            .buffer_unordered(PARALLEL)
            .try_collect()
            .await?;
        let mut log = Self { versions: locks.then_some(versions), ..Self::default() };
        for (key, bytes) in bytes {
            log.of(&key).insert(key, bytes);
        }
        Ok(log)
    }

    /// Returns whether an object with this key belongs to a log.
    pub fn has(key: &str) -> bool {
        [segment::FOLDER, INCIDENTS, ending::FOLDER].iter().any(|folder| key.starts_with(folder))
            || key == ending::SUMMARY
    }

    /// Returns the group of objects to which an object with this key belongs.
    pub fn of(&mut self, key: &str) -> &mut BTreeMap<String, Bytes> {
        if key.starts_with(segment::FOLDER) {
            &mut self.segments
        } else if key.starts_with(INCIDENTS) {
            &mut self.incidents
        } else {
            &mut self.ending
        }
    }

    /// Returns the key and the bytes of every object.
    pub fn objects(&self) -> impl Iterator<Item = (&str, &Bytes)> {
        self.segments.iter().chain(&self.incidents).chain(&self.ending).map(|(key, bytes)| (key.as_str(), bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::store::dir::Dir;

    #[tokio::test]
    async fn what_only_begins_like_a_logs_object_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let names = ["incidents/0.json", "segments/x", "summary.dsse.json", "tlog/checkpoint"];
        for name in names.iter().chain(&["summary.dsse.json0", "notes.txt", "rollback/c1"]) {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, name).unwrap();
        }
        let log = Log::read(&Dir::new(folder.path()), "", true).await.unwrap();
        let mut found: Vec<_> = log.objects().map(|(name, _)| name).collect();
        found.sort_unstable();
        assert_eq!(found, names);
        assert_eq!(log.versions.unwrap().len(), names.len());
    }
}

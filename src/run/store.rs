//! The store of a run's evidence: a folder, or buckets.
//!
//! Guarantees: the bucket that the pack names for evidence is the place that the user chose. Every other bucket, such as the state bucket,
//! is a folder of the user. When the place of the evidence fails, the terminal shows the reason at once. A folder is never reported as
//! locked.

use std::{path::PathBuf, sync::Arc};

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::mpsc::UnboundedSender;

use super::RunEvent;
use crate::{
    evidence::store::{PutError, Retention, Store, StoreError, StoredObject, dir::Dir},
    gateway::buckets::Buckets,
};

/// The place of the evidence.
pub enum Place {
    /// A folder.
    Folder(PathBuf),
    /// Buckets of an object store.
    Buckets(Arc<dyn Buckets>),
}

/// The buckets that the gateway writes to.
pub struct Kept {
    /// The place of the evidence.
    pub place: Place,
    /// The name of the evidence bucket in the pack.
    pub evidence: String,
    /// The folder that contains a folder for each other bucket. They hold data that outlives an attempt and is not evidence.
    pub state: PathBuf,
    /// Reports why evidence cannot be stored.
    pub troubles: Troubles,
}

/// Reports why evidence cannot be stored. The same reason is reported once in a row, however often storing is tried.
#[derive(Clone)]
pub struct Troubles {
    tell: UnboundedSender<RunEvent>,
    last: Arc<Mutex<String>>,
}

impl Troubles {
    /// Creates a reporter that sends to `tell`.
    pub fn new(tell: UnboundedSender<RunEvent>) -> Self {
        Self { tell, last: Arc::default() }
    }

    fn of(&self, error: &StoreError) {
        // An object that does not exist yet is not a failure.
        if matches!(error, StoreError::NotFound { .. }) {
            return;
        }
        let (text, mut last) = (error.to_string(), self.last.lock());
        if *last != text {
            // The receiver may be gone.
            let _ = self.tell.send(RunEvent::Trouble(text.clone()));
            *last = text;
        }
    }

    async fn seen<T>(&self, done: BoxFuture<'_, Result<T, StoreError>>) -> Result<T, StoreError> {
        done.await.inspect_err(|error| self.of(error))
    }
}

/// A store whose failures are reported.
struct Watched {
    store: Arc<dyn Store>,
    troubles: Troubles,
}

impl Buckets for Kept {
    fn bucket<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Arc<dyn Store>, StoreError>> {
        Box::pin(async move {
            if name != self.evidence {
                return Ok(Arc::new(Dir::new(self.state.join(name))) as Arc<dyn Store>);
            }
            let store = match &self.place {
                Place::Folder(folder) => Arc::new(Dir::new(folder)) as Arc<dyn Store>,
                Place::Buckets(buckets) => self.troubles.seen(buckets.bucket(name)).await?,
            };
            Ok(Arc::new(Watched { store, troubles: self.troubles.clone() }) as Arc<dyn Store>)
        })
    }

    fn endpoint(&self) -> Option<String> {
        match &self.place {
            Place::Folder(_) => None,
            Place::Buckets(buckets) => buckets.endpoint(),
        }
    }
}

impl Store for Watched {
    fn create<'a>(
        &'a self,
        key: &'a str,
        body: Bytes,
        retention: Option<&'a Retention>,
    ) -> BoxFuture<'a, Result<String, PutError>> {
        Box::pin(async move {
            self.store.create(key, body, retention).await.inspect_err(|error| match error {
                PutError::Store(error) => self.troubles.of(error),
                PutError::Exists => {}
            })
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Bytes, StoreError>> {
        Box::pin(self.troubles.seen(self.store.get(key)))
    }

    fn list_versions<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<StoredObject>, StoreError>> {
        Box::pin(self.troubles.seen(self.store.list_versions(prefix)))
    }

    fn lock<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<StoredObject>, StoreError>> {
        self.store.lock(key)
    }

    fn locked<'a>(&'a self, key: &'a str, asked: &'a Retention) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(self.troubles.seen(self.store.locked(key, asked)))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<String>, StoreError>> {
        Box::pin(self.troubles.seen(self.store.list(prefix)))
    }
}

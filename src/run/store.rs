//! Where a run's evidence lies: a folder, or buckets.
//!
//! Promises: the bucket that the pack names for evidence is the one place that was asked for; every other, such as that of state, is a
//! folder of the user's own. Refuses: to call a folder locked.

use std::{path::PathBuf, sync::Arc};

use futures::future::BoxFuture;

use crate::{
    evidence::store::{Store, StoreError, dir::Dir},
    gateway::witness::Buckets,
};

/// Where evidence goes.
pub enum Place {
    /// A folder.
    Folder(PathBuf),
    /// Buckets of an object store.
    Buckets(Arc<dyn Buckets>),
}

/// The buckets that a gateway writes to.
pub struct Kept {
    /// Where evidence goes.
    pub place: Place,
    /// The bucket of evidence, by its name in the pack.
    pub evidence: String,
    /// The folder in which each other bucket is one: what outlives an attempt and is no evidence.
    pub state: PathBuf,
}

impl Buckets for Kept {
    fn bucket<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Arc<dyn Store>, StoreError>> {
        Box::pin(async move {
            if name != self.evidence {
                return Ok(Arc::new(Dir::new(self.state.join(name))) as Arc<dyn Store>);
            }
            match &self.place {
                Place::Folder(folder) => Ok(Arc::new(Dir::new(folder)) as Arc<dyn Store>),
                Place::Buckets(buckets) => buckets.bucket(name).await,
            }
        })
    }

    fn endpoint(&self) -> Option<String> {
        match &self.place {
            Place::Folder(_) => None,
            Place::Buckets(buckets) => buckets.endpoint(),
        }
    }
}

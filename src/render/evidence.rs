//! Says where a task's evidence is stored.

use std::fmt;

use crate::api::policy_pack::EvidencePolicy;

/// The bucket and prefix of a pack. They are fixed when a task starts, because the pack may be changed or deleted before the task ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The bucket.
    pub bucket: String,
    /// The pack's prefix. Empty if the pack has none.
    pub prefix: String,
}

impl Location {
    /// Returns where the pack stores evidence.
    pub fn of(policy: &EvidencePolicy) -> Self {
        Self { bucket: policy.bucket.clone(), prefix: policy.prefix.clone().unwrap_or_default() }
    }

    /// Parses the output of [`Display`](fmt::Display).
    pub fn parse(text: &str) -> Option<Self> {
        let (bucket, prefix) = text.strip_prefix("s3://")?.split_once('/')?;
        (!bucket.is_empty()).then(|| Self { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
    }

    /// Returns the location of one task's log: `s3://bucket/prefix/namespace/task/uid`.
    pub fn of_log(&self, namespace: &str, task: &str, uid: &str) -> String {
        let Self { bucket, prefix } = self;
        let parts = [prefix.as_str(), namespace, task, uid];
        format!("s3://{bucket}/{}", parts.iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join("/"))
    }

    /// Returns the location of a log's bucket and prefix. This is the inverse of [`of_log`](Self::of_log).
    pub fn from_log(text: &str, namespace: &str, task: &str, uid: &str) -> Option<Self> {
        let (bucket, path) = text.strip_prefix("s3://")?.split_once('/')?;
        let prefix = path.strip_suffix(&format!("{namespace}/{task}/{uid}"))?;
        let prefix = if prefix.is_empty() { prefix } else { prefix.strip_suffix('/')? };
        (!bucket.is_empty()).then(|| Self { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("b", "", "s3://b/ns/t/u")]
    #[case("b", "p", "s3://b/p/ns/t/u")]
    #[case("b", "p/q", "s3://b/p/q/ns/t/u")]
    fn round_trips(#[case] bucket: &str, #[case] prefix: &str, #[case] log: &str) {
        let location = Location { bucket: bucket.into(), prefix: prefix.into() };
        assert_eq!(location.of_log("ns", "t", "u"), log);
        assert_eq!(Location::from_log(log, "ns", "t", "u").as_ref(), Some(&location));
        assert_eq!(Location::parse(&location.to_string()), Some(location));
    }

    #[rstest::rstest]
    #[case("s3://b/pns/t/u")]
    #[case("s3://b/p/ns/t/v")]
    #[case("https://b/p/ns/t/u")]
    #[case("s3:///ns/t/u")]
    fn refuses_what_is_not_this_tasks(#[case] log: &str) {
        assert_eq!(Location::from_log(log, "ns", "t", "u"), None);
    }
}

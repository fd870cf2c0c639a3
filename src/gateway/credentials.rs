//! What upstreams want to see of us, and no pod ever does.
//!
//! Promises: a credential is read when a call leaves, goes into one header of one request, and is marked so that no log
//! prints it; a reply's header that repeats it is dropped, and struck out of its body (`body::Struck`). Refuses: Secrets without the label
//! `belay.dev/upstream-credential: "true"`. What an upstream encodes or compresses unasked is not looked into.

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{cluster::Cluster, refusal::Refused};
use crate::{api::policy_pack::Credential, policy::rule::Rule};

/// A header that authenticates the gateway's principal to an upstream.
pub struct Injected {
    name: HeaderName,
    value: HeaderValue,
    secret: Vec<u8>,
}

impl Injected {
    /// Reads the credential that a pack names.
    ///
    /// # Errors
    /// [`Rule::UpstreamCredential`] if the Secret is not there or is no header value.
    pub fn read(cluster: &Cluster, credential: &Credential) -> Result<Self, Refused> {
        let Credential { secret, key, header, prefix, principals: _ } = credential;
        let failed = |reason: &str| {
            Err(Refused::upstream(
                Rule::UpstreamCredential,
                format!(
                    "key {key} of Secret {secret} in the system namespace {reason}; label it \
                     belay.dev/upstream-credential: \"true\" and give it the key"
                ),
            ))
        };
        let Some(mut value) = cluster.secret(secret, key) else { return failed("is not there") };
        // What editors and `echo` leave behind.
        while value.last().is_some_and(u8::is_ascii_whitespace) {
            value.pop();
        }
        if value.is_empty() {
            return failed("is empty");
        }
        let name = HeaderName::from_bytes(header.as_bytes());
        let whole = HeaderValue::from_bytes(&[prefix.as_bytes(), &value].concat());
        let (Ok(name), Ok(mut whole)) = (name, whole) else { return failed("is not a header value") };
        whole.set_sensitive(true);
        Ok(Self { name, value: whole, secret: value })
    }

    /// Sets the header, in place of whatever the caller sent under its name, and drops the other usual ones.
    pub fn inject(self, headers: &mut HeaderMap) -> Vec<u8> {
        headers.remove(http::header::AUTHORIZATION);
        headers.remove("x-api-key");
        headers.insert(self.name, self.value);
        self.secret
    }
}

/// Drops every header that repeats the secret.
pub fn scrub(headers: &mut HeaderMap, secret: &[u8]) {
    let repeats = |value: &HeaderValue| value.as_bytes().windows(secret.len().max(1)).any(|part| part == secret);
    let names: Vec<HeaderName> =
        headers.iter().filter(|(_, value)| repeats(value)).map(|(name, _)| name.clone()).collect();
    for name in names {
        headers.remove(name);
    }
}

//! The credentials that the gateway adds to requests to upstreams, and that no pod ever sees.
//!
//! Guarantees: a credential is read when a call leaves, goes into one header of one request, and is marked so that no log prints it. A
//! reply that repeats it in its head or body is withheld as a whole or ends there (`body::Watched`). Nothing is masked, because a mask
//! would reveal the length and the position of the credential to an attacker who can make an upstream repeat text. A credential that is
//! short enough to be guessed by such attempts is not used.
//!
//! Non-goals: Secrets without the label `belay.dev/upstream-credential: "true"`, and encodings of a credential that `forms` does not
//! recognize.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use moka::sync::Cache;

use super::{
    cluster::Cluster,
    forms::{Forms, UnfitError},
    recent::recent,
    refusal::Refused,
};
use crate::{api::policy_pack::Credential, canonical, policy::rule::Rule};

/// Maximum number of credentials whose tables are in memory.
const REMEMBERED: usize = 64;

/// Search tables of credentials, which are built once, by a digest of prefix and credential.
pub struct Known(Cache<[u8; 32], Arc<Forms>>);

impl Default for Known {
    fn default() -> Self {
        Self(recent(REMEMBERED))
    }
}

impl Known {
    fn forms(&self, prefix: &str, secret: &[u8]) -> Result<Arc<Forms>, UnfitError> {
        let key = canonical::sha256(&[prefix.as_bytes(), b"\n", secret].concat());
        if let Some(known) = self.0.get(&key) {
            return Ok(known);
        }
        let forms = Arc::new(Forms::of(prefix, secret)?);
        self.0.insert(key, forms.clone());
        Ok(forms)
    }
}

/// Returns a credential as it is sent: without the trailing white space that editors and `echo` add.
pub fn trimmed(mut value: Vec<u8>) -> Vec<u8> {
    value.truncate(value.trim_ascii_end().len());
    value
}

/// A header that authenticates the gateway to an upstream.
pub struct Injected {
    name: HeaderName,
    value: HeaderValue,
    forms: Arc<Forms>,
}

impl Injected {
    /// Reads the credential that a pack names.
    ///
    /// # Errors
    /// Returns [`Rule::UpstreamCredential`] if the Secret does not exist, is not a valid header value, or could be guessed.
    pub fn read(cluster: &Cluster, known: &Known, credential: &Credential) -> Result<Self, Refused> {
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
        let Some(value) = cluster.secret(secret, key).map(trimmed) else { return failed("does not exist") };
        if value.is_empty() {
            return failed("is empty");
        }
        let name = HeaderName::from_bytes(header.as_bytes());
        let whole = HeaderValue::from_bytes(&[prefix.as_bytes(), &value].concat());
        let (Ok(name), Ok(mut whole)) = (name, whole) else { return failed("is not a header value") };
        whole.set_sensitive(true);
        let forms = known.forms(prefix, &value).map_err(|unfit| {
            let reason =
                format!("key {key} of Secret {secret} in the system namespace {unfit}; create another credential");
            Refused::upstream(Rule::UpstreamCredential, reason)
        })?;
        Ok(Self { name, value: whole, forms })
    }

    /// Sets the header in place of the caller's value, and removes the other usual headers for credentials.
    pub fn inject(self, headers: &mut HeaderMap) -> Arc<Forms> {
        headers.remove(http::header::AUTHORIZATION);
        headers.remove("x-api-key");
        headers.insert(self.name, self.value);
        self.forms
    }
}

/// Returns whether a header's name or value repeats the credential.
pub fn repeated(headers: &HeaderMap, forms: &Forms) -> bool {
    let lines = headers.iter().flat_map(|(name, value)| [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\n"]);
    forms.are_in(&lines.collect::<Vec<_>>().concat())
}

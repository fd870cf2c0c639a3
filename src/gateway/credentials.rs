//! What upstreams want to see of us, and no pod ever does.
//!
//! Guarantees: a credential is read when a call leaves, goes into one header of one request, and is marked so that no log
//! prints it. A reply that repeats it, in its head or its body, is withheld as a whole, or ends where it does (`body::Watched`): nothing
//! is masked, since a mask would tell whoever can have an upstream repeat text how long the credential is, and where. A credential that is so short
//! that it could be found by such tries is not used.
//! Non-goals: Secrets without the label `belay.dev/upstream-credential: "true"`, and what `forms` does not know a credential by.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{
    cluster::Cluster,
    forms::{Forms, UnfitError},
    refusal::Refused,
};
use crate::{api::policy_pack::Credential, canonical, policy::rule::Rule};

/// Credentials whose forms are remembered.
const REMEMBERED: usize = 64;

/// Tables of the forms of credentials, which are made once: a digest of prefix and credential to its table.
#[derive(Default)]
pub struct Known(Mutex<HashMap<[u8; 32], Arc<Forms>>>);

impl Known {
    fn forms(&self, prefix: &str, secret: &[u8]) -> Result<Arc<Forms>, UnfitError> {
        let key = canonical::sha256(&[prefix.as_bytes(), b"\n", secret].concat());
        if let Some(known) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(known.clone());
        }
        let forms = Arc::new(Forms::of(prefix, secret)?);
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(key, forms.clone());
        Ok(forms)
    }
}

/// A credential as it is sent: without what editors and `echo` leave behind.
pub fn trimmed(mut value: Vec<u8>) -> Vec<u8> {
    value.truncate(value.trim_ascii_end().len());
    value
}

/// A header that authenticates the gateway's principal to an upstream.
pub struct Injected {
    name: HeaderName,
    value: HeaderValue,
    forms: Arc<Forms>,
}

impl Injected {
    /// Reads the credential that a pack names.
    ///
    /// # Errors
    /// [`Rule::UpstreamCredential`] if the Secret is not there, is no header value, or could be found by trying.
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
        let Some(value) = cluster.secret(secret, key).map(trimmed) else { return failed("is not there") };
        if value.is_empty() {
            return failed("is empty");
        }
        let name = HeaderName::from_bytes(header.as_bytes());
        let whole = HeaderValue::from_bytes(&[prefix.as_bytes(), &value].concat());
        let (Ok(name), Ok(mut whole)) = (name, whole) else { return failed("is not a header value") };
        whole.set_sensitive(true);
        let forms = known.forms(prefix, &value).map_err(|unfit| {
            let reason = format!("key {key} of Secret {secret} in the system namespace {unfit}; have another one made");
            Refused::upstream(Rule::UpstreamCredential, reason)
        })?;
        Ok(Self { name, value: whole, forms })
    }

    /// Sets the header, in place of whatever the caller sent under its name, and drops the other usual ones.
    pub fn inject(self, headers: &mut HeaderMap) -> Arc<Forms> {
        headers.remove(http::header::AUTHORIZATION);
        headers.remove("x-api-key");
        headers.insert(self.name, self.value);
        self.forms
    }
}

/// Whether a header's name or value repeats the credential.
pub fn repeated(headers: &HeaderMap, forms: &Forms) -> bool {
    let lines = headers.iter().flat_map(|(name, value)| [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\n"]);
    forms.are_in(&lines.collect::<Vec<_>>().concat())
}

//! Headers between an agent and a provider, by the [lists](crate::policy::model::headers).

use http::{HeaderMap, HeaderValue, header};

use crate::policy::model::{headers, members::Terms};

/// Returns the agent's headers that go to the provider. Credentials are left out, because the gateway has the real ones.
pub(super) fn passed_on(given: &HeaderMap, terms: Terms<'_>) -> HeaderMap {
    let mut passed = HeaderMap::new();
    for (name, value) in given {
        let value = headers::passed(name.as_str(), value.as_bytes(), terms);
        if let Some(Ok(value)) = value.map(|value| HeaderValue::from_bytes(&value)) {
            passed.append(name, value);
        }
    }
    passed.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    // A compressed reply could not be metered.
    passed.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    passed
}

/// Removes from a reply's headers those that the agent may not see.
pub(super) fn passed_back(given: &mut HeaderMap) {
    let hidden: Vec<_> = given.keys().filter(|name| !headers::has(headers::REPLY, name.as_str())).cloned().collect();
    for name in hidden {
        given.remove(name);
    }
}

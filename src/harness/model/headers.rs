//! Headers between an agent and a provider.

use http::{HeaderMap, HeaderValue, header};

/// What of the agent's headers goes to the provider. Credentials do not: the gateway has the real ones.
pub(super) fn passed_on(headers: &HeaderMap) -> HeaderMap {
    let mut passed = HeaderMap::new();
    for (name, value) in headers {
        let passes = name == header::ACCEPT
            || name == header::USER_AGENT
            || ["openai-", "anthropic-", "x-stainless-"].iter().any(|prefix| name.as_str().starts_with(prefix));
        if passes {
            passed.append(name, value.clone());
        }
    }
    passed.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    // A compressed reply could not be metered.
    passed.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    passed
}

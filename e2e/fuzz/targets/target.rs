//! The target of a request: an accepted URL means the same scheme, host and port to browsers (WHATWG URL), has no userinfo, and is read
//! again from what is sent.
#![no_main]

use belay::{gateway::authorize::Target, policy::hostname::Authority};
use libfuzzer_sys::fuzz_target;
use url::Url;

fuzz_target!(|text: &str| {
    let Ok(target) = Target::parse(text) else { return };
    let Target { secure, authority, path } = &target;
    let (scheme, default_port) = if *secure { ("https", 443) } else { ("http", 80) };

    let host = authority.host.as_str();
    assert!(host.len() <= 253 && authority.port > 0);
    assert!(host.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.')));
    // Neither of them could end the request line, or the target in it.
    let path = path.to_string();
    assert!(path.starts_with('/') && !path.bytes().any(|byte| byte <= b' ' || byte == b'#'));

    let url = Url::parse(text).expect("the URL standard accepts what `Target` accepts");
    assert_eq!(url.scheme(), scheme);
    assert_eq!(url.host_str().map(|host| host.strip_suffix('.').unwrap_or(host)), Some(host));
    assert_eq!(url.port_or_known_default(), Some(authority.port));
    assert_eq!((url.username(), url.password(), url.fragment()), ("", None, None));

    assert_eq!(Target::parse(&format!("{scheme}://{authority}{path}")), Ok(target.clone()));
    assert_eq!(Authority::parse(&target.host_header(), Some(default_port)).as_ref(), Ok(authority));
    assert!(authority.fits([target.host_header().as_bytes()]));
});

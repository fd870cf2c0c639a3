//! Resolves the `location` of a redirect.
//!
//! Guarantees: the result is an absolute http or https URL without a fragment. A location that URL parsers read in different ways has no
//! result. Non-goals: whether a redirect is followed.

/// Longest location, in bytes. Servers accept URLs of 8 KiB.
const LONGEST: usize = 8_000;

/// Returns the URL to which a server at `url` redirects with this `location`.
pub fn resolve(url: &str, location: &str) -> Option<String> {
    let location = location.trim_matches(' ');
    let location = location.split_once('#').map_or(location, |(location, _)| location);
    let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'\\';
    if location.is_empty() || location.len() > LONGEST || !location.bytes().all(plain) {
        return None;
    }
    let (scheme, rest) = split(url)?;
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (host, path) = rest.split_at_checked(end)?;
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let resolved = if let Some((scheme, rest)) = split(location) {
        format!("{scheme}://{rest}")
    } else if let Some(rest) = location.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{scheme}://{host}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{host}{}{location}", if path.is_empty() { "/" } else { path })
    } else if location.split(['/', '?']).next().is_some_and(|first| first.contains(':')) {
        return None;
    } else {
        let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{host}{folder}/{location}")
    };
    split(&resolved)?;
    let target = resolved.split('?').next().unwrap_or_default();
    let dots = target.split('/').skip(3).any(|segment| matches!(segment, "." | ".."));
    (!dots).then_some(resolved)
}

/// Returns the scheme and the rest of an http or https URL.
fn split(url: &str) -> Option<(&'static str, &str)> {
    let (scheme, rest) = url.split_once("://")?;
    let scheme = if scheme.eq_ignore_ascii_case("https") {
        "https"
    } else if scheme.eq_ignore_ascii_case("http") {
        "http"
    } else {
        return None;
    };
    (!rest.is_empty() && !rest.starts_with(['/', '?', '#'])).then_some((scheme, rest))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::slash("http://a.test/mcp", "/mcp/", Some("http://a.test/mcp/"))]
    #[case::port("http://a.test:8000/mcp", "/mcp/", Some("http://a.test:8000/mcp/"))]
    #[case::absolute("https://a.test/mcp", "https://a.test/mcp/", Some("https://a.test/mcp/"))]
    #[case::scheme_in_capitals("https://a.test/mcp", "HTTP://a.test/mcp/", Some("http://a.test/mcp/"))]
    #[case::other_host("https://a.test/mcp", "https://b.test/", Some("https://b.test/"))]
    #[case::same_scheme("https://a.test/mcp", "//b.test/x", Some("https://b.test/x"))]
    #[case::beside("https://a.test/v1/mcp", "mcp/", Some("https://a.test/v1/mcp/"))]
    #[case::beside_the_root("https://a.test", "mcp", Some("https://a.test/mcp"))]
    #[case::query("https://a.test/mcp?a=1", "?b=2", Some("https://a.test/mcp?b=2"))]
    #[case::query_with_a_url(
        "https://a.test/mcp",
        "/login?next=https://a.test/../x",
        Some("https://a.test/login?next=https://a.test/../x")
    )]
    #[case::fragment("https://a.test/mcp", "/mcp/#top", Some("https://a.test/mcp/"))]
    #[case::nothing("https://a.test/mcp", "", None)]
    #[case::fragment_alone("https://a.test/mcp", "#top", None)]
    #[case::another_scheme("https://a.test/mcp", "ftp://a.test/", None)]
    #[case::script("https://a.test/mcp", "javascript:alert(1)", None)]
    #[case::backslash("https://a.test/mcp", "/\\b.test/", None)]
    #[case::line("https://a.test/mcp", "/mcp/\r\nx: y", None)]
    #[case::dots("https://a.test/mcp", "/a/../b", None)]
    #[case::no_host("https://a.test/mcp", "https:///b.test", None)]
    #[case::three_slashes("https://a.test/mcp", "///b.test", None)]
    fn locations(#[case] url: &str, #[case] location: &str, #[case] expected: Option<&str>) {
        assert_eq!(resolve(url, location).as_deref(), expected);
    }

    proptest::proptest! {
        /// A location leads to another origin only if it names one.
        #[test]
        fn a_location_without_a_host_stays(location in "[/?a-z.:#%]{0,12}") {
            if let Some(url) = resolve("https://a.test/mcp", &location) {
                let names = location.trim().starts_with("//") || location.contains("://");
                proptest::prop_assert!(names || url.starts_with("https://a.test/"), "{location} {url}");
            }
        }
    }
}

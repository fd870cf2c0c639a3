//! The one redirect that the gateway follows: that of an MCP server which has its endpoint at another path of the same origin, such as
//! `/mcp/` for `/mcp`.
//!
//! Guarantees: a message is sent elsewhere only after 307 or 308, which say that the message was not served and that method and body stay.
//! Scheme, host and port stay the same, so class, credential and checked addresses do, too. Non-goals: a second redirect, redirects of HTTP
//! tools, models and the agent's own requests. They pass to the caller.

use http::{Response, StatusCode, header::LOCATION};

use super::authorize::Target;
use crate::policy::redirect;

/// Returns where a message to this target must be sent again, according to its reply.
pub fn followed<B>(target: &Target, reply: &Response<B>) -> Option<Target> {
    if ![StatusCode::TEMPORARY_REDIRECT, StatusCode::PERMANENT_REDIRECT].contains(&reply.status()) {
        return None;
    }
    let mut locations = reply.headers().get_all(LOCATION).iter();
    let (Some(location), None) = (locations.next(), locations.next()) else { return None };
    let scheme = if target.secure { "https" } else { "http" };
    let url = format!("{scheme}://{}{}", target.host_header(), target.path);
    let to = Target::parse(&redirect::resolve(&url, location.to_str().ok()?)?).ok()?;
    ((to.secure, &to.authority) == (target.secure, &target.authority) && to != *target).then_some(to)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::slash(307, &["/mcp/"], Some("https://a.test/mcp/"))]
    #[case::for_ever(308, &["https://a.test:443/mcp/"], Some("https://a.test/mcp/"))]
    #[case::other_case(307, &["https://A.test/x?y=1"], Some("https://a.test/x?y=1"))]
    #[case::moved(301, &["/mcp/"], None)]
    #[case::see_other(303, &["/mcp/"], None)]
    #[case::success(200, &["/mcp/"], None)]
    #[case::itself(307, &["/mcp"], None)]
    #[case::nowhere(307, &[], None)]
    #[case::two_places(307, &["/mcp/", "/x"], None)]
    #[case::other_host(307, &["https://b.test/mcp"], None)]
    #[case::other_host_without_a_scheme(307, &["//b.test/mcp"], None)]
    #[case::other_port(307, &["https://a.test:8443/mcp/"], None)]
    #[case::in_the_clear(307, &["http://a.test/mcp/"], None)]
    #[case::userinfo(307, &["https://x@a.test/mcp/"], None)]
    #[case::within(307, &["https://a.test.b.test/mcp/"], None)]
    fn where_a_message_goes(#[case] status: u16, #[case] locations: &[&str], #[case] expected: Option<&str>) {
        let mut reply = Response::builder().status(status);
        for location in locations {
            reply = reply.header(LOCATION, *location);
        }
        let found = followed(&Target::parse("https://a.test/mcp").unwrap(), &reply.body(()).unwrap());
        assert_eq!(found, expected.map(|url| Target::parse(url).unwrap()));
    }
}

use super::*;

fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())).collect()
}

#[test]
fn one_token_and_it_does_not_travel_on() {
    let mut plain = headers(&[("authorization", "Bearer a.b.c"), ("x", "1")]);
    assert_eq!(take_token(&mut plain).unwrap(), "a.b.c");
    assert!(!plain.contains_key(AUTHORIZATION));
    let mut both = headers(&[("proxy-authorization", "bearer t"), ("authorization", "Basic own")]);
    assert_eq!(take_token(&mut both).unwrap(), "t");
    assert_eq!(both.get(AUTHORIZATION).unwrap(), "Basic own");
    for wrong in [&[][..], &[("authorization", "Basic x")], &[("authorization", "Bearer")], &[("authorization", "x")]] {
        assert_eq!(take_token(&mut headers(wrong)).unwrap_err().rule, Rule::IdentityToken);
    }
    let mut two = headers(&[("authorization", "Bearer a")]);
    two.append(AUTHORIZATION, HeaderValue::from_static("Bearer b"));
    assert!(take_token(&mut two).is_err());
}

#[test]
fn one_hops_headers_and_ours_end_here() {
    let mut all = headers(&[
        ("connection", "keep-alive, X-Named, content-length"),
        ("x-named", "1"),
        ("content-length", "3"),
        ("keep-alive", "1"),
        ("te", "trailers"),
        ("transfer-encoding", "chunked"),
        ("upgrade", "websocket"),
        ("expect", "100-continue"),
        ("proxy-authenticate", "x"),
        ("proxy-connection", "x"),
        ("belay-target", "x"),
        ("belay-anything", "x"),
        ("accept", "*/*"),
        ("cookie", "1"),
    ]);
    strip(&mut all);
    let mut left: Vec<_> = all.keys().map(HeaderName::as_str).collect();
    left.sort_unstable();
    assert_eq!(left, ["accept", "content-length", "cookie"]);
}

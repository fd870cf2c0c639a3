//! The head of a connection's first request, before the HTTP library parses it.
//!
//! Guarantees: a request that the library would reject by itself, with a bare status and without a record, gets a reply with a rule and a
//! reason, and is reported so that it can be recorded. The same holds for requests that two parsers would end at different places, and for
//! TLS, SOCKS and HTTP/2. Accepted bytes pass unchanged. The time, the length and the number of parses of a head are bounded.
//!
//! Non-goals: being the parser that serves requests, and later requests of a connection: the library reports when it has rejected one.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{StatusCode, Uri};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::{
    evidence::record::Channel,
    policy::{decide::Denial, rule::Rule},
};

/// The longest head, in bytes.
const LONGEST: usize = 64 << 10;
/// The most headers of a request, as in the library.
const HEADERS: usize = 100;
/// How often a head is parsed: once its first line is there, once it is whole, and a few times more for empty lines before it.
const LOOKS: usize = 8;
/// The longest part of a line that is used to find out what was requested, in bytes.
const LONGEST_LINE: usize = 1024;

/// The beginning of a connection.
#[derive(Debug)]
pub enum First {
    /// No bytes, or none in time.
    Silence,
    /// The head of a request, and perhaps more bytes.
    Head(Bytes),
    /// Something that is not a valid request.
    Refused(Misheard),
}

/// What is known of an invalid request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misheard {
    /// The channel of the call, had it been valid.
    pub channel: Channel,
    /// The target of the request.
    pub target: String,
    /// The status of the reply.
    pub status: StatusCode,
    /// What was expected, and what was found.
    pub reason: String,
}

impl Misheard {
    /// Returns the denial of the request.
    pub fn denial(&self) -> Denial {
        Denial { rule: Rule::Request, reason: self.reason.clone() }
    }

    /// Returns the whole reply, to be sent as it is.
    pub fn answer(&self, denial: &Denial) -> String {
        let text = format!("{}\n", denial.told("request"));
        format!(
            "HTTP/1.1 {}\r\ncontent-type: text/plain; charset=utf-8\r\n{}: {}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
            self.status,
            crate::wire::RULE,
            denial.rule,
            text.len()
        )
    }
}

/// The status and the reason for rejecting a head.
type Wrong = (StatusCode, String);

fn bad(reason: impl Into<String>) -> Wrong {
    (StatusCode::BAD_REQUEST, reason.into())
}

/// Reads the head of a connection's first request.
pub async fn first(stream: &mut (impl AsyncRead + Unpin), within: Duration) -> First {
    let mut head = BytesMut::with_capacity(4096);
    let read = match tokio::time::timeout(within, read(stream, &mut head)).await {
        Ok(read) => read,
        Err(_) => Err(bad(format!("expected a request's head within {within:?}, found its beginning only"))),
    };
    match read {
        Ok(()) => First::Head(head.freeze()),
        Err(_) if head.is_empty() => First::Silence,
        Err((status, reason)) => {
            let (channel, target) = asked_for(&head);
            First::Refused(Misheard { channel, target, status, reason })
        }
    }
}

async fn read(stream: &mut (impl AsyncRead + Unpin), head: &mut BytesMut) -> Result<(), Wrong> {
    let (mut lined, mut looks) = (false, 0);
    loop {
        let before = head.len();
        match stream.read_buf(head).await {
            Ok(0) => {
                return Err(bad("expected a whole request head, found its beginning and the end of the connection"));
            }
            Ok(_) => {}
            Err(error) => return Err(bad(format!("expected a request head, found an error: {error}"))),
        }
        is_http(head)?;
        let new = head.get(before.saturating_sub(3)..).unwrap_or_default();
        let ended = new.windows(2).any(|two| two == b"\n\n") || new.windows(3).any(|three| three == b"\n\r\n");
        let first_line = !lined && head.contains(&b'\n');
        if ended || first_line {
            (lined, looks) = (true, looks + 1);
            if judge(head)? {
                return Ok(());
            }
        }
        if head.len() >= LONGEST || looks >= LOOKS {
            return Err((
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                format!("expected a request head of at most {LONGEST} bytes that begins at once, found another"),
            ));
        }
    }
}

/// Checks whether the bytes may begin a request, by the first byte that is not part of a line end.
fn is_http(head: &[u8]) -> Result<(), Wrong> {
    let Some(first) = head.iter().find(|byte| !matches!(byte, b'\r' | b'\n')) else { return Ok(()) };
    match first {
        // Methods consist of `tchar` of RFC 9110.
        byte if byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte) => Ok(()),
        0x16 => Err(bad("expected an HTTP/1.1 request, found a TLS handshake; speak plain HTTP to this address")),
        4 | 5 => Err(bad("expected an HTTP/1.1 request, found SOCKS; this is an HTTP proxy")),
        _ => Err(bad("expected an HTTP/1.1 request, found other bytes")),
    }
}

/// Returns whether a head is whole, or what is wrong with it.
fn judge(head: &[u8]) -> Result<bool, Wrong> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Partial) => Ok(false),
        Ok(httparse::Status::Complete(_)) => agrees(&request).map(|()| true),
        Err(httparse::Error::TooManyHeaders) => Err((
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            format!("expected a request with at most {HEADERS} headers, found more"),
        )),
        Err(httparse::Error::Version) => Err(bad("expected HTTP/1.1 or HTTP/1.0, found another version")),
        Err(error) => Err(bad(format!("expected an HTTP/1.1 request, found one that cannot be read: {error}"))),
    }
}

/// Checks that every parser reads the request in the same way: its target, and where it ends.
fn agrees(request: &httparse::Request<'_, '_>) -> Result<(), Wrong> {
    let target = request.path.unwrap_or_default();
    if let Err(error) = Uri::try_from(target) {
        return Err(bad(format!(
            "expected a path, a URL or host:port after the method, found something else: {error}"
        )));
    }
    let of = |name: &str| {
        let named = request.headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name));
        named.map(|header| header.value.trim_ascii()).collect::<Vec<_>>()
    };
    let (lengths, encodings) = (of("content-length"), of("transfer-encoding"));
    let digits = |length: &&&[u8]| !length.is_empty() && length.iter().all(u8::is_ascii_digit);
    let one_length = lengths.iter().filter(digits).count() == lengths.len()
        && lengths.windows(2).all(|pair| matches!(pair, [one, other] if one == other));
    if !one_length {
        return Err(bad("expected one Content-Length of digits, found another or several that differ"));
    }
    match encodings.as_slice() {
        [] => Ok(()),
        _ if !lengths.is_empty() => Err(bad(
            "expected Content-Length or Transfer-Encoding, found both: two readers would end the request differently",
        )),
        _ if request.version == Some(0) => Err(bad("expected no Transfer-Encoding in HTTP/1.0, found one")),
        [one] if one.eq_ignore_ascii_case(b"chunked") => Ok(()),
        _ => Err(bad("expected Transfer-Encoding: chunked and no other, found another")),
    }
}

/// Returns what an unreadable head requests: the text between its method and its version.
fn asked_for(head: &[u8]) -> (Channel, String) {
    const UNKNOWN: &str = "(no request)";
    let line = head.split(|byte| *byte == b'\n').find(|line| !line.trim_ascii().is_empty()).unwrap_or_default();
    let line = String::from_utf8_lossy(line.get(..LONGEST_LINE).unwrap_or(line));
    let line = line.trim_end_matches('\r');
    let Some((method, rest)) =
        line.split_once(' ').filter(|(method, _)| method.bytes().all(|b| b.is_ascii_uppercase()))
    else {
        return (Channel::Egress, UNKNOWN.to_owned());
    };
    let target = rest.rsplit_once(" HTTP/").map_or(rest, |(target, _)| target);
    let host = ["http://", "https://"].into_iter().find_map(|scheme| target.strip_prefix(scheme));
    let (channel, target) = match host {
        _ if method == "CONNECT" => (Channel::Egress, target),
        Some(host) => (Channel::Egress, host.split(['/', '?', '#']).next().unwrap_or_default()),
        // The query is private to the agent, so it is not recorded.
        None if target.starts_with('/') => {
            let path = target.split(['?', '#']).next().unwrap_or_default();
            (if path.starts_with("/v1/") { Channel::Model } else { Channel::Tool }, path)
        }
        None => (Channel::Egress, UNKNOWN),
    };
    (channel, if target.is_empty() { UNKNOWN.to_owned() } else { target.to_owned() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    async fn heard(bytes: &[u8]) -> First {
        first(&mut &*bytes, Duration::from_secs(1)).await
    }

    #[rstest]
    #[case::get(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")]
    #[case::bare_newlines(b"GET / HTTP/1.1\nHost: a\n\n")]
    #[case::connect(b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n\x16\x03\x01")]
    #[case::absolute(b"GET http://a.test/x?y HTTP/1.0\r\n\r\n")]
    #[case::empty_lines_before(b"\r\n\r\nGET / HTTP/1.1\r\n\r\n")]
    #[case::length(b"POST /mcp HTTP/1.1\r\ncontent-length: 2\r\nContent-Length: 2\r\n\r\n{}")]
    #[case::chunked(b"POST /mcp HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n")]
    #[tokio::test]
    async fn requests_pass_as_they_came(#[case] bytes: &[u8]) {
        let First::Head(head) = heard(bytes).await else { panic!() };
        assert_eq!(head, bytes);
    }

    #[rstest]
    #[case::nul(b"CONNECT a.test\0.evil.test:443 HTTP/1.1\r\n\r\n", 400, Channel::Egress, "a.test\0.evil.test:443")]
    #[case::beyond_ascii("CONNECT аllowed.test:443 HTTP/1.1\r\n\r\n".as_bytes(), 400, Channel::Egress, "аllowed.test:443")]
    #[case::two_ports(b"CONNECT a.test:443:22 HTTP/1.1\r\n\r\n", 400, Channel::Egress, "a.test:443:22")]
    #[case::two_lengths(
        b"POST /mcp HTTP/1.1\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n",
        400,
        Channel::Tool,
        "/mcp"
    )]
    #[case::list_of_lengths(b"POST /mcp HTTP/1.1\r\ncontent-length: 2, 2\r\n\r\n", 400, Channel::Tool, "/mcp")]
    #[case::signed_length(b"POST /mcp HTTP/1.1\r\ncontent-length: +2\r\n\r\n", 400, Channel::Tool, "/mcp")]
    #[case::length_and_chunked(
        b"POST /mcp HTTP/1.1\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n",
        400,
        Channel::Tool,
        "/mcp"
    )]
    #[case::chunked_and_length(
        b"POST /v1/messages HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n",
        400,
        Channel::Model,
        "/v1/messages"
    )]
    #[case::other_encoding(
        b"POST /mcp HTTP/1.1\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
        400,
        Channel::Tool,
        "/mcp"
    )]
    #[case::hidden_encoding(b"POST /mcp HTTP/1.1\r\ntransfer-encoding: xchunked\r\n\r\n", 400, Channel::Tool, "/mcp")]
    #[case::old_and_chunked(b"POST /mcp HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n", 400, Channel::Tool, "/mcp")]
    #[case::fold(b"GET http://a.test/ HTTP/1.1\r\nhost: a.test\r\n evil.test\r\n\r\n", 400, Channel::Egress, "a.test")]
    #[case::space_before_colon(b"GET /mcp?key=x HTTP/1.1\r\nhost : a\r\n\r\n", 400, Channel::Tool, "/mcp")]
    #[case::http_0_9(b"GET /\r\n", 400, Channel::Tool, "/")]
    #[case::http_2(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, Channel::Egress, "(no request)")]
    #[case::http_3(b"GET / HTTP/3.0\r\n\r\n", 400, Channel::Tool, "/")]
    #[case::space_in_target(b"GET http://a.test/ x HTTP/1.1\r\n\r\n", 400, Channel::Egress, "a.test")]
    #[case::tls(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, Channel::Egress, "(no request)")]
    #[case::socks(b"\x05\x01\x00", 400, Channel::Egress, "(no request)")]
    #[case::ssh(b"SSH-2.0-x\r\n", 400, Channel::Egress, "(no request)")]
    #[case::broken_off(b"CONNECT a.test:443 HTTP/1.1\r\nhost: a", 400, Channel::Egress, "a.test:443")]
    #[tokio::test]
    async fn what_is_no_request_is_told_as_far_as_it_is_known(
        #[case] bytes: &[u8],
        #[case] status: u16,
        #[case] channel: Channel,
        #[case] target: &str,
    ) {
        let First::Refused(found) = heard(bytes).await else { panic!("{:?}", String::from_utf8_lossy(bytes)) };
        assert_eq!(
            (found.status.as_u16(), found.channel, found.target.as_str()),
            (status, channel, target),
            "{found:?}"
        );
        let answer = found.answer(&found.denial());
        assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n") && answer.contains("request.malformed"), "{answer}");
        assert_eq!(answer.matches("\r\n\r\n").count(), 1, "{answer}");
    }

    #[tokio::test]
    async fn heads_are_bounded() {
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(101));
        let long = format!("GET / HTTP/1.1\r\na: {}\r\n\r\n", "b".repeat(LONGEST));
        let empty = "\r\n".repeat(40_000);
        for bytes in [many, long, empty] {
            let First::Refused(found) = heard(bytes.as_bytes()).await else { panic!() };
            assert_eq!(found.status.as_u16(), 431, "{found:?}");
        }
        assert!(matches!(heard(b"").await, First::Silence));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_slow_is_told_of_and_who_says_nothing_is_not() {
        let (mut agent, mut harness) = tokio::io::duplex(64);
        let within = Duration::from_secs(10);
        assert!(matches!(first(&mut harness, within).await, First::Silence));
        tokio::io::AsyncWriteExt::write_all(&mut agent, b"GET /mcp HT").await.unwrap();
        let First::Refused(found) = first(&mut harness, within).await else { panic!() };
        assert!(found.reason.contains("10s"), "{found:?}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0_usize..60) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let good = b"CONNECT a.test:443 HTTP/1.1\r\nhost: a.test:443\r\n\r\n";
            let mixed = [&good[..cut.min(good.len())], &bytes[..]].concat();
            for bytes in [bytes, mixed] {
                if let First::Refused(found) = runtime.block_on(heard(&bytes)) {
                    prop_assert!(found.target.len() <= 3 * LONGEST_LINE);
                }
            }
        }
    }
}

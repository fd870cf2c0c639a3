//! The first bytes of a tunnel: if the gateway passes them on, another parser of TLS finds the tunnel's host as the one server name in
//! them, and it makes no difference how the bytes were cut into pieces.
#![no_main]

use std::{
    pin::Pin,
    sync::LazyLock,
    task::{Context, Poll},
};

use belay::{
    gateway::tunnel,
    policy::hostname::{Authority, Hostname},
};
use libfuzzer_sys::fuzz_target;
use tls_parser::{
    TlsExtension, TlsRecordType, parse_tls_extension_sni_content, parse_tls_extension_unknown,
    parse_tls_handshake_client_hello, parse_tls_raw_record,
};
use tokio::{
    io::{AsyncRead, ReadBuf},
    runtime::{Builder, Runtime},
};

/// The tunnel's host and port. The seeds are for this host.
static TO: LazyLock<Authority> =
    LazyLock::new(|| Authority::parse("docs.world.test:443", None).expect("host and port"));
/// The maximum of bytes that the gateway reads before it decides: 32 KiB, and the rest of the last piece.
const MOST: usize = (32 << 10) + 4096;

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
}

fuzz_target!(|sent: &[u8]| {
    let passed = opening(sent, sent.len());
    for size in [1, 61] {
        let in_pieces = opening(sent, size);
        assert_eq!(in_pieces.is_some(), passed.is_some(), "expected the same of pieces of {size} bytes");
    }
    let Some(passed) = passed else { return };
    assert!(sent.starts_with(&passed) && passed.len() <= MOST);
    assert_eq!(passed.is_empty(), sent.is_empty());
    if !passed.is_empty() {
        let hosts: Vec<_> = names(&passed).iter().map(|name| Hostname::parse(name)).collect();
        assert_eq!(hosts, vec![Ok(TO.host.clone())]);
    }
});

/// Returns what the gateway would pass on of these bytes, if they arrived in pieces of this size.
fn opening(sent: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut pieces = Pieces { rest: sent, size };
    RUNTIME.with(|runtime| runtime.block_on(tunnel::opening(&mut pieces, &TO)).ok())
}

/// Bytes that arrive in pieces.
struct Pieces<'b> {
    rest: &'b [u8],
    size: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let whole = self.rest;
        let (piece, rest) = whole.split_at(self.size.min(into.remaining()).min(whole.len()));
        into.put_slice(piece);
        self.rest = rest;
        Poll::Ready(Ok(()))
    }
}

/// Returns every server name in the ClientHello with which these records begin, as tls-parser reads it.
fn names(mut records: &[u8]) -> Vec<String> {
    let mut handshake = Vec::new();
    while let Ok((rest, record)) = parse_tls_raw_record(records) {
        if record.hdr.record_type == TlsRecordType::Handshake {
            handshake.extend_from_slice(record.data);
        }
        records = rest;
    }
    let Some(([1, length @ ..], message)) = handshake.split_first_chunk::<4>() else { return Vec::new() };
    let length = length.iter().fold(0, |length, byte| (length << 8) | usize::from(*byte));
    let message = message.get(..length).expect("a whole message");
    let (_, hello) = parse_tls_handshake_client_hello(message).expect("a ClientHello");
    let (mut extensions, mut names) = (hello.ext.unwrap_or_default(), Vec::new());
    while !extensions.is_empty() {
        let (rest, extension) = parse_tls_extension_unknown(extensions).expect("an extension");
        // 0 is the type of the extension with server names (RFC 6066).
        if let TlsExtension::Unknown(kind, content) = extension
            && kind.0 == 0
        {
            let (_, list) = parse_tls_extension_sni_content(content).expect("a list of server names");
            let TlsExtension::SNI(list) = list else { panic!("expected a list of server names") };
            // 0 is the type of a host name. No RFC defines another one. rustls reads nothing after a name of another type.
            let hosts = list.iter().take_while(|(kind, _)| kind.0 == 0);
            names.extend(hosts.map(|(_, name)| String::from_utf8_lossy(name).into_owned()));
        }
        extensions = rest;
    }
    names
}

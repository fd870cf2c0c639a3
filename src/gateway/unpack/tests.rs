use flate2::{
    Compression,
    write::{DeflateEncoder, GzEncoder, ZlibEncoder},
};
use http_body_util::{BodyExt, Full, StreamBody};
use proptest::prelude::*;
use rstest::rstest;

use super::*;

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

fn zlib(text: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

fn raw(text: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

fn unpack(packing: Packing, packed: Vec<u8>) -> Result<Vec<u8>, String> {
    let unpacked = Unpacked::new(Full::<Bytes>::from(packed), packing).collect();
    let collected = futures::executor::block_on(unpacked).map_err(|error| error.to_string())?;
    Ok(collected.to_bytes().to_vec())
}

proptest! {
    /// Compressed text is restored, whatever pieces it arrives in.
    #[test]
    fn what_was_packed_comes_out(
        text in proptest::collection::vec(any::<u8>(), 0..5_000),
        piece in 1usize..700,
        packing in 0..3,
    ) {
        let (packed, packing) = match packing {
            0 => (gzip(&text), Packing::Gzip),
            1 => (zlib(&text), Packing::Deflate),
            _ => (raw(&text), Packing::Deflate),
        };
        // Bare DEFLATE that looks like zlib is not recognized, and no first block that a server writes looks so.
        prop_assume!(packing == Packing::Gzip || packed[0] & 0x0f != 8 || packed[0] == 0x78);
        let pieces: Vec<_> = packed.chunks(piece).map(|piece| Ok::<_, std::io::Error>(Frame::data(Bytes::copy_from_slice(piece)))).collect();
        let body = Unpacked::new(StreamBody::new(futures::stream::iter(pieces)), packing);
        let found = futures::executor::block_on(body.collect()).unwrap().to_bytes();
        prop_assert_eq!(found.as_ref(), text.as_slice());
    }
}

#[rstest]
#[case::cut(Packing::Gzip, gzip(&b"hello ".repeat(50)).into_iter().rev().skip(9).rev().collect())]
#[case::cut_within(Packing::Gzip, gzip(b"hello")[..14].to_vec())]
#[case::only_a_head(Packing::Gzip, gzip(b"")[..5].to_vec())]
#[case::none_at_all(Packing::Gzip, b"{\"choices\": []}".to_vec())]
#[case::another_sum(Packing::Gzip, { let mut packed = gzip(b"hello"); let at = packed.len() - 6; packed[at] ^= 1; packed })]
#[case::none_at_all(Packing::Deflate, b"{\"choices\": []}".to_vec())]
#[case::cut(Packing::Deflate, zlib(b"hello")[..6].to_vec())]
fn what_is_broken_is_no_reply(#[case] packing: Packing, #[case] packed: Vec<u8>) {
    let found = unpack(packing, packed);
    assert!(found.as_ref().is_err_and(|error| error.contains("expected a reply in ")), "{found:?}");
}

#[test]
fn nothing_is_nothing_and_members_follow_each_other() {
    assert_eq!(unpack(Packing::Gzip, vec![]).unwrap(), b"");
    assert_eq!(unpack(Packing::Gzip, [gzip(b"a"), gzip(b"b")].concat()).unwrap(), b"ab");
}

/// 80 KiB become 80 MiB. Each piece is short, and the body ends with an error when it is too long.
#[tokio::test]
async fn a_bomb_is_short_at_any_time_and_ends() {
    for (of, ends) in [(LARGEST / 2, false), (LARGEST + 1, true)] {
        let bomb = gzip(&vec![b'a'; usize::try_from(of).unwrap()]);
        let mut body = Unpacked::new(Full::<Bytes>::from(bomb), Packing::Gzip);
        let (mut longest, mut failed) = (0, None);
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => longest = longest.max(frame.into_data().unwrap().len()),
                Err(error) => failed = Some(error.to_string()),
            }
        }
        assert!(longest <= (STEP * 1032) + (64 << 10), "{longest}");
        assert_eq!(failed.is_some_and(|error| error.contains("at most")), ends);
    }
}

/// Each event of a compressed stream is available as soon as its bytes have arrived.
#[tokio::test]
async fn events_do_not_wait_for_each_other() {
    let (sender, receiver) = futures::channel::mpsc::unbounded();
    let mut body = Unpacked::new(StreamBody::new(receiver), Packing::Gzip);
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    for n in 0..3 {
        let event = format!("data: {n}\n\n");
        encoder.write_all(event.as_bytes()).unwrap();
        encoder.flush().unwrap();
        let packed = std::mem::take(encoder.get_mut());
        sender.unbounded_send(Ok::<_, std::io::Error>(Frame::data(Bytes::from(packed)))).unwrap();
        let mut came = Vec::new();
        while came.len() < event.len() {
            came.extend_from_slice(&body.frame().await.unwrap().unwrap().into_data().unwrap());
        }
        assert_eq!(came, event.as_bytes());
    }
    drop(sender);
    assert!(body.frame().await.unwrap().is_err(), "it has no end");
}

#[test]
fn only_what_it_can_unpack_has_a_name() {
    for (name, expected) in [
        ("gzip", Some(Packing::Gzip)),
        ("X-GZIP", Some(Packing::Gzip)),
        ("Deflate", Some(Packing::Deflate)),
        ("br", None),
        ("zstd", None),
        ("compress", None),
    ] {
        assert_eq!(Packing::named(name), expected, "{name}");
    }
}

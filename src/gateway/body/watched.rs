//! What a reader of a watched body can learn about the credential by guessing its first letters: nothing. As the control, a reader learns
//! all of it from a former implementation, which held back only what may begin the credential.

use futures::{Stream, StreamExt, stream};
use http_body_util::StreamBody;
use tokio::time::sleep;

use super::*;

const SECRET: &str = "sk-live-9fQ2xZ7b-rT5mK1wE";
const ALPHABET: &str = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_";

/// What a reader observes of a reply: the delay before each piece, the length of the piece or the error, and whether the text is unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    pieces: Vec<(Duration, Result<usize, String>)>,
    unchanged: bool,
}

/// Returns a body whose pieces arrive some time apart.
fn upstream(pieces: Vec<Vec<u8>>) -> impl Body<Data = Bytes, Error = BoxError> + Send {
    let frames = stream::iter(pieces).then(|piece| async move {
        sleep(Duration::from_millis(150)).await;
        Ok::<_, BoxError>(Frame::data(Bytes::from(piece)))
    });
    StreamBody::new(frames)
}

async fn look<B: Body<Data = Bytes, Error = BoxError>>(body: B, sent: &[u8]) -> Seen {
    let mut body = std::pin::pin!(body);
    let (mut pieces, mut all, mut last) = (Vec::new(), Vec::new(), Instant::now());
    while let Some(frame) = body.frame().await {
        let after = last.elapsed();
        last = Instant::now();
        let piece = frame.map(|frame| frame.into_data().unwrap()).map_err(|error| error.to_string());
        all.extend_from_slice(piece.as_deref().unwrap_or_default());
        pieces.push((after, piece.map(|piece| piece.len())));
    }
    pieces.push((last.elapsed(), Ok(0)));
    Seen { pieces, unchanged: all == sent }
}

fn forms() -> Arc<Forms> {
    Arc::new(Forms::of("Bearer ", SECRET.as_bytes()).unwrap())
}

/// Returns a body of the former implementation: it held back only what may begin the credential.
fn before(pieces: Vec<Vec<u8>>) -> impl Body<Data = Bytes, Error = BoxError> {
    let all = stream::unfold((stream::iter(pieces), Vec::new()), |(mut pieces, mut held): (_, Vec<u8>)| async move {
        loop {
            let Some(piece): Option<Vec<u8>> = pieces.next().await else {
                let rest = std::mem::take(&mut held);
                return (!rest.is_empty()).then_some((rest, (pieces, held)));
            };
            sleep(Duration::from_millis(150)).await;
            held.extend_from_slice(&piece);
            held = String::from_utf8(held).unwrap().replace(SECRET, &"*".repeat(SECRET.len())).into_bytes();
            let begins = |length: &usize| held.ends_with(&SECRET.as_bytes()[..*length]);
            let kept = (1..SECRET.len()).rev().find(begins).unwrap_or(0);
            let rest = held.split_off(held.len() - kept);
            if !held.is_empty() {
                return Some((held, (pieces, rest)));
            }
            held = rest;
        }
    });
    StreamBody::new(all.map(|piece| Ok(Frame::data(Bytes::from(piece)))))
}

/// How an upstream repeats a guess: the text before and after it, whether it is in events, and the number of bytes in the second piece.
#[derive(Clone, Copy, Debug)]
struct Shape {
    before: usize,
    after: &'static str,
    events: bool,
    cut: usize,
}

impl Shape {
    fn pieces(self, guess: &str) -> Vec<Vec<u8>> {
        let text = format!("{}{guess}", ".".repeat(self.before));
        let cut = text.len() - self.cut.min(text.len());
        vec![text[..cut].into(), text[cut..].into(), self.after.into()]
    }
}

const SHAPES: [Shape; 6] = [
    Shape { before: 50, after: "\n\ndata: [DONE]\n\n", events: true, cut: 0 },
    Shape { before: 50, after: "\n\ndata: [DONE]\n\n", events: false, cut: 0 },
    Shape { before: 7, after: "\"}]}", events: false, cut: 3 },
    Shape { before: 7, after: "\n", events: true, cut: 5 },
    Shape { before: 0, after: "", events: false, cut: 1 },
    Shape { before: 0, after: "", events: true, cut: 0 },
];

async fn watched(shape: Shape, guess: &str, forms: &Arc<Forms>) -> Seen {
    let pieces = shape.pieces(guess);
    let sent = pieces.concat();
    look(Watched::new(upstream(pieces), forms.clone(), shape.events, Box::new(|| ())), &sent).await
}

async fn formerly(shape: Shape, guess: &str) -> Seen {
    let pieces = shape.pieces(guess);
    let sent = pieces.concat();
    look(before(pieces), &sent).await
}

/// Runs the attack: of all possible next letters, finds the one whose reply differs from the reply to the same letter after other text.
/// Returns the recovered text and the number of attempts.
async fn recovered<F: Future<Output = Seen>>(ask: impl Fn(String) -> F) -> (String, usize) {
    let (mut known, mut tries) = ("sk-".to_owned(), 0);
    'next: while known.len() < SECRET.len() {
        for letter in ALPHABET.chars() {
            tries += 2;
            if ask(format!("{known}{letter}")).await != ask(format!("{}{letter}", "~".repeat(known.len()))).await {
                known.push(letter);
                continue 'next;
            }
        }
        break;
    }
    (known, tries)
}

#[tokio::test(start_paused = true)]
async fn the_attack_that_found_the_key_finds_nothing() {
    // The control: the former implementation reveals every letter.
    let (found, tries) = recovered(|guess| async move { formerly(SHAPES[0], &guess).await }).await;
    assert_eq!(found, SECRET);
    assert!(tries < 2 * ALPHABET.len() * SECRET.len(), "{tries}");
    let forms = forms();
    for shape in SHAPES {
        let (found, _) = recovered(|guess| {
            let forms = forms.clone();
            async move { watched(shape, &guess, &forms).await }
        })
        .await;
        assert_eq!(found, "sk-", "{shape:?}");
    }
}

/// Makes 10^5 guesses, half of them with correct letters. What a reader observes is the same for a right guess and for a wrong one of the
/// same length, and the text is unchanged.
#[tokio::test(start_paused = true)]
async fn a_hundred_thousand_guesses_see_no_difference() {
    let forms = forms();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move |below: usize| {
        // Xorshift: the same guesses in each run.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        usize::try_from(random % u64::try_from(below).unwrap()).unwrap()
    };
    let (mut told_now, mut told_before, mut pairs_before) = (0, 0, 0);
    for pair in 0..50_000_usize {
        let shape = Shape { before: next(60), ..SHAPES[next(SHAPES.len())] };
        let right = &SECRET[..1 + next(SECRET.len() - 1)];
        let place = right.len() - 1;
        let other = ALPHABET.chars().cycle().skip(next(64)).find(|c| !right.ends_with(*c)).unwrap();
        let wrong = format!("{}{other}", &right[..place]);
        let (by_right, by_wrong) = (watched(shape, right, &forms).await, watched(shape, &wrong, &forms).await);
        assert!(by_right.unchanged && by_wrong.unchanged, "{shape:?} {right} {wrong}");
        told_now += usize::from(by_right != by_wrong);
        if pair % 50 == 0 {
            pairs_before += 1;
            told_before += usize::from(formerly(shape, right).await != formerly(shape, &wrong).await);
        }
    }
    assert_eq!(told_now, 0, "pairs of guesses that can be told apart");
    assert!(told_before * 10 > pairs_before, "the control tells guesses apart: {told_before} of {pairs_before}");
}

fn framed(pieces: &[&[u8]]) -> impl Stream<Item = Result<Frame<Bytes>, BoxError>> {
    let pieces: Vec<_> = pieces.iter().map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece)))).collect();
    stream::iter(pieces)
}

/// Returns what was passed on of these pieces, and whether the credential was noticed.
async fn passed(pieces: &[&[u8]], events: bool) -> (Vec<Vec<u8>>, bool) {
    let (alarm, mut told) = tokio::sync::oneshot::channel();
    let alarm: Alarm = Box::new(move || alarm.send(()).unwrap());
    let mut body = Watched::new(StreamBody::new(framed(pieces)), forms(), events, alarm);
    let mut all = Vec::new();
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => all.push(frame.into_data().unwrap().to_vec()),
            Err(error) => {
                assert!(error.is::<RepeatedError>());
                assert!(body.frame().await.is_none(), "nothing comes after it");
                assert!(told.try_recv().is_ok());
                return (all, true);
            }
        }
    }
    (all, told.try_recv().is_ok())
}

#[tokio::test]
async fn wherever_it_is_cut_it_is_noticed_before_any_of_it_is_passed_on() {
    let text = format!("data: {{\"echo\":\"Bearer {SECRET} \"}}\n\ndata: more\n\n");
    let text = text.as_bytes();
    for first in 0..text.len() {
        let second = first + (text.len() - first) / 2;
        let pieces = [&text[..first], &text[first..second], &text[second..]];
        for events in [true, false] {
            assert_eq!(passed(&pieces, events).await, (vec![], true), "{first} {events}");
        }
    }
}

#[tokio::test]
async fn events_pass_as_soon_as_they_are_whole() {
    let pieces: [&[u8]; 6] =
        [b"event: one\n\n", b"event: sec", b"ond\r\n\r\ndata: sk-live", b"-\n", b"\n\r\r", b"rest sk-live-9fQ2xZ7b"];
    let (got, noticed) = passed(&pieces, true).await;
    let expected: [&[u8]; 4] =
        [b"event: one\n\n", b"event: second\r\n\r\n", b"data: sk-live-\n\n\r\r", b"rest sk-live-9fQ2xZ7b"];
    assert_eq!((got.iter().map(Vec::as_slice).collect::<Vec<_>>(), noticed), (expected.to_vec(), false));
}

#[tokio::test]
async fn all_else_passes_in_pieces_of_one_size_and_whole_where_it_is_short() {
    for (length, expected) in [
        (0, vec![]),
        (10, vec![10]),
        (HELD + PIECE - 1, vec![HELD + PIECE - 1]),
        (HELD + PIECE, vec![PIECE, HELD]),
        (HELD + 3 * PIECE + 5, vec![PIECE, PIECE, PIECE, HELD + 5]),
    ] {
        let text = vec![b's'; length];
        let chunks: Vec<&[u8]> = text.chunks(PIECE / 4 - 1).collect();
        for events in [false, true] {
            let (got, noticed) = passed(&chunks, events).await;
            assert_eq!(
                (got.iter().map(Vec::len).collect::<Vec<_>>(), noticed),
                (expected.clone(), false),
                "{length} {events}"
            );
        }
    }
}

#[tokio::test]
async fn in_a_long_reply_it_is_noticed_at_every_edge() {
    for place in [0, PIECE - SECRET.len(), PIECE - 3, PIECE, 2 * PIECE - 1, HELD + PIECE - 5, 3 * PIECE - 7] {
        let mut text = vec![b'.'; HELD + 3 * PIECE];
        text.splice(place..place, SECRET.bytes());
        let chunks: Vec<&[u8]> = text.chunks(10_007).collect();
        for events in [false, true] {
            let (got, noticed) = passed(&chunks, events).await;
            assert!(noticed, "{place} {events}");
            assert!(got.concat().len() <= place, "none of it is passed on: {place} {events}");
        }
    }
}

/// The credential arrives a few letters in each event, as models write. What was passed on cannot be taken back, but the rest is withheld.
#[tokio::test]
async fn letters_in_many_events_are_put_together() {
    let chat = |text: &str| format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n");
    let message = |text: &str| {
        format!(
            "event: content_block_delta\ndata: {{\"type\":\"content_block_delta\",\"delta\":{{\"type\":\"text_delta\",\"text\":\"{text}\"}}}}\n\n"
        )
    };
    let plain = |text: &str| format!("data: {text}\n\n");
    let shapes: [&dyn Fn(&str) -> String; 3] = [&chat, &message, &plain];
    for event in shapes {
        for size in [1, 2, 5] {
            let letters: Vec<String> =
                SECRET.as_bytes().chunks(size).map(|part| event(std::str::from_utf8(part).unwrap())).collect();
            let pieces: Vec<&[u8]> = letters.iter().map(String::as_bytes).collect();
            let (got, noticed) = passed(&pieces, true).await;
            assert!(noticed, "{letters:?}");
            assert_eq!(got.len(), letters.len() - 1, "only the last is left to withhold");
            // The control: the credential without its last letter is not noticed.
            assert!(!passed(&pieces[..pieces.len() - 1], true).await.1);
        }
    }
    let encoded = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, format!("Bearer {SECRET}"));
    let letters: Vec<String> =
        encoded.as_bytes().chunks(3).map(|part| chat(std::str::from_utf8(part).unwrap())).collect();
    assert!(passed(&letters.iter().map(String::as_bytes).collect::<Vec<_>>(), true).await.1);
}

/// The received part of a reply that its upstream ended early is searched like a complete reply and passed on. Then the error is returned.
#[tokio::test]
async fn what_came_before_it_broke_off_passes_unless_it_repeats_the_credential() {
    for events in [false, true] {
        for (text, noticed) in [("data: a\n\ndata: sk-live", false), ("", false), (&*format!("data: {SECRET}"), true)] {
            let error = stream::once(async { Err::<_, BoxError>("it ends here".into()) });
            let pieces = [text.as_bytes()];
            let body = StreamBody::new(framed(&pieces).chain(error));
            let mut body = Watched::new(body, forms(), events, Box::new(|| ()));
            let mut came = String::new();
            let error = loop {
                match body.frame().await.unwrap() {
                    Ok(frame) => came.push_str(std::str::from_utf8(&frame.into_data().unwrap()).unwrap()),
                    Err(error) => break error,
                }
            };
            assert_eq!((error.is::<RepeatedError>(), &*came), (noticed, if noticed { "" } else { text }), "{events}");
            assert!(body.frame().await.is_none());
        }
    }
}

//! Removal of the usage event from a stream whose client did not ask for it.
//!
//! Belay asks a provider to report the usage of each stream of chat completions. The usage comes in an event without choices, and agents
//! that did not ask for it read the first choice of each event.
//!
//! Guarantees: everything else passes byte for byte, each event as soon as it is whole. Non-goals: usage beside choices, which clients
//! ignore.

use memchr::memmem;
use serde_json::Value;

/// The longest event that is checked, in bytes. A usage event is far shorter.
const LONGEST: usize = 64 << 10;

/// A stream of chat completions without its usage event.
#[derive(Debug, Default)]
pub(super) struct Unasked {
    /// The part of an incomplete event that has come so far.
    held: Vec<u8>,
}

impl Unasked {
    /// Adds a chunk and returns the bytes to pass on.
    pub(super) fn pass(&mut self, chunk: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(chunk);
        let mut passed = Vec::new();
        while let Some(end) = end(&self.held) {
            let event: Vec<u8> = self.held.drain(..end).collect();
            if !is_account(&event) {
                passed.extend(event);
            }
        }
        if self.held.len() > LONGEST {
            passed.append(&mut self.held);
        }
        passed
    }

    /// Returns the remaining bytes once the stream is over.
    pub(super) fn rest(self) -> Vec<u8> {
        if is_account(&self.held) { vec![] } else { self.held }
    }
}

/// Returns where the first event ends.
fn end(held: &[u8]) -> Option<usize> {
    let ends = [&b"\n\n"[..], b"\n\r\n", b"\r\r"];
    ends.into_iter().filter_map(|end| Some(memmem::find(held, end)?.saturating_add(end.len()))).min()
}

/// Returns whether an event has the usage and nothing else.
fn is_account(event: &[u8]) -> bool {
    let lines = event.split(|byte| matches!(byte, b'\n' | b'\r'));
    let mut data = lines.filter_map(|line| line.strip_prefix(b"data:"));
    let (Some(data), None) = (data.next(), data.next()) else { return false };
    let Ok(chunk) = serde_json::from_slice::<Value>(data) else { return false };
    let is_empty = chunk.get("choices").and_then(Value::as_array).is_some_and(Vec::is_empty);
    is_empty && chunk.get("usage").is_some_and(Value::is_object)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ACCOUNT: &str = r#"data: {"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5}}"#;
    const OTHERS: [&str; 8] = [
        r#"data: {"choices":[{"delta":{"content":"a"}}],"usage":null}"#,
        r#"data: {"choices":[{"delta":{"content":"{\"choices\":[],\"usage\":{}}"}}]}"#,
        // Azure sends this event first.
        r#"data: {"choices":[],"prompt_filter_results":[]}"#,
        r#"data: {"choices":[],"usage":null}"#,
        r#"data: {"choices":[{"finish_reason":"stop"}],"usage":{"prompt_tokens":7}}"#,
        "data: [DONE]",
        ": keep-alive",
        "event: x\ndata: {",
    ];

    fn passed(stream: &str, cut: usize) -> String {
        let (mut unasked, mut passed) = (Unasked::default(), Vec::new());
        for chunk in stream.as_bytes().chunks(cut) {
            passed.extend(unasked.pass(chunk));
        }
        passed.extend(unasked.rest());
        String::from_utf8(passed).unwrap()
    }

    proptest! {
        #[test]
        fn all_but_the_account_passes_as_it_came(
            events in proptest::collection::vec((0..=OTHERS.len(), 0..3_usize), 0..12),
            cut in 1..200_usize,
            whole in any::<bool>(),
        ) {
            let mut stream = String::new();
            let mut expected = String::new();
            for (event, end) in events {
                let end = ["\n\n", "\r\n\r\n", "\r\r"][end];
                match OTHERS.get(event) {
                    Some(event) => {
                        stream.extend([event, end]);
                        expected.extend([event, end]);
                    }
                    None => stream.extend([ACCOUNT, end]),
                }
            }
            if !whole {
                stream.push_str("data: {\"choices\":[");
                expected.push_str("data: {\"choices\":[");
            }
            prop_assert_eq!(passed(&stream, cut), expected);
        }
    }

    #[test]
    fn an_account_that_the_end_of_the_stream_ends_is_one() {
        assert_eq!(passed(ACCOUNT, 7), "");
    }

    #[test]
    fn an_event_passes_once_it_is_whole_and_a_long_one_sooner() {
        let mut unasked = Unasked::default();
        assert_eq!(unasked.pass(b"data: {\"choices\":[{}]}\n\ndata: "), b"data: {\"choices\":[{}]}\n\n");
        let long = vec![b'x'; LONGEST];
        assert_eq!(unasked.pass(&long).len(), LONGEST + "data: ".len());
    }
}

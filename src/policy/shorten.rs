//! Shortens and escapes untrusted text for display.
//!
//! Guarantees: the result is short, moves no cursor and hides nothing. Agents choose this text, and people read it in terminals.

/// Returns at most 256 characters, with control characters escaped.
pub fn shorten(text: &str) -> String {
    shorten_to(text, 256)
}

/// Returns at most `longest` characters, with control characters escaped.
pub fn shorten_to(text: &str, longest: usize) -> String {
    // Most texts need no change.
    if text.len() <= longest && text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return text.to_owned();
    }
    let mut short: String = text.chars().flat_map(EscapeControl::new).take(longest).collect();
    if text.chars().count() > longest {
        short.push('…');
    }
    short
}

enum EscapeControl {
    Plain(Option<char>),
    Escaped(std::char::EscapeDefault),
}

impl EscapeControl {
    fn new(c: char) -> Self {
        // Bidirectional overrides and zero-width characters hide text as control characters do.
        let hides =
            matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
        if c.is_control() || hides { Self::Escaped(c.escape_default()) } else { Self::Plain(Some(c)) }
    }
}

impl Iterator for EscapeControl {
    type Item = char;
    fn next(&mut self) -> Option<char> {
        match self {
            Self::Plain(c) => c.take(),
            Self::Escaped(escape) => escape.next(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_agents_write_cannot_move_a_cursor() {
        assert_eq!(shorten("a\u{1b}[2Jb\nc\u{202e}d"), "a\\u{1b}[2Jb\\nc\\u{202e}d");
        assert_eq!(shorten(&"x".repeat(1000)).chars().count(), 257);
    }

    proptest! {
        #[test]
        fn nothing_is_long_or_hides(text in any::<String>(), longest in 0_usize..64) {
            let short = shorten_to(&text, longest);
            prop_assert!(short.chars().count() <= longest + 1);
            prop_assert!(!short.chars().any(char::is_control));
        }

        #[test]
        fn plain_and_short_is_as_it_was(text in "[ -~]{0,64}") {
            prop_assert_eq!(shorten_to(&text, 64), text);
        }
    }
}

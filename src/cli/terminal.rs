//! Text that is safe to show, and colors.
//!
//! Targets, reasons and names come from agents and upstreams. Control characters in them could rewrite the screen or run commands in some
//! terminals. Invisible and right-to-left characters could make a line read as another. All of them are shown as escapes.

use std::{fmt, sync::LazyLock};

use regex::Regex;

/// The maximum number of combining marks on one letter that are shown as they are. No script needs more.
const MARKS: usize = 4;

/// Displays a text with everything that is not plainly visible as `\u{…}`.
pub(super) struct Safe<'a>(pub(super) &'a str);

impl fmt::Display for Safe<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (c, hides) in told(self.0) {
            match c {
                '\n' => f.write_str("\\n")?,
                c if hides => write!(f, "{}", c.escape_unicode())?,
                c => write!(f, "{c}")?,
            }
        }
        Ok(())
    }
}

/// Returns each character, and whether it must be escaped at its position. A mark belongs to the letter before it. Without a letter it
/// would change text around it, and many marks would cover the lines around them.
fn told(text: &str) -> impl Iterator<Item = (char, bool)> {
    // The number of marks that may still follow. It is 0 after a character that is not a letter or that is hidden.
    let mut room = 0;
    text.chars().map(move |c| {
        let hides = match is_mark(c) {
            true if room > 0 && !hidden(c) => {
                room -= 1;
                false
            }
            true => true,
            false => {
                let hides = hidden(c);
                room = if hides || c.is_ascii() && !c.is_ascii_alphanumeric() { 0 } else { MARKS };
                hides
            }
        };
        (c, hides)
    })
}

/// Returns whether a character moves the cursor, reorders its neighbors or is invisible. These are: controls and formats, characters that
/// Unicode lets renderers leave out (`Default_Ignorable_Code_Point`: fillers, joiners, variation selectors, tags), all spaces but the plain
/// one, the blank of Braille, and private-use characters.
pub(super) fn hidden(c: char) -> bool {
    static HIDDEN: LazyLock<Option<Regex>> = LazyLock::new(|| {
        Regex::new(r"^[\p{Cc}\p{Cf}\p{Co}\p{Z}\p{Default_Ignorable_Code_Point}\u{2800}\u{fffc}--\u{20}]").ok()
    });
    if c.is_ascii() {
        return c.is_ascii_control();
    }
    matches(&HIDDEN, c)
}

/// Returns whether the character combines with the one before it.
fn is_mark(c: char) -> bool {
    static MARK: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^\p{M}").ok());
    !c.is_ascii() && matches(&MARK, c)
}

/// If the table could not be compiled, every character matches.
fn matches(table: &LazyLock<Option<Regex>>, c: char) -> bool {
    table.as_ref().is_none_or(|table| table.is_match(c.encode_utf8(&mut [0; 4])))
}

/// Returns how often something happened, for display after its name. It is empty if that was once.
pub(super) fn times(count: i64) -> String {
    if count == 1 { String::new() } else { format!(", {count} times") }
}

/// Returns JSON text in which hidden characters are escaped as well. Outside of strings, JSON has none but newlines and spaces.
pub(super) fn safe_json(json: &str) -> String {
    let mut safe = String::with_capacity(json.len());
    let mut units = [0; 2];
    for (c, hides) in told(json) {
        if c != '\n' && hides {
            for unit in c.encode_utf16(&mut units) {
                safe.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            safe.push(c);
        }
    }
    safe
}

/// Colors, or none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paint {
    on: bool,
}

impl Paint {
    /// Uses colors if `on`, unless the environment disables them (no-color.org).
    pub(super) fn new(on: bool) -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        Self { on: on && !unwanted }
    }

    /// Uses no colors.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self { on: false }
    }

    fn wrap(self, code: &str, text: impl fmt::Display) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }

    /// Colors what was allowed or done.
    pub(super) fn good(self, text: impl fmt::Display) -> String {
        self.wrap("32", text)
    }

    /// Colors what was denied or is broken.
    pub(super) fn bad(self, text: impl fmt::Display) -> String {
        self.wrap("31", text)
    }

    /// Colors what needs attention.
    pub(super) fn warn(self, text: impl fmt::Display) -> String {
        self.wrap("33", text)
    }

    /// Highlights names.
    pub(super) fn strong(self, text: impl fmt::Display) -> String {
        self.wrap("1", text)
    }

    /// Dims details.
    pub(super) fn dim(self, text: impl fmt::Display) -> String {
        self.wrap("2", text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_hidden_gets_through() {
        let hostile = "ok\u{1b}[2J\u{9b}31m\r\n\u{7}\u{202e}evil\u{200b}\u{7f}é✓";
        let shown = Safe(hostile).to_string();
        assert_eq!(shown, "ok\\u{1b}[2J\\u{9b}31m\\u{d}\\n\\u{7}\\u{202e}evil\\u{200b}\\u{7f}é✓");
        assert!(!shown.chars().any(hidden));
    }

    #[test]
    fn what_is_invisible_is_told() {
        let invisible = [
            0x00a0, 0x00ad, 0x034f, 0x061c, 0x070f, 0x115f, 0x1160, 0x17b4, 0x17b5, 0x180b, 0x180c, 0x180d, 0x180e,
            0x180f, 0x2000, 0x200b, 0x200c, 0x200d, 0x200e, 0x200f, 0x2028, 0x2029, 0x202a, 0x202b, 0x202c, 0x202d,
            0x202e, 0x202f, 0x205f, 0x2060, 0x2061, 0x2064, 0x2065, 0x2066, 0x2069, 0x206a, 0x206f, 0x2800, 0x3000,
            0x3164, 0xe000, 0xfe00, 0xfe0f, 0xfeff, 0xffa0, 0xfff0, 0xfff8, 0xfff9, 0xfffb, 0x1bca0, 0x1d173, 0x1d17a,
            0xe0000, 0xe0001, 0xe0041, 0xe007f, 0xe0100, 0xe01ef, 0xe0fff, 0xf0000, 0x10fffd,
        ];
        for code in invisible {
            let c = char::from_u32(code).unwrap();
            assert_eq!(Safe(&format!("a{c}b")).to_string(), format!("a\\u{{{code:x}}}b"));
        }
        // The control: letters and signs that people write with are shown.
        for plain in ["Grüße, 中文 日本語 한국어", "हिन्दी ภาษาไทย עברית العربية", "e\u{301} ↺ ✓ €", "a|b`c`"]
        {
            assert_eq!(Safe(plain).to_string(), plain);
        }
    }

    #[test]
    fn marks_are_shown_on_a_letter_and_not_in_piles() {
        let flood = format!("a{}b", "\u{301}".repeat(50));
        let shown = Safe(&flood).to_string();
        assert_eq!(shown.chars().filter(|c| *c == '\u{301}').count(), MARKS);
        assert!(shown.ends_with("\\u{301}b"), "{shown}");
        assert_eq!(Safe("\u{338}a \u{20e3}").to_string(), "\\u{338}a \\u{20e3}");
        assert_eq!(Safe("\u{200b}\u{301}").to_string(), "\\u{200b}\\u{301}");
    }

    #[test]
    fn json_means_the_same_after_it() {
        let value = serde_json::json!({"reason": "ok\u{1b}[2J\u{9b}31m\r\n\u{202e}\u{e0041}é"});
        let safe = safe_json(&serde_json::to_string_pretty(&value).unwrap());
        assert!(!safe.chars().any(|c| c != '\n' && hidden(c)), "{safe}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&safe).unwrap(), value);
    }
}

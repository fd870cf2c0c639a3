//! Text that is safe to show, and colours.
//!
//! Targets, reasons and names come from agents and upstreams. Control characters in them could rewrite the screen or run
//! commands in some terminals; invisible and right-to-left ones could make a line read as another. They are shown as
//! escapes.

use std::fmt;

/// Shows a text with everything that is not plainly visible as `\u{…}`.
pub(super) struct Safe<'a>(pub(super) &'a str);

impl fmt::Display for Safe<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '\n' => f.write_str("\\n")?,
                c if hidden(c) => write!(f, "{}", c.escape_unicode())?,
                c => write!(f, "{c}")?,
            }
        }
        Ok(())
    }
}

/// Whether a character moves the cursor, reorders its neighbours or cannot be seen.
pub(super) fn hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// How often something was, beside its name: nothing where that was once.
pub(super) fn times(count: i64) -> String {
    if count == 1 { String::new() } else { format!(", {count} times") }
}

/// JSON text in which hidden characters are escaped as well. Outside of strings JSON has none but newlines and spaces.
pub(super) fn safe_json(json: &str) -> String {
    let mut safe = String::with_capacity(json.len());
    let mut units = [0; 2];
    for c in json.chars() {
        if c != '\n' && hidden(c) {
            for unit in c.encode_utf16(&mut units) {
                safe.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            safe.push(c);
        }
    }
    safe
}

/// Colours, or none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paint {
    on: bool,
}

impl Paint {
    /// Colours if `on`, and if the environment does not ask for none (no-color.org).
    pub(super) fn new(on: bool) -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        Self { on: on && !unwanted }
    }

    /// No colours.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self { on: false }
    }

    fn wrap(self, code: &str, text: impl fmt::Display) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }

    /// Allowed, done.
    pub(super) fn good(self, text: impl fmt::Display) -> String {
        self.wrap("32", text)
    }

    /// Denied, broken.
    pub(super) fn bad(self, text: impl fmt::Display) -> String {
        self.wrap("31", text)
    }

    /// Worth a look.
    pub(super) fn warn(self, text: impl fmt::Display) -> String {
        self.wrap("33", text)
    }

    /// Names.
    pub(super) fn strong(self, text: impl fmt::Display) -> String {
        self.wrap("1", text)
    }

    /// Details.
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
    fn json_means_the_same_after_it() {
        let value = serde_json::json!({"reason": "ok\u{1b}[2J\u{9b}31m\r\n\u{202e}\u{e0041}é"});
        let safe = safe_json(&serde_json::to_string_pretty(&value).unwrap());
        assert!(!safe.chars().any(|c| c != '\n' && hidden(c)), "{safe}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&safe).unwrap(), value);
    }
}

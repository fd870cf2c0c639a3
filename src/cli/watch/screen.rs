//! Lines that scroll, and on a terminal a panel below them that is redrawn.

use std::io::{self, Write};

/// The number of columns if the terminal does not report it.
const DEFAULT_WIDTH: usize = 80;

/// Returns the number of columns of the terminal.
pub(in crate::cli) fn width() -> usize {
    terminal_size::terminal_size().map_or(DEFAULT_WIDTH, |(width, _)| usize::from(width.0))
}

/// A screen on standard output.
pub(in crate::cli) struct Screen<W: Write> {
    out: W,
    terminal: bool,
    /// The number of lines of the panel that are on the screen now.
    drawn: usize,
}

impl<W: Write> Screen<W> {
    /// Creates a screen. Without a terminal it has no panel.
    pub(in crate::cli) fn new(out: W, terminal: bool) -> Self {
        Self { out, terminal, drawn: 0 }
    }

    /// Adds lines above the panel. No line of the panel may be wider than the terminal.
    pub(in crate::cli) fn show(&mut self, lines: &[String], panel: &[String]) -> io::Result<()> {
        if !self.terminal {
            for line in lines {
                writeln!(self.out, "{line}")?;
            }
            return if lines.is_empty() { Ok(()) } else { self.out.flush() };
        }
        // One write, so that the terminal never shows a part of it.
        let mut text = String::new();
        if self.drawn > 0 {
            // Move up to the panel's first line, and clear from there.
            text.push_str(&format!("\x1b[{}A\r\x1b[J", self.drawn));
        }
        for line in lines.iter().chain(panel) {
            text.push_str(line);
            text.push('\n');
        }
        self.drawn = panel.len();
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    /// Returns the writer.
    pub(in crate::cli) fn out(&mut self) -> &mut W {
        &mut self.out
    }

    /// Flushes the writer.
    pub(in crate::cli) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_terminal_there_are_only_lines() {
        let mut out = Vec::new();
        let mut screen = Screen::new(&mut out, false);
        screen.show(&["one".to_owned()], &["panel".to_owned()]).unwrap();
        screen.show(&[], &["panel".to_owned()]).unwrap();
        assert_eq!(out, b"one\n");
    }

    #[test]
    fn the_panel_stays_below() {
        let mut out = Vec::new();
        let mut screen = Screen::new(&mut out, true);
        screen.show(&["one".to_owned()], &["a".to_owned(), "b".to_owned()]).unwrap();
        screen.show(&["two".to_owned()], &[]).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "one\na\nb\n\x1b[2A\r\x1b[Jtwo\n");
    }
}

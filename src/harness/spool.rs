//! Segments that are not stored yet, on a volume that outlives the process.
//!
//! Guarantees: when [`Spool::keep`] returns, either the segment is written or the spool is as before. A restarted harness finds every whole
//! segment that an earlier harness has written. A file that is broken is rejected, except at its end, where a process may have been killed.
//!
//! Non-goals: checking the segments' contents, and durability. The volume is in memory and ends with the pod; with `belay run` it is a
//! folder that ends with the run. Nothing is synced, because only data that outlives the machine needs it, and a call would wait for the
//! disk. Before a call leaves, the witness has its segment as well.

use std::{
    fs::{File, OpenOptions},
    io::{Error, ErrorKind, Result, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use crate::evidence::segment::Segment;

/// The file of segments, in the spool's folder.
const FILE: &str = "segments.jsonl";
/// The file that holds the reason why the log failed, in the same folder.
const FAILED: &str = "failed";
/// The first bytes of every segment.
const START: &[u8] = b"{\"checkpoint\":";
/// The most bytes of stored segments that the file keeps before they are removed.
const STALE: u64 = 1 << 20;

/// The spool.
pub struct Spool {
    path: PathBuf,
    file: File,
    size: u64,
    /// Whether a part of a segment for which there was no room follows the first `size` bytes.
    torn: bool,
}

impl Spool {
    /// Opens the spool in a folder. Returns it with the segments that are in it, in order.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read or written, or is broken.
    pub fn open(folder: &Path) -> Result<(Self, Vec<Segment>)> {
        let path = folder.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let segments = segments(&text)
            .map_err(|reason| Error::new(ErrorKind::InvalidData, format!("{}: {reason}", path.display())))?;
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        let mut spool = Self { path, file, size: 0, torn: false };
        // Removes a segment that is cut off at the end.
        spool.only(segments.iter().map(Segment::to_bytes))?;
        Ok((spool, segments))
    }

    /// Writes the text of a segment.
    ///
    /// # Errors
    /// Returns an error if the segment cannot be written. It is not kept then, and the next segment takes its place.
    pub fn keep(&mut self, segment: &[u8]) -> Result<()> {
        if self.torn {
            self.file.set_len(self.size)?;
            self.file.seek(SeekFrom::Start(self.size))?;
        }
        self.torn = true;
        self.file.write_all(segment)?;
        self.torn = false;
        self.size = self.size.saturating_add(u64::try_from(segment.len()).unwrap_or(u64::MAX));
        Ok(())
    }

    /// Removes all segments but these, once enough bytes can be removed.
    ///
    /// # Errors
    /// Returns an error if the new file cannot be written. The old segments are kept then.
    pub fn forget<T: AsRef<[u8]>>(&mut self, but: impl Iterator<Item = T> + Clone) -> Result<()> {
        self.let_go(but, STALE)
    }

    /// Removes all segments but these, because there is no room.
    ///
    /// # Errors
    /// Returns the errors of [`Spool::forget`].
    pub fn make_room<T: AsRef<[u8]>>(&mut self, but: impl Iterator<Item = T> + Clone) -> Result<()> {
        self.let_go(but, 0)
    }

    fn let_go<T: AsRef<[u8]>>(&mut self, but: impl Iterator<Item = T> + Clone, stale: u64) -> Result<()> {
        let needed: usize = but.clone().map(|text| text.as_ref().len()).sum();
        if self.size.saturating_sub(u64::try_from(needed).unwrap_or(u64::MAX)) > stale {
            self.only(but)?;
        }
        Ok(())
    }

    /// Removes all segments.
    ///
    /// # Errors
    /// Returns an error if the new file cannot be written.
    pub fn clear(&mut self) -> Result<()> {
        self.only(std::iter::empty::<&[u8]>())
    }

    /// Replaces the file as a whole with one that has only these texts.
    fn only<T: AsRef<[u8]>>(&mut self, texts: impl Iterator<Item = T>) -> Result<()> {
        let new = self.path.with_extension("new");
        let write = || {
            let mut file = OpenOptions::new().create(true).write(true).truncate(true).open(&new)?;
            for text in texts {
                file.write_all(text.as_ref())?;
            }
            std::fs::rename(&new, &self.path)?;
            Ok(file)
        };
        self.file = write().inspect_err(|_: &Error| {
            // The old file is whole and needs the room.
            let _ = std::fs::remove_file(&new);
        })?;
        self.torn = false;
        self.size = self.file.seek(SeekFrom::End(0))?;
        Ok(())
    }
}

/// Notes that the log of this attempt has failed, for a harness that restarts.
///
/// # Errors
/// Returns an error if the note cannot be written.
pub fn note_failure(folder: &Path, reason: &str) -> Result<()> {
    let mut file = File::create(folder.join(FAILED))?;
    file.write_all(reason.as_bytes())?;
    file.sync_all()
}

/// Returns why the log of this attempt has failed, if an earlier harness has noted it. A note that cannot be read counts as well.
pub fn failure(folder: &Path) -> Option<String> {
    match std::fs::read(folder.join(FAILED)) {
        Ok(reason) => Some(String::from_utf8_lossy(&reason).into_owned()),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => Some(format!("it is not known why: {error}")),
    }
}

/// Parses the segments of a text. A segment that is cut off at the end is left out: it was never sent.
fn segments(text: &[u8]) -> std::result::Result<Vec<Segment>, String> {
    let lines = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    let text = text.get(..lines).unwrap_or_default();
    let mut starts = Vec::new();
    let mut at = 0;
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        if line.starts_with(START) {
            starts.push(at);
        }
        at += line.len();
    }
    if starts.first().copied().unwrap_or(text.len()) != 0 {
        return Err("expected a segment at the start".into());
    }
    let ends = starts.iter().skip(1).copied().chain([text.len()]);
    let mut segments = Vec::new();
    for (start, end) in starts.iter().copied().zip(ends) {
        match whole(text.get(start..end).unwrap_or_default()) {
            Ok(segment) => segments.push(segment),
            Err(_) if end == text.len() => {}
            Err(error) => return Err(format!("the segment at byte {start}: {error}")),
        }
    }
    Ok(segments)
}

/// Parses a segment that has all records that its checkpoint counts.
fn whole(text: &[u8]) -> std::result::Result<Segment, String> {
    let segment = Segment::parse(text).map_err(|error| error.to_string())?;
    let size = segment.note.checkpoint().map_err(|error| error.to_string())?.size;
    if size == segment.end() {
        return Ok(segment);
    }
    Err(format!("expected records up to {size}, found some up to {}", segment.end()))
}

#[cfg(test)]
mod tests;

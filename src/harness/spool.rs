//! Segments that are not stored yet, on a volume that outlives the process.
//!
//! Promises: [`Spool::keep`] returns when the segment is written, or else as if it had not been called; a harness that starts again
//! finds what the one before it had kept, whole. Refuses: judging what is in there, and a file that is broken anywhere but at its end, where a process may have been killed.
//!
//! What the volume is worth: it is in memory, and ends with the pod; `belay run` has a folder, which ends with the run. So nothing is synced:
//! that is for what outlives the machine, and a call would wait for the disk. Before a call leaves, the witness holds its segment as well.

use std::{
    fs::{File, OpenOptions},
    io::{Error, ErrorKind, Result, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use crate::evidence::segment::Segment;

/// The file, in the spool's folder.
const FILE: &str = "segments.jsonl";
/// The file that says why the log cannot go on, in the same folder.
const FAILED: &str = "failed";
/// How every segment begins.
const START: &[u8] = b"{\"checkpoint\":";
/// Bytes of segments that are stored by now, beyond which they are removed.
const STALE: u64 = 1 << 20;

/// The spool.
pub struct Spool {
    path: PathBuf,
    file: File,
    size: u64,
    /// Something lies behind that: a part of a segment for which there was no room.
    torn: bool,
}

impl Spool {
    /// Opens the spool in a folder, and gives the segments that are in it, in order.
    ///
    /// # Errors
    /// If it cannot be read or written, or is broken.
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
        // Without what was cut off.
        spool.only(segments.iter().map(Segment::to_bytes))?;
        Ok((spool, segments))
    }

    /// Keeps the text of a segment.
    ///
    /// # Errors
    /// If it cannot be written. It is not kept then, and the next takes its place.
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

    /// Lets go of all but these, once that is worth it.
    ///
    /// # Errors
    /// If that cannot be written; they are kept.
    pub fn forget<T: AsRef<[u8]>>(&mut self, but: impl Iterator<Item = T> + Clone) -> Result<()> {
        self.let_go(but, STALE)
    }

    /// Lets go of all but these, as there is no room.
    ///
    /// # Errors
    /// See [`Spool::forget`].
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

    /// Lets go of everything.
    ///
    /// # Errors
    /// If that cannot be written.
    pub fn clear(&mut self) -> Result<()> {
        self.only(std::iter::empty::<&[u8]>())
    }

    /// Another file takes this one's place whole.
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
            // The old one is whole, and needs the room.
            let _ = std::fs::remove_file(&new);
        })?;
        self.torn = false;
        self.size = self.file.seek(SeekFrom::End(0))?;
        Ok(())
    }
}

/// Notes that the log of this attempt cannot go on, for a harness that starts again.
///
/// # Errors
/// If that cannot be written.
pub fn note_failure(folder: &Path, reason: &str) -> Result<()> {
    let mut file = File::create(folder.join(FAILED))?;
    file.write_all(reason.as_bytes())?;
    file.sync_all()
}

/// Why the log of this attempt cannot go on, if a harness before this one has noted so. One whose reason cannot be read has noted it all the
/// same.
pub fn failure(folder: &Path) -> Option<String> {
    match std::fs::read(folder.join(FAILED)) {
        Ok(reason) => Some(String::from_utf8_lossy(&reason).into_owned()),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => Some(format!("it is not known why: {error}")),
    }
}

/// The segments of a text. One that is cut off at its end never left.
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

/// A segment that has all the records that its checkpoint counts.
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

//! Reads a log from a folder that an untrusted party may have filled.
//!
//! Guarantees: reading ends, whatever is in the folder. It follows no link below the folder, opens only regular files, and reads nothing
//! longer than [`LONGEST`]. It sees everything under the folders of a log, whatever its name. What is not an object of a log goes to
//! [`Log::odd`], with what was found, so that the verifier can name it.
//! Non-goals: evaluating what was read, which [`verify`](crate::verify) does; folders that change while they are read.

use std::{
    fs, io,
    io::Read,
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

use super::{
    ending,
    log::{INCIDENTS, Log},
    segment,
    store::dir::UNFINISHED,
};

/// The maximum length of an object in bytes. It is longer than anything that a witness writes.
pub const LONGEST: u64 = 1 << 28;
/// The maximum length of a key in bytes.
const LONGEST_KEY: u64 = 4096;

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum Unopened {
    /// The file is not a regular file, or it is too long.
    #[error("expected a regular file of at most {LONGEST} bytes, found {0}")]
    Odd(String),
    /// The system does not allow it.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Returns the bytes of a regular file. Does not block, whatever is at the path.
///
/// # Errors
/// Returns an error if the path is not a regular file, is longer than `most` bytes, or cannot be read.
pub fn read_plain(path: &Path, most: u64) -> Result<Vec<u8>, Unopened> {
    let kind = fs::symlink_metadata(path)?.file_type();
    if !kind.is_file() {
        return Err(Unopened::Odd(named(kind)));
    }
    // The path may have become something else by now.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = fs::File::from(rustix::fs::open(path, flags, rustix::fs::Mode::empty()).map_err(io::Error::from)?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(Unopened::Odd(named(metadata.file_type())));
    }
    let mut bytes = Vec::new();
    if metadata.len() <= most {
        file.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    }
    let found = metadata.len().max(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
    if found > most { Err(Unopened::Odd(format!("one of {found} bytes"))) } else { Ok(bytes) }
}

/// Returns the kind of a file in words.
fn named(kind: fs::FileType) -> String {
    use std::os::unix::fs::FileTypeExt;
    let named = [
        (kind.is_symlink(), "a symbolic link"),
        (kind.is_dir(), "a folder"),
        (kind.is_fifo(), "a FIFO"),
        (kind.is_socket(), "a socket"),
        (kind.is_char_device() || kind.is_block_device(), "a device"),
    ];
    named.into_iter().find(|(is, _)| *is).map_or("something else", |(_, name)| name).to_owned()
}

/// Reads the witness's key from a file beside a log.
///
/// # Errors
/// Returns the errors of [`read_plain`].
pub fn key(path: &Path) -> Result<String, Unopened> {
    Ok(String::from_utf8_lossy(&read_plain(path, LONGEST_KEY)?).into_owned())
}

/// Reads the log in a folder.
///
/// # Errors
/// Returns the path that cannot be read, with the reason. Missing files are not an error, and neither are files that no log has.
pub fn read(folder: &Path) -> Result<Log, (PathBuf, io::Error)> {
    let mut log = Log::default();
    for name in [segment::FOLDER, INCIDENTS, ending::FOLDER, ending::SUMMARY] {
        let path = folder.join(name.trim_end_matches('/'));
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err((path, error)),
            Ok(found) if found.is_dir() && name.ends_with('/') => within(&path, name, &mut log)?,
            Ok(found) if name.ends_with('/') => {
                log.odd.insert(name.to_owned(), format!("expected a folder, found {}", named(found.file_type())));
            }
            Ok(_) => object(&path, name, &mut log)?,
        }
    }
    Ok(log)
}

/// Reads everything in a folder of the log. Its subfolders are not objects.
fn within(folder: &Path, prefix: &str, log: &mut Log) -> Result<(), (PathBuf, io::Error)> {
    let mut folders = vec![(folder.to_owned(), prefix.to_owned())];
    while let Some((folder, prefix)) = folders.pop() {
        let failed = |error| (folder.clone(), error);
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let (path, kind) = (entry.path(), entry.file_type().map_err(failed)?);
            let name = entry.file_name();
            let key = format!("{prefix}{}", name.to_string_lossy());
            if name.to_str().is_none() {
                log.odd.insert(key, "expected a name in UTF-8, found another".to_owned());
            } else if kind.is_dir() {
                folders.push((path, format!("{key}/")));
            } else if !name.as_encoded_bytes().starts_with(UNFINISHED.as_bytes()) {
                object(&path, &key, log)?;
            }
        }
    }
    Ok(())
}

fn object(path: &Path, key: &str, log: &mut Log) -> Result<(), (PathBuf, io::Error)> {
    match read_plain(path, LONGEST) {
        Ok(bytes) => drop(log.of(key).insert(key.to_owned(), bytes.into())),
        Err(Unopened::Odd(found)) => {
            let problem = format!("expected a regular file of at most {LONGEST} bytes, found {found}");
            log.odd.insert(key.to_owned(), problem);
        }
        Err(Unopened::Io(error)) => return Err((path.to_owned(), error)),
    }
    Ok(())
}

#[cfg(test)]
mod tests;

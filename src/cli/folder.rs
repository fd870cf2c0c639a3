//! Folders that commands fill with files.
//!
//! Guarantees: all files are written or none, as far as the existing files decide that in advance. Nothing is overwritten.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use super::CliError;

/// Writes those of these files that do not exist yet to a folder, and creates the folder if it does not exist. Returns the names of those
/// that exist.
///
/// # Errors
/// Returns an error if all exist, or if one cannot be written.
pub(super) fn complete<'a>(
    folder: &Path,
    files: impl Iterator<Item = (&'a str, &'a str)> + Clone,
) -> Result<Vec<&'a str>, CliError> {
    let is_there = |name: &str| folder.join(name).symlink_metadata().is_ok();
    let kept: Vec<_> = files.clone().map(|(name, _)| name).filter(|name| is_there(name)).collect();
    if kept.len() == files.clone().count() {
        return Err(CliError::new(format!(
            "{}: expected at least one of {} to be missing, found all; remove the files to write again, or name another folder (nothing was written)",
            folder.display(),
            kept.join(", ")
        )));
    }
    fill(folder, files.filter(|(name, _)| !kept.contains(name)))?;
    Ok(kept)
}

/// Writes new files, given by name and text, to a folder, and creates the folder if it does not exist.
pub(super) fn fill<'a>(
    folder: &Path,
    files: impl Iterator<Item = (impl AsRef<Path>, &'a str)> + Clone,
) -> Result<(), CliError> {
    let failed =
        |path: &Path, error: &io::Error| CliError::new(format!("{}: cannot be written: {error}", path.display()));
    let mut paths = files.clone().map(|(name, _)| folder.join(name));
    if let Some(there) = paths.find(|path| path.symlink_metadata().is_ok()) {
        return Err(CliError::new(format!(
            "{}: expected no such file, found one; remove it, or name another folder (nothing was written)",
            there.display()
        )));
    }
    fs::create_dir_all(folder).map_err(|error| failed(folder, &error))?;
    for (name, text) in files {
        let path = folder.join(name);
        let mut file = File::create_new(&path).map_err(|error| failed(&path, &error))?;
        file.write_all(text.as_bytes()).map_err(|error| failed(&path, &error))?;
    }
    Ok(())
}

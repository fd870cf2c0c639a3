//! Folders that we fill for people.
//!
//! Promises: all files or none, as far as what is there already decides. Refuses: to overwrite anything.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use super::CliError;

/// Writes those of these files that are not there yet into a folder, which is made where there is none. Gives the names of those that are.
///
/// # Errors
/// If all are there, or one cannot be written.
pub(super) fn complete<'a>(
    folder: &Path,
    files: impl Iterator<Item = (&'a str, &'a str)> + Clone,
) -> Result<Vec<&'a str>, CliError> {
    let is_there = |name: &str| folder.join(name).symlink_metadata().is_ok();
    let kept: Vec<_> = files.clone().map(|(name, _)| name).filter(|name| is_there(name)).collect();
    if kept.len() == files.clone().count() {
        return Err(CliError::new(format!(
            "{}: expected at least one of {} not to be there, found them all; remove what is to be made anew, or name another folder (nothing was written)",
            folder.display(),
            kept.join(", ")
        )));
    }
    fill(folder, files.filter(|(name, _)| !kept.contains(name)))?;
    Ok(kept)
}

/// Writes new files, by name and text, into a folder, which is made where there is none.
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

//! What `belay run` stores for its user: the witness's key, and a folder for the duration of a run.
//!
//! Guarantees: no other user can read either. Files of killed runs are removed.
//!
//! Rejects: a key that other users may have read.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use crate::{
    cli::{CliError, evidence::state_folder},
    evidence::note::{SELF_WITNESS_NAME, Signer, generate_pkcs8},
};

/// The location of the user's state.
pub(super) struct Home {
    /// The folder that outlives runs.
    pub(super) state: PathBuf,
}

impl Home {
    pub(super) fn find() -> Result<Self, CliError> {
        let state = state_folder().ok_or_else(|| {
            CliError::new("expected HOME or XDG_STATE_HOME in the environment, found neither; set one")
        })?;
        Ok(Self { state })
    }

    /// Returns the witness's key. It is generated when it is first needed.
    pub(super) fn signer(&self) -> Result<Signer, CliError> {
        use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
        let file = self.state.join("witness.pk8");
        let failed = |error: &dyn std::fmt::Display| {
            CliError::new(format!("cannot use the witness's key {}: {error}", file.display()))
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.state).map_err(|e| failed(&e))?;
        match fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file) {
            Ok(mut new) => {
                let key = generate_pkcs8().map_err(|e| failed(&e))?;
                new.write_all(&key).and_then(|()| new.sync_all()).map_err(|e| failed(&e))?;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(&error)),
        }
        let mode = fs::metadata(&file).map_err(|e| failed(&e))?.permissions().mode();
        if mode & 0o077 != 0 {
            let message = format!(
                "expected mode 0600, found {:04o}: others may have the key; remove the file, and belay creates another key",
                mode & 0o7777
            );
            return Err(failed(&message));
        }
        let key = fs::read(&file).map_err(|e| failed(&e))?;
        let signer = Signer::from_pkcs8(SELF_WITNESS_NAME, &key).map_err(|e| failed(&e))?;
        publish(&self.vkey(), &format!("{}\n", signer.verifier())).map_err(|e| failed(&e))?;
        Ok(signer)
    }

    pub(super) fn vkey(&self) -> PathBuf {
        self.state.join("witness.vkey")
    }
}

/// Writes a whole file or nothing. In a folder where other users may write too, it never writes through a link of theirs: a new file
/// replaces whatever has the name.
pub(super) fn publish(path: &Path, text: &str) -> io::Result<()> {
    let mut random = [0_u8; 8];
    ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut random)
        .map_err(|_| io::Error::other("the operating system gave no randomness"))?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", hex::encode(random)));
    let new = path.with_file_name(name);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).open(&new)?;
    let done = file.write_all(text.as_bytes()).and_then(|()| fs::rename(&new, path));
    done.inspect_err(|_| drop(fs::remove_file(&new)))
}

/// A folder that is removed at the end of the run.
pub(super) struct Folder {
    pub(super) path: PathBuf,
    /// A lock that is held for the duration of the run.
    _lock: fs::File,
}

/// The lock file, which shows that the run of a folder is alive.
const LOCK: &str = "lock";

impl Folder {
    /// Creates a folder for this run among those of all runs, and removes those of killed runs.
    pub(super) fn make(runs: &Path, uid: &str) -> Result<Self, CliError> {
        use std::os::unix::fs::DirBuilderExt;
        let path = runs.join(uid);
        let failed = |e: io::Error| CliError::new(format!("cannot make {}: {e}", path.display()));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(failed)?;
        let lock = fs::File::create(path.join(LOCK)).map_err(failed)?;
        lock.lock().map_err(failed)?;
        for other in
            fs::read_dir(runs).map_err(failed)?.flatten().map(|entry| entry.path()).filter(|other| *other != path)
        {
            // A folder without a lock file is just being created.
            if fs::File::open(other.join(LOCK)).is_ok_and(|lock| lock.try_lock().is_ok()) {
                let _ = fs::remove_dir_all(other);
            }
        }
        Ok(Self { path, _lock: lock })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_link_that_somebody_has_put_there_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (theirs, ours) = (folder.path().join("theirs"), folder.path().join("witness.vkey"));
        fs::write(&theirs, "what they have").unwrap();
        for other in ["theirs", "nowhere", "/dev/null"] {
            symlink(other, &ours).unwrap();
            publish(&ours, "key").unwrap();
            assert_eq!(fs::read_to_string(&ours).unwrap(), "key");
            assert!(fs::symlink_metadata(&ours).unwrap().is_file(), "{other}");
            fs::remove_file(&ours).unwrap();
        }
        // A hard link is replaced, and its file keeps the content. The control writes through a link.
        fs::hard_link(&theirs, &ours).unwrap();
        publish(&ours, "key").unwrap();
        assert_eq!(fs::read_to_string(&theirs).unwrap(), "what they have");
        symlink("theirs", folder.path().join("control")).unwrap();
        fs::write(folder.path().join("control"), "key").unwrap();
        assert_eq!(fs::read_to_string(&theirs).unwrap(), "key");
        // Nothing remains of a file that could not be written.
        fs::create_dir(folder.path().join("taken")).unwrap();
        assert!(publish(&folder.path().join("taken"), "key").is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4);
    }
}

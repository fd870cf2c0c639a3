//! What `belay run` keeps of its user's: the witness's key, and a folder for as long as a run lives.
//!
//! Promises: nobody else may read either; what runs that were killed have left goes. Refuses: a key that others may have seen.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use crate::{
    cli::{CliError, evidence::state_folder},
    evidence::note::{SELF_WITNESS_NAME, Signer, generate_pkcs8},
};

/// Where things of this user's are.
pub(super) struct Home {
    /// What is kept.
    pub(super) state: PathBuf,
}

impl Home {
    pub(super) fn find() -> Result<Self, CliError> {
        let state = state_folder().ok_or_else(|| {
            CliError::new("expected HOME or XDG_STATE_HOME in the environment, found neither; set one")
        })?;
        Ok(Self { state })
    }

    /// The witness's key, made when it is first needed.
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
                "expected mode 0600, found {:04o}: others may have it; remove it, and another is made",
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

/// Writes a file in whole or not at all. In a folder in which others may write too, it is this file, and never one to which a link of theirs
/// leads: a new one takes the place of whatever has the name.
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

/// A folder that ends with the run.
pub(super) struct Folder {
    pub(super) path: PathBuf,
    /// Locked for as long as the run lives.
    _lock: fs::File,
}

/// The file by which a folder's run is known to live.
const LOCK: &str = "lock";

impl Folder {
    /// One of its own among those of all runs. What runs that were killed have left goes.
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
            // One without a lock is being made just now.
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
        // A name of somebody's file stays that: the control writes to it.
        fs::hard_link(&theirs, &ours).unwrap();
        publish(&ours, "key").unwrap();
        assert_eq!(fs::read_to_string(&theirs).unwrap(), "what they have");
        symlink("theirs", folder.path().join("control")).unwrap();
        fs::write(folder.path().join("control"), "key").unwrap();
        assert_eq!(fs::read_to_string(&theirs).unwrap(), "key");
        // Nothing is left of what could not be written.
        fs::create_dir(folder.path().join("taken")).unwrap();
        assert!(publish(&folder.path().join("taken"), "key").is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4);
    }
}

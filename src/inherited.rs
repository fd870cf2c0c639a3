//! What a process was given by whoever started it.
//!
//! Guarantees: descriptors are listed as they were at the start of the process, before it has opened any of its own; once they are kept
//! from children, no process that this one starts has any of them. Non-goals: to close them, since whoever passed them here may need
//! that they stay open for as long as this process lives (the lock of a jobserver, the end of a pipe).

use std::{fs, io};

/// Standard input, output and error: those are declared.
const STANDARD: i32 = 2;
/// Where a process finds its descriptors.
const DESCRIPTORS: &str = "/proc/self/fd";

/// A descriptor that nobody declared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number.
    pub number: i32,
    /// What it is of, as the kernel names it.
    pub of: String,
}

/// Every descriptor of this process but standard input, output and error. Asked first of all, it is what was inherited.
///
/// # Errors
/// If there is no `/proc` that could say it.
pub fn descriptors() -> io::Result<Vec<Descriptor>> {
    let entries = fs::read_dir(DESCRIPTORS)?;
    let mut numbers: Vec<i32> = entries.flatten().filter_map(|one| one.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    // The one by which they were listed is closed by now, and has no link any more.
    let of = |number: i32| fs::read_link(format!("{DESCRIPTORS}/{number}")).ok();
    let all = numbers.into_iter().filter(|number| *number > STANDARD);
    Ok(all.filter_map(|number| Some(Descriptor { number, of: of(number)?.display().to_string() })).collect())
}

/// Each of them as a breach of containment.
pub fn breaches(inherited: &io::Result<Vec<Descriptor>>) -> Vec<String> {
    match inherited {
        Ok(all) => {
            let breach =
                |one: &Descriptor| format!("descriptor {} is open, of {}, and must not be", one.number, one.of);
            all.iter().map(breach).collect()
        }
        Err(error) => vec![format!("cannot tell which descriptors are open: {DESCRIPTORS}: {error}")],
    }
}

/// Has every descriptor but standard input, output and error end where another program starts.
#[cfg(feature = "run")]
pub fn keep_from_children() {
    close_fds::set_fds_cloexec(STANDARD + 1, &[]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_open_is_listed_by_what_it_is_of() {
        let folder = tempfile::tempdir().unwrap();
        let file = fs::File::create(folder.path().join("open")).unwrap();
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let number = |fd: &dyn std::os::fd::AsRawFd| fd.as_raw_fd();
        let all = descriptors().unwrap();
        let of = |fd: i32| all.iter().find(|one| one.number == fd).map(|one| one.of.clone());
        assert_eq!(of(number(&file)), Some(folder.path().join("open").display().to_string()));
        assert!(of(number(&a)).unwrap().starts_with("socket:"), "{all:?}");
        assert!(all.iter().all(|one| one.number > STANDARD), "{all:?}");
        let said = breaches(&Ok(all));
        assert!(said.iter().any(|one| one.contains("/open, and must not be")), "{said:?}");
        assert_eq!(breaches(&Err(io::ErrorKind::NotFound.into())).len(), 1, "silence proves nothing");
    }
}

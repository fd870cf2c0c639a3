//! Lists the file descriptors that a process inherited.
//!
//! Guarantees: descriptors are listed as they were at the start of the process, before it opened any of its own. Once they are kept from
//! children, no process that this one starts has any of them.
//! Non-goals: closing descriptors, because the process that passed them may need them to stay open for as long as this process lives (the
//! lock of a jobserver, the end of a pipe).

use std::{fs, io};

/// The highest of the standard descriptors: input, output and error. Those are expected.
const STANDARD: i32 = 2;
/// The folder that lists the descriptors of a process.
const DESCRIPTORS: &str = "/proc/self/fd";

/// A descriptor that is not expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The descriptor's number.
    pub number: i32,
    /// What the descriptor refers to, as the kernel names it.
    pub of: String,
}

/// Returns every descriptor of this process except standard input, output and error. If this is called first, these are the inherited ones.
///
/// # Errors
/// Returns an error if `/proc` is not available.
pub fn descriptors() -> io::Result<Vec<Descriptor>> {
    let entries = fs::read_dir(DESCRIPTORS)?;
    let mut numbers: Vec<i32> = entries.flatten().filter_map(|one| one.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    // The descriptor that the listing itself used is closed by now and has no link any more.
    let of = |number: i32| fs::read_link(format!("{DESCRIPTORS}/{number}")).ok();
    let all = numbers.into_iter().filter(|number| *number > STANDARD);
    Ok(all.filter_map(|number| Some(Descriptor { number, of: of(number)?.display().to_string() })).collect())
}

/// Returns each descriptor as a breach of containment. A failed listing is a breach, too.
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

/// Marks every descriptor except standard input, output and error as close-on-exec.
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

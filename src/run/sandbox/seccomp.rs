//! A filter of system calls for sandboxes that share the machine's kernel: classic BPF, see seccomp(2).
//!
//! Guarantees: programs get sockets of the families that programs normally use, and no others. For example, `AF_VSOCK` of virtual machines
//! ignores network namespaces. The filter denies keyrings, BPF, tracing, kernel modules, new mounts and loading kernels. It also denies
//! memory that outlives its user and that cannot be counted: System V segments, queues and semaphores. A segment of at most a page is
//! allowed, because databases use it as a lock. A program for another architecture is killed.
//!
//! Non-goals: silent failures. A filtered call returns EPERM, and `clone3` returns ENOSYS.

use std::{fs, io, os::fd::AsRawFd, path::Path};

use rustix::io::{FdFlags, fcntl_setfd};

const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;
const ALLOW: u32 = 0x7fff_0000;
const KILL: u32 = 0x8000_0000;
/// SECCOMP_RET_ERRNO with EPERM.
const DENY: u32 = 0x0005_0001;
/// SECCOMP_RET_ERRNO with ENOSYS: programs then use the older call.
const UNKNOWN: u32 = 0x0005_0026;
/// Offsets in `seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;
/// The lower half of 64 bits. The upper half follows.
const SECOND_ARGUMENT: u32 = 24;

/// The maximum size of a System V shared memory segment, in bytes. Databases use small ones as locks.
const SEGMENT: u32 = 4096;
/// AF_UNIX, AF_INET, AF_INET6 and AF_NETLINK.
const FAMILIES: [u32; 4] = [1, 2, 10, 16];

/// The system call numbers of an architecture.
struct Numbers {
    /// The AUDIT_ARCH value.
    architecture: u32,
    socket: u32,
    clone3: u32,
    shmget: u32,
    denied: &'static [u32],
    /// The first number of another ABI.
    foreign: u32,
}

#[cfg(target_arch = "x86_64")]
const NUMBERS: Numbers = Numbers {
    architecture: 0xc000_003e,
    socket: 41,
    clone3: 435,
    shmget: 29,
    // ptrace, syslog, personality, pivot_root, chroot, acct, mount, umount2, swapon, swapoff, reboot, init_module, delete_module, quotactl, add_key,
    // request_key, keyctl, unshare, move_pages, perf_event_open, name_to_handle_at, open_by_handle_at, setns, process_vm_readv, process_vm_writev,
    // kcmp, finit_module, kexec_load, kexec_file_load, bpf, userfaultfd, io_uring_setup, _enter, _register, open_tree, move_mount, fsopen, fsconfig,
    // fsmount, fspick, mount_setattr, semget, msgget, memfd_secret
    denied: &[
        101, 103, 135, 155, 161, 163, 165, 166, 167, 168, 169, 175, 176, 179, 248, 249, 250, 272, 279, 298, 303, 304,
        308, 310, 311, 312, 313, 246, 320, 321, 323, 425, 426, 427, 428, 429, 430, 431, 432, 433, 442, 64, 68, 447,
    ],
    foreign: 0x4000_0000,
};
#[cfg(target_arch = "aarch64")]
const NUMBERS: Numbers = Numbers {
    architecture: 0xc000_00b7,
    socket: 198,
    clone3: 435,
    shmget: 194,
    // The same calls, without those that this architecture does not have.
    denied: &[
        117, 116, 92, 41, 51, 89, 40, 39, 224, 225, 142, 105, 106, 60, 217, 218, 219, 97, 239, 241, 264, 265, 268, 270,
        271, 272, 273, 104, 294, 280, 282, 425, 426, 427, 428, 429, 430, 431, 432, 433, 442, 190, 186, 447,
    ],
    foreign: 0x4000_0000,
};

/// The numbers of other architectures are not known here: every program is killed.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const NUMBERS: Numbers = Numbers { architecture: 0, socket: 0, clone3: 0, shmget: 0, denied: &[], foreign: 0 };

/// Returns the filter program in the form that seccomp(2) takes.
fn program() -> Vec<u8> {
    let mut all: Vec<(u16, u8, u8, u32)> = vec![
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, NUMBERS.architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_IF_AT_LEAST, 0, 1, NUMBERS.foreign),
        (RETURN, 0, 0, KILL),
        // The flags of `clone3` may request namespaces, but they are in memory, which a filter cannot read.
        (JUMP_IF_EQUAL, 0, 1, NUMBERS.clone3),
        (RETURN, 0, 0, UNKNOWN),
    ];
    for denied in NUMBERS.denied {
        all.extend([(JUMP_IF_EQUAL, 0, 1, *denied), (RETURN, 0, 0, DENY)]);
    }
    all.extend([
        (JUMP_IF_EQUAL, 0, 6, NUMBERS.shmget),
        (LOAD, 0, 0, SECOND_ARGUMENT + 4),
        (JUMP_IF_EQUAL, 0, 3, 0),
        (LOAD, 0, 0, SECOND_ARGUMENT),
        (JUMP_IF_AT_LEAST, 1, 0, SEGMENT + 1),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, DENY),
    ]);
    all.extend([(JUMP_IF_EQUAL, 1, 0, NUMBERS.socket), (RETURN, 0, 0, ALLOW), (LOAD, 0, 0, FIRST_ARGUMENT)]);
    for family in FAMILIES {
        all.extend([(JUMP_IF_EQUAL, 0, 1, family), (RETURN, 0, 0, ALLOW)]);
    }
    all.push((RETURN, 0, 0, DENY));
    let bytes = |(code, yes, no, value): (u16, u8, u8, u32)| {
        let [a, b] = code.to_ne_bytes();
        let [c, d, e, f] = value.to_ne_bytes();
        [a, b, yes, no, c, d, e, f]
    };
    all.into_iter().flat_map(bytes).collect()
}

/// Writes the program to a file in that folder and opens it.
pub(super) fn file(folder: &Path) -> io::Result<fs::File> {
    let path = folder.join("seccomp.bpf");
    fs::write(&path, program())?;
    fs::File::open(path)
}

/// Lets the next process that is started inherit the file, and returns its descriptor.
pub(super) fn inherit(file: &fs::File) -> io::Result<i32> {
    fcntl_setfd(file, FdFlags::empty())?;
    Ok(file.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns what the program decides about a system call.
    fn run(architecture: u32, number: u32, argument: u32) -> u32 {
        run_with(architecture, number, argument, 0)
    }

    fn run_with(architecture: u32, number: u32, argument: u32, second: u64) -> u32 {
        let program = program();
        let mut instructions = program.chunks(8);
        let mut loaded = 0;
        while let Some(&[a, b, yes, no, c, d, e, f]) = instructions.next() {
            let (code, value) = (u16::from_ne_bytes([a, b]), u32::from_ne_bytes([c, d, e, f]));
            let skip = |holds: bool| usize::from(if holds { yes } else { no });
            let skipped = match code {
                LOAD => {
                    loaded = match value {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        FIRST_ARGUMENT => argument,
                        SECOND_ARGUMENT => second as u32,
                        high if high == SECOND_ARGUMENT + 4 => (second >> 32) as u32,
                        other => panic!("nothing is at {other}"),
                    };
                    0
                }
                JUMP_IF_EQUAL => skip(loaded == value),
                JUMP_IF_AT_LEAST => skip(loaded >= value),
                RETURN => return value,
                other => panic!("no instruction is {other}"),
            };
            instructions.by_ref().take(skipped).for_each(drop);
        }
        panic!("the program has no end");
    }

    #[test]
    fn sockets_are_of_the_families_that_programs_use() {
        let socket = |family| run(NUMBERS.architecture, NUMBERS.socket, family);
        for family in FAMILIES {
            assert_eq!(socket(family), ALLOW, "{family}");
        }
        // AF_PACKET, AF_ALG, AF_VSOCK, AF_XDP
        for family in [17, 38, 40, 44] {
            assert_eq!(socket(family), DENY, "{family}");
        }
    }

    #[test]
    fn of_shared_memory_that_nobody_counts_there_is_a_page() {
        let segment = |size| run_with(NUMBERS.architecture, NUMBERS.shmget, 0, size);
        for (size, expected) in
            [(0, ALLOW), (56, ALLOW), (4096, ALLOW), (4097, DENY), (1 << 32, DENY), (u64::MAX, DENY)]
        {
            assert_eq!(segment(size), expected, "{size}");
        }
    }

    #[test]
    fn what_no_agent_needs_is_denied() {
        let ours = NUMBERS.architecture;
        assert!(NUMBERS.denied.iter().all(|denied| run(ours, *denied, 0) == DENY));
        assert_eq!(run(ours, 0, 0), ALLOW);
        assert_eq!(run(ours, NUMBERS.clone3, 0), UNKNOWN);
        assert_eq!(run(ours, NUMBERS.foreign | 41, 1), KILL);
        assert_eq!(run(0x4000_0003, 102, 1), KILL, "another architecture's");
    }
}

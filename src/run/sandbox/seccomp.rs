//! A filter of system calls for sandboxes that share the machine's kernel: classic BPF, see seccomp(2).
//!
//! Guarantees: programs get sockets of the families that programs normally use, and no others. For example, `AF_VSOCK` of virtual machines
//! ignores network namespaces. The filter denies keyrings, BPF, tracing, kernel modules, new mounts and loading kernels. It also denies
//! memory that outlives its user and that cannot be counted: System V segments, queues and semaphores. A segment of at most a page is
//! allowed, because databases use it as a lock. A program for another architecture is killed.
//!
//! Non-goals: silent failures. A filtered call returns EPERM, and `clone3` returns ENOSYS.
//!
//! The crate seccompiler would not do: a filter of it has one errno, and it does not compare the number of a call, so the x32 calls of an
//! x86-64 kernel would pass.

use std::{fs, io, os::fd::AsRawFd, path::Path};

use linux_raw_sys::general as nr;
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

/// The system calls that are denied.
const DENIED: [u32; 44] = [
    nr::__NR_ptrace,
    nr::__NR_syslog,
    nr::__NR_personality,
    nr::__NR_pivot_root,
    nr::__NR_chroot,
    nr::__NR_acct,
    nr::__NR_mount,
    nr::__NR_umount2,
    nr::__NR_swapon,
    nr::__NR_swapoff,
    nr::__NR_reboot,
    nr::__NR_init_module,
    nr::__NR_delete_module,
    nr::__NR_quotactl,
    nr::__NR_add_key,
    nr::__NR_request_key,
    nr::__NR_keyctl,
    nr::__NR_unshare,
    nr::__NR_move_pages,
    nr::__NR_perf_event_open,
    nr::__NR_name_to_handle_at,
    nr::__NR_open_by_handle_at,
    nr::__NR_setns,
    nr::__NR_process_vm_readv,
    nr::__NR_process_vm_writev,
    nr::__NR_kcmp,
    nr::__NR_finit_module,
    nr::__NR_kexec_load,
    nr::__NR_kexec_file_load,
    nr::__NR_bpf,
    nr::__NR_userfaultfd,
    nr::__NR_io_uring_setup,
    nr::__NR_io_uring_enter,
    nr::__NR_io_uring_register,
    nr::__NR_open_tree,
    nr::__NR_move_mount,
    nr::__NR_fsopen,
    nr::__NR_fsconfig,
    nr::__NR_fsmount,
    nr::__NR_fspick,
    nr::__NR_mount_setattr,
    nr::__NR_semget,
    nr::__NR_msgget,
    nr::__NR_memfd_secret,
];
/// The AUDIT_ARCH value of this architecture. Where it is not known, every program is killed.
const OURS: u32 = if cfg!(target_arch = "x86_64") {
    0xc000_003e
} else if cfg!(target_arch = "aarch64") {
    0xc000_00b7
} else {
    0
};
/// The first number of another ABI of this architecture: x32.
const FOREIGN: u32 = 0x4000_0000;

/// Returns the filter program in the form that seccomp(2) takes.
fn program() -> Vec<u8> {
    let mut all: Vec<(u16, u8, u8, u32)> = vec![
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, OURS),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_IF_AT_LEAST, 0, 1, FOREIGN),
        (RETURN, 0, 0, KILL),
        // The flags of `clone3` may request namespaces, but they are in memory, which a filter cannot read.
        (JUMP_IF_EQUAL, 0, 1, nr::__NR_clone3),
        (RETURN, 0, 0, UNKNOWN),
    ];
    for denied in DENIED {
        all.extend([(JUMP_IF_EQUAL, 0, 1, denied), (RETURN, 0, 0, DENY)]);
    }
    all.extend([
        (JUMP_IF_EQUAL, 0, 6, nr::__NR_shmget),
        (LOAD, 0, 0, SECOND_ARGUMENT + 4),
        (JUMP_IF_EQUAL, 0, 3, 0),
        (LOAD, 0, 0, SECOND_ARGUMENT),
        (JUMP_IF_AT_LEAST, 1, 0, SEGMENT + 1),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, DENY),
    ]);
    all.extend([(JUMP_IF_EQUAL, 1, 0, nr::__NR_socket), (RETURN, 0, 0, ALLOW), (LOAD, 0, 0, FIRST_ARGUMENT)]);
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
        let socket = |family| run(OURS, nr::__NR_socket, family);
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
        let segment = |size| run_with(OURS, nr::__NR_shmget, 0, size);
        for (size, expected) in
            [(0, ALLOW), (56, ALLOW), (4096, ALLOW), (4097, DENY), (1 << 32, DENY), (u64::MAX, DENY)]
        {
            assert_eq!(segment(size), expected, "{size}");
        }
    }

    #[test]
    fn what_no_agent_needs_is_denied() {
        assert!(DENIED.iter().all(|denied| run(OURS, *denied, 0) == DENY));
        assert_eq!(run(OURS, 0, 0), ALLOW);
        assert_eq!(run(OURS, nr::__NR_clone3, 0), UNKNOWN);
        assert_eq!(run(OURS, FOREIGN | 41, 1), KILL);
        assert_eq!(run(0x4000_0003, 102, 1), KILL, "another architecture's");
    }
}

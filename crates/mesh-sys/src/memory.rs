// SPDX-License-Identifier: Apache-2.0
//! Memory that is only needed for a moment, and does not stay with the agent: of the C library's
//! allocator, and of the program's own code.

use std::ops::Range;
use std::{fs, io};

/// From this size on an allocation is a mapping of its own, which goes back to the kernel at once. The
/// allocator would raise this by itself to the size of what is freed (mallopt(3)): answers of the API
/// server, of some MB each, would then leave holes between what is kept.
const MAPPED: libc::c_int = 256 << 10;
/// Heaps of the allocator. It would give each thread its own, and what one thread frees in its own is of
/// no use to the others; each thread still keeps what it frees in small pieces for itself.
const HEAPS: libc::c_int = 1;

/// To be called before there are threads.
pub fn keep_little() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes and returns numbers only.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
        libc::mallopt(libc::M_ARENA_MAX, HEAPS);
    }
}

/// Gives whole pages that hold nothing back to the kernel. Takes some milliseconds, in which other
/// threads may have to wait for memory.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes and returns numbers only.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Lets go of the pages of the program's own code and constants: most are of what runs once, to start.
/// They stay in the page cache as long as the kernel wants, and who runs them again has them mapped
/// again, some microseconds for 16 pages.
///
/// # Errors
/// When the kernel does not tell what is mapped, or refuses.
pub fn let_go_of_code() -> io::Result<()> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let own: fn() -> io::Result<()> = let_go_of_code;
    for pages in own_code(&maps, own as usize) {
        let start = std::ptr::without_provenance_mut(pages.start);
        // SAFETY: pages of the program's file that were never writable: what is thrown away is read
        // again from the file, which does not change while it runs (ETXTBSY).
        let result = unsafe { libc::madvise(start, pages.len(), libc::MADV_DONTNEED) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Where the code is mapped that has an address in it, and the constants at the beginning of its file.
/// Not those behind the code: some were written to when the program was loaded.
fn own_code(maps: &str, here: usize) -> Vec<Range<usize>> {
    let mappings: Vec<_> = maps.lines().filter_map(mapping).collect();
    let Some(code) = mappings.iter().find(|one| one.pages.contains(&here)) else {
        return Vec::new();
    };
    let of_it = |one: &&Mapping<'_>| {
        let constants = one.rights == "r--p" && one.offset == 0;
        one.file == code.file && (one.rights == "r-xp" || constants)
    };
    mappings
        .iter()
        .filter(of_it)
        .map(|one| one.pages.clone())
        .collect()
}

/// A line of /proc/PID/maps (proc(5)).
struct Mapping<'a> {
    pages: Range<usize>,
    rights: &'a str,
    offset: usize,
    /// Device and inode.
    file: (&'a str, &'a str),
}

fn mapping(line: &str) -> Option<Mapping<'_>> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    let pages = number(start)?..number(end)?;
    let rights = fields.next()?;
    let offset = number(fields.next()?)?;
    let file = (fields.next()?, fields.next()?);
    (file.1 != "0").then_some(Mapping {
        pages,
        rights,
        offset,
        file,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d0a0000000-55d0a054f000 r--p 00000000 fe:00 4711                       /mesh-agent
55d0a054f000-55d0a188c000 r-xp 0054e000 fe:00 4711                       /mesh-agent
55d0a188c000-55d0a1917000 r--p 0188b000 fe:00 4711                       /mesh-agent
55d0a1917000-55d0a191c000 rw-p 01915000 fe:00 4711                       /mesh-agent
55d0a2000000-55d0a2100000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000028000 r--p 00000000 fe:00 815                        /usr/lib/libc.so.6
7f0000028000-7f0000180000 r-xp 00028000 fe:00 815                        /usr/lib/libc.so.6
";

    #[test]
    fn code_and_constants_are_let_go_of_and_nothing_that_was_written() {
        let found = own_code(MAPS, 0x55d0_a054_f123);
        assert_eq!(
            found,
            [
                0x55d0_a000_0000..0x55d0_a054_f000,
                0x55d0_a054_f000..0x55d0_a188_c000
            ]
        );
        assert_eq!(own_code(MAPS, 0x1000), [] as [Range<usize>; 0]);
    }

    #[test]
    fn what_was_let_go_of_runs_on() {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let own: fn() -> io::Result<()> = let_go_of_code;
        // A backtrace elsewhere maps the file once more, only to be read.
        assert!(own_code(&maps, own as usize).len() >= 2, "{maps}");
        for _ in 0..3 {
            let_go_of_code().unwrap();
        }
    }
}

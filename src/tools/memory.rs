//! The host's memory: how much of it is held, and the allocator's habits.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicU64, Ordering};

use libmimalloc_sys::{mi_option_set, mi_option_t};

static HELD: AtomicU64 = AtomicU64::new(0);
static PEAK: AtomicU64 = AtomicU64::new(0);

/// How much of a device's memory is held, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    pub held: u64,
    /// The most since the last mark.
    pub peak: u64,
}

/// What [`Counted`] handed out and has not got back; zeros in a program with another allocator. One caller at a time sees all peaks.
pub fn mark() -> Mark {
    let held = HELD.load(Ordering::Relaxed);
    Mark { held, peak: PEAK.swap(held, Ordering::Relaxed).max(held) }
}

/// An allocator that counts what it hands out, in blocks of `LEAST` bytes or more: threads that allocate small ones all
/// the time would wait for each other.
pub struct Counted<A, const LEAST: usize>(pub A);

impl<A, const LEAST: usize> Counted<A, LEAST> {
    fn handed_out(memory: *mut u8, bytes: usize) -> *mut u8 {
        if bytes >= LEAST && !memory.is_null() {
            let held = HELD.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
            if held > PEAK.load(Ordering::Relaxed) {
                PEAK.fetch_max(held, Ordering::Relaxed);
            }
        }
        memory
    }

    fn got_back(bytes: usize) {
        if bytes >= LEAST {
            HELD.fetch_sub(bytes as u64, Ordering::Relaxed);
        }
    }
}

// SAFETY: every call goes to the allocator inside as it came; counting beside it touches no memory that is handed out.
unsafe impl<A: GlobalAlloc, const LEAST: usize> GlobalAlloc for Counted<A, LEAST> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise about `layout`, passed on.
        Self::handed_out(unsafe { self.0.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        Self::handed_out(unsafe { self.0.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        Self::got_back(layout.size());
        // SAFETY: `memory` came from the allocator inside with this layout, as the caller promises of this one.
        unsafe { self.0.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_bytes: usize) -> *mut u8 {
        // SAFETY: as in `dealloc`; the new size is the caller's promise too.
        let moved = Self::handed_out(unsafe { self.0.realloc(memory, layout, new_bytes) }, new_bytes);
        if !moved.is_null() {
            Self::got_back(layout.size()); // After the new, as both are there while numbers are copied.
        }
        moved
    }
}

/// Has the global allocator keep freed pages: what a step frees, the next takes again. By default they go back to the
/// system within a tenth of a second, and each step would pay for fresh ones. Without effect in programs with another
/// allocator.
pub fn keep_freed_pages() {
    /// The option's number in `mimalloc.h`.
    const MI_OPTION_PURGE_DELAY: mi_option_t = 15;
    // SAFETY: sets one of the allocator's integers, which it reads at any time.
    unsafe { mi_option_set(MI_OPTION_PURGE_DELAY, -1) };
}

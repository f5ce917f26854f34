//! The allocator's habits.

use libmimalloc_sys::{mi_option_set, mi_option_t};

/// Freed memory goes back to the system only after this many milliseconds of disuse. By default it does within a tenth of
/// a second, and each step would pay for fresh pages.
const PURGE_DELAY_MS: std::ffi::c_long = 1000;

/// Has the global allocator keep freed pages for the next step. Without effect in programs with another allocator.
pub fn keep_freed_pages() {
    /// The option's number in `mimalloc.h`.
    const MI_OPTION_PURGE_DELAY: mi_option_t = 15;
    // SAFETY: sets one of the allocator's integers, which it reads at any time.
    unsafe { mi_option_set(MI_OPTION_PURGE_DELAY, PURGE_DELAY_MS) };
}

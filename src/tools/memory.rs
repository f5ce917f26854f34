//! The allocator's habits.

use libmimalloc_sys::{mi_option_set, mi_option_t};

/// Has the global allocator keep freed pages: what a step frees, the next takes again. By default they go back to the
/// system within a tenth of a second, and each step would pay for fresh ones. Without effect in programs with another
/// allocator.
pub fn keep_freed_pages() {
    /// The option's number in `mimalloc.h`.
    const MI_OPTION_PURGE_DELAY: mi_option_t = 15;
    // SAFETY: sets one of the allocator's integers, which it reads at any time.
    unsafe { mi_option_set(MI_OPTION_PURGE_DELAY, -1) };
}

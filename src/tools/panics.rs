//! Panics of other people's code, as errors.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    static SILENT: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, making an error of a panic, in the words of the panic: some crates panic on some malformed files. Whatever
/// `f` was changing must not be used afterwards.
pub fn caught<T>(f: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    static HOOK: Once = Once::new();
    // The hook prints before the unwinding begins, so catching is not enough to keep a panic off the terminal.
    HOOK.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !SILENT.get() {
                print(info);
            }
        }));
    });
    let was_silent = SILENT.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(f));
    SILENT.set(was_silent);
    result.unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(format!("the file is malformed ({})", words.unwrap_or("no details")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_in_its_own_words() {
        let index = |i: usize| caught(|| Ok([1, 2][i]));
        assert_eq!(index(1), Ok(2));
        assert!(index(2).unwrap_err().contains("index out of bounds"));
    }
}

//! A panic is a bug of titan: what its user is told, and how the process ends.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, Write};
use std::panic::{PanicHookInfo, set_hook};
use std::sync::OnceLock;
use std::thread;

use signal_hook::low_level::exit;

/// As of a program that Rust ends after a panic.
const EXIT_CODE: i32 = 101;

type Advice = Box<dyn Fn() -> String + Send + Sync>;

static ADVICE: OnceLock<Advice> = OnceLock::new();

/// From now on a panic says that it is a bug, and where, and ends the process with 101 at once, whichever thread it was on:
/// what waits for that thread would wait for ever. What is half saved then is removed by the next run.
pub fn explain_panics() {
    set_hook(Box::new(|info| {
        // Without a reader it is the exit code that tells.
        let _ = io::stderr().write_all(report(info).as_bytes());
        exit(EXIT_CODE);
    }));
}

/// What the report of a panic ends with, a sentence without its full stop. Only the first call counts.
pub fn advise(advice: impl Fn() -> String + Send + Sync + 'static) {
    let _ = ADVICE.set(Box::new(advice));
}

fn report(info: &PanicHookInfo) -> String {
    let message = info.payload_as_str().unwrap_or("no message");
    let location = info.location().map_or_else(|| "somewhere".to_owned(), ToString::to_string);
    let thread = thread::current();
    let mut report = format!(
        "\nerror: this is a bug in titan: {message}\n  --> {location}, thread `{}`\n   = please report it, with this message and \
         the command\n",
        thread.name().unwrap_or("unnamed")
    );
    if let Some(advice) = ADVICE.get() {
        report += &format!("   = {}\n", advice());
    }
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        report += &backtrace.to_string();
    }
    report
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    const CHILD: &str = "TITAN_TEST_CHILD";

    #[test]
    fn a_panic_on_any_thread_ends_the_process_and_says_what_to_do() {
        if std::env::var_os(CHILD).is_none() {
            let mut child = Command::new(std::env::current_exe().unwrap());
            let test = "tools::bugs::tests::a_panic_on_any_thread_ends_the_process_and_says_what_to_do";
            let child = child.args(["--exact", test, "--nocapture"]).env(CHILD, "1").stdin(Stdio::null());
            let output = child.output().unwrap();
            assert_eq!(output.status.code(), Some(EXIT_CODE), "{output:?}");
            let message = String::from_utf8_lossy(&output.stderr);
            for words in ["bug in titan: two and two", "bugs.rs:", "thread `adder`", "report it", "step-7 is whole"] {
                assert!(message.contains(words), "{message}");
            }
            return;
        }
        explain_panics();
        advise(|| "step-7 is whole".to_owned());
        let add = || assert_eq!(2 + 2, 5, "two and two");
        let adder = thread::Builder::new().name("adder".into()).spawn(add).unwrap();
        // Nobody waits for the thread's panic.
        while !adder.is_finished() {}
        thread::park();
    }
}

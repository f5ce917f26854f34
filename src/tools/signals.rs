//! Ctrl-C and friends: a first signal asks a run to stop, a second stops it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use std::{io, thread};

use signal_hook::consts::{SIGINT, SIGPIPE, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use tracing::warn;

use crate::{Error, Result};

/// A signal that asks a run to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Ctrl-C.
    Interrupt,
    /// What `kill`, service managers and batch systems send.
    Terminate,
}

impl Signal {
    /// As the system numbers it.
    pub fn number(self) -> u8 {
        match self {
            Self::Interrupt => 2,
            Self::Terminate => 15,
        }
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
        })
    }
}

/// Signals this soon after the first are the same request: `timeout` and batch systems signal a process and then its
/// whole group, and the second of the two must not cost the checkpoint.
const SAME_REQUEST: Duration = Duration::from_millis(500);

/// Whether the user has asked the run to stop.
#[derive(Clone, Debug)]
pub struct Interrupt {
    /// The number of the latest signal, 0 before any.
    received: Arc<AtomicUsize>,
}

impl Interrupt {
    /// From now on a first SIGINT or SIGTERM only says so, here and in one log line, and a second ends the process at
    /// once with 128 + its number.
    pub fn install() -> Result<Self> {
        Self::try_install().map_err(Error::io("cannot be handled", "SIGINT and SIGTERM"))
    }

    fn try_install() -> io::Result<Self> {
        let received = Arc::new(AtomicUsize::new(0));
        let asked_before = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&asked_before))?;
            flag::register_usize(signal, Arc::clone(&received), signal as usize)?;
        }
        // A handler may not print, and a step may be long: a thread answers the user right away.
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        thread::Builder::new().name("signals".into()).spawn(move || {
            if signals.forever().next().is_some() {
                warn!("stopping after this step; press Ctrl-C again to stop at once");
                thread::sleep(SAME_REQUEST);
                asked_before.store(true, Ordering::Relaxed);
            }
        })?;
        Ok(Self { received })
    }

    /// The signal that asked the run to stop, if any has.
    pub fn requested(&self) -> Option<Signal> {
        match self.received.load(Ordering::Relaxed) as i32 {
            SIGINT => Some(Signal::Interrupt),
            SIGTERM => Some(Signal::Terminate),
            _ => None,
        }
    }
}

/// Ends the process quietly when the reader of its output goes away (`titan config | head`), where Rust's `println!`
/// would panic. For commands that exist to print; a training run must outlive the pager of its log.
pub fn end_on_broken_pipe() -> Result<()> {
    flag::register_conditional_default(SIGPIPE, Arc::new(AtomicBool::new(true)))
        .map(drop)
        .map_err(Error::io("cannot be handled", "SIGPIPE"))
}

/// Has a write beyond the limit of a file's size (`ulimit -f`) fail like one to a full disk, instead of ending the process.
pub fn survive_file_size_limit() -> Result<()> {
    flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))
        .map(drop)
        .map_err(Error::io("cannot be handled", "SIGXFSZ"))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    use signal_hook::low_level::raise;

    use super::*;

    const CHILD: &str = "TITAN_TEST_CHILD";

    /// This test binary again, running only `test`, which finds [`CHILD`] set.
    fn child(test: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", &format!("tools::signals::tests::{test}"), "--nocapture"]).env(CHILD, "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn is_child() -> bool {
        std::env::var_os(CHILD).is_some()
    }

    #[test]
    fn a_first_signal_is_only_noted() {
        if !is_child() {
            let output = child("a_first_signal_is_only_noted").output().unwrap();
            assert!(output.status.success(), "{output:?}");
            return;
        }
        let interrupt = Interrupt::install().unwrap();
        assert_eq!(interrupt.requested(), None);
        raise(SIGTERM).unwrap();
        assert_eq!(interrupt.requested(), Some(Signal::Terminate));
    }

    #[test]
    fn two_signals_at_once_are_one_request() {
        if !is_child() {
            let output = child("two_signals_at_once_are_one_request").output().unwrap();
            assert!(output.status.success(), "{output:?}");
            return;
        }
        let interrupt = Interrupt::install().unwrap();
        raise(SIGINT).unwrap();
        raise(SIGINT).unwrap();
        assert_eq!(interrupt.requested(), Some(Signal::Interrupt));
    }

    #[test]
    fn a_second_signal_ends_the_process_with_128_plus_its_number() {
        if !is_child() {
            let output = child("a_second_signal_ends_the_process_with_128_plus_its_number").output().unwrap();
            assert_eq!(output.status.code(), Some(130), "{output:?}");
            return;
        }
        let _interrupt = Interrupt::install().unwrap();
        raise(SIGTERM).unwrap();
        thread::sleep(4 * SAME_REQUEST);
        raise(SIGINT).unwrap();
        unreachable!("the second signal has ended the process");
    }

    #[test]
    fn a_closed_pipe_ends_the_process_without_a_panic() {
        if !is_child() {
            let mut process = child("a_closed_pipe_ends_the_process_without_a_panic").spawn().unwrap();
            // Read until the handler is in place, then close.
            let lines = BufReader::new(process.stdout.take().unwrap()).lines();
            assert!(lines.map_while(io::Result::ok).any(|line| line == "a line"));
            let output = process.wait_with_output().unwrap();
            assert_eq!(output.status.signal(), Some(SIGPIPE), "{output:?}");
            assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");
            return;
        }
        end_on_broken_pipe().unwrap();
        loop {
            io::stdout().write_all(b"a line\n").unwrap();
        }
    }
}

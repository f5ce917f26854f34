//! Ctrl-C and friends: a first signal asks a run to stop, a second stops it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use std::{io, thread};

use signal_hook::consts::{SIGHUP, SIGINT, SIGPIPE, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use tracing::{info, warn};

use crate::{Error, Result};

/// A signal that asks a run to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// The terminal is gone.
    Hangup,
    /// Ctrl-C.
    Interrupt,
    /// What `kill`, service managers and batch systems send.
    Terminate,
}

impl Signal {
    const ALL: [Self; 3] = [Self::Hangup, Self::Interrupt, Self::Terminate];

    /// As the system numbers it.
    pub fn number(self) -> u8 {
        match self {
            Self::Hangup => 1,
            Self::Interrupt => 2,
            Self::Terminate => 15,
        }
    }

    fn of_number(number: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|signal| i32::from(signal.number()) == number)
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hangup => "SIGHUP",
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
        })
    }
}

/// Signals this soon after the first are the same request: `timeout` and batch systems signal a process and then its
/// whole group, and the second of the two must not cost the checkpoint.
const SAME_REQUEST: Duration = Duration::from_millis(100);

/// How long a run that was asked to stop goes on waiting for data and measuring. A step and a save are always finished.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the user asks of a run by signals.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    /// The number of the latest signal that asks to stop, 0 before any.
    received: Arc<AtomicUsize>,
    /// Whether the next such signal ends the process on the spot.
    at_once: Arc<AtomicBool>,
    /// Whether [`PATIENCE`] is over.
    impatient: Arc<AtomicBool>,
    save: Arc<AtomicBool>,
}

impl Interrupt {
    /// From now on SIGHUP, SIGINT and SIGTERM end the process with 128 + their number, until [`Interrupt::begin`]; SIGUSR1
    /// asks for a checkpoint. Under `nohup`, SIGHUP stays without effect.
    pub fn install() -> Result<Self> {
        Self::try_install().map_err(Error::io("cannot be handled", "SIGINT and SIGTERM"))
    }

    fn try_install() -> io::Result<Self> {
        let this = Self::default();
        this.at_once.store(true, Ordering::Relaxed);
        let mut stops = vec![SIGINT, SIGTERM];
        if !is_ignored(SIGHUP) {
            stops.push(SIGHUP);
        }
        for &signal in &stops {
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&this.at_once))?;
            flag::register_usize(signal, Arc::clone(&this.received), signal as usize)?;
        }
        flag::register(SIGUSR1, Arc::clone(&this.save))?;

        // A handler may not print, and a step may be long: a thread answers the user right away.
        let mut signals = Signals::new([&stops[..], &[SIGUSR1]].concat())?;
        let Self { at_once, impatient, .. } = this.clone();
        thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                if signal == SIGUSR1 {
                    info!("SIGUSR1: saving a checkpoint after this step");
                    continue;
                }
                warn!("stopping after this step; press Ctrl-C again to stop at once");
                thread::sleep(SAME_REQUEST);
                at_once.store(true, Ordering::Relaxed);
                thread::sleep(PATIENCE);
                impatient.store(true, Ordering::Relaxed);
                return;
            }
        })?;
        Ok(this)
    }

    /// There is something to lose: from now on a first signal only asks, here and in one log line. A second one still
    /// ends the process at once.
    pub fn begin(&self) {
        self.at_once.store(false, Ordering::Relaxed);
    }

    /// The signal that asked the run to stop, if any has.
    pub fn requested(&self) -> Option<Signal> {
        Signal::of_number(self.received.load(Ordering::Relaxed) as i32)
    }

    /// Whether a checkpoint was asked for since the last call.
    pub fn takes_save_request(&self) -> bool {
        self.save.swap(false, Ordering::Relaxed)
    }

    /// For whatever waits, now and then.
    ///
    /// # Errors
    /// [`Error::AskedToStop`] some seconds after the user asked the run to stop: time to give up waiting.
    pub fn check_patience(&self) -> Result<()> {
        if self.impatient.load(Ordering::Relaxed) { Err(Error::AskedToStop) } else { Ok(()) }
    }
}

/// Whether the process was started with this signal ignored, as by `nohup`.
fn is_ignored(signal: i32) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: without a new action this only writes the current one, for which there is room; all zeros are one too.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction == libc::SIG_IGN
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
        interrupt.begin();
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
        interrupt.begin();
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
        Interrupt::install().unwrap().begin();
        raise(SIGTERM).unwrap();
        thread::sleep(4 * SAME_REQUEST);
        raise(SIGINT).unwrap();
        unreachable!("the second signal has ended the process");
    }

    #[test]
    fn a_signal_before_anything_can_be_lost_ends_the_process() {
        if !is_child() {
            let output = child("a_signal_before_anything_can_be_lost_ends_the_process").output().unwrap();
            assert_eq!(output.status.code(), Some(143), "{output:?}");
            return;
        }
        Interrupt::install().unwrap();
        raise(SIGTERM).unwrap();
        unreachable!("the signal has ended the process");
    }

    #[test]
    fn a_request_for_a_checkpoint_is_met_once_and_stops_nothing() {
        if !is_child() {
            let output = child("a_request_for_a_checkpoint_is_met_once_and_stops_nothing").output().unwrap();
            assert!(output.status.success(), "{output:?}");
            return;
        }
        let interrupt = Interrupt::install().unwrap();
        raise(SIGUSR1).unwrap();
        assert_eq!([(); 2].map(|()| interrupt.takes_save_request()), [true, false]);
        assert_eq!(interrupt.requested(), None);
    }

    #[test]
    fn patience_ends_some_time_after_the_request() {
        if !is_child() {
            let output = child("patience_ends_some_time_after_the_request").output().unwrap();
            assert!(output.status.success(), "{output:?}");
            return;
        }
        let interrupt = Interrupt::install().unwrap();
        interrupt.begin();
        raise(SIGTERM).unwrap();
        thread::sleep(PATIENCE / 2);
        interrupt.check_patience().unwrap();
        thread::sleep(PATIENCE);
        assert!(matches!(interrupt.check_patience(), Err(Error::AskedToStop)));
        assert_eq!(interrupt.requested(), Some(Signal::Terminate));
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

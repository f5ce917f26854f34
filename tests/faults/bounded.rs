//! A run that must end by itself, soon and small, and a file that nobody may open.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::nap;

/// What no hostile file may bring a process to.
const MOST_BYTES: u64 = 1_500_000_000;
const LONGEST: Duration = Duration::from_secs(40);

/// How a run ended, within those bounds.
pub struct Verdict {
    pub code: i32,
    pub stderr: String,
}

/// Runs to the end.
///
/// # Panics
/// If it takes too long or too much memory, panics, or ends by a signal.
#[track_caller]
pub fn examine(command: &mut Command) -> Verdict {
    let mut log = tempfile::NamedTempFile::new().unwrap();
    let output = log.as_file_mut().try_clone().unwrap();
    let mut child = command.stdout(Stdio::null()).stderr(output).env("RUST_BACKTRACE", "1").spawn().unwrap();
    let mut waited = Duration::ZERO;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Ok(status);
        }
        // The high-water mark, so that nothing passes between two looks.
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB"));
        let peak: u64 = peak.map_or(0, |kib| kib.trim().parse::<u64>().unwrap() * 1024);
        if peak > MOST_BYTES || waited > LONGEST {
            child.kill().unwrap();
            child.wait().unwrap();
            break Err(format!("{:.1} GB after {:.0?}", peak as f64 / 1e9, waited));
        }
        waited += nap();
    };
    let stderr = String::from_utf8_lossy(&fs::read(log.path()).unwrap()).into_owned();
    let shown = &stderr[..stderr.floor_char_boundary(2000)];
    let status = status.unwrap_or_else(|excess| panic!("{command:?}: {excess}\n{shown}"));
    let code = status.code().unwrap_or_else(|| panic!("{command:?}: {status}\n{shown}"));
    for trace in ["bug in titan", "panicked at", "stack backtrace", "overflowed its stack"] {
        assert!(!stderr.contains(trace), "{command:?}\n{shown}");
    }
    Verdict { code, stderr }
}

impl Verdict {
    /// Asserts that it failed, for a reason that names all of `words`.
    #[track_caller]
    pub fn assert_refused(&self, code: i32, words: &[&str]) {
        let shown = &self.stderr[..self.stderr.floor_char_boundary(2000)];
        assert_eq!(self.code, code, "{words:?}\n{shown}");
        assert!(self.stderr.len() < 20_000, "a message of {} bytes", self.stderr.len());
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not in\n{shown}");
        }
    }
}

/// Watches files that nobody may open.
pub struct Canary(File);

impl Canary {
    /// Over all files directly in `folder`.
    pub fn over(folder: &Path) -> Self {
        let path = CString::new(folder.as_os_str().as_bytes()).unwrap();
        // SAFETY: plain system calls; the path is a C string that lives through the second, and the descriptor that the
        // first returns is owned by nobody else.
        let file = unsafe {
            let fd = libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC);
            assert!(fd >= 0);
            assert!(libc::inotify_add_watch(fd, path.as_ptr(), libc::IN_OPEN | libc::IN_ACCESS) >= 0);
            File::from(OwnedFd::from_raw_fd(fd))
        };
        Self(file)
    }

    /// Whether one of them was opened since the last time it was asked.
    pub fn sang(&mut self) -> bool {
        let mut events = [0_u8; 4096];
        // SAFETY: the buffer is as long as is said. Without events the call fails, as the descriptor does not block.
        unsafe { libc::read(self.0.as_raw_fd(), events.as_mut_ptr().cast(), events.len()) > 0 }
    }
}

#[test]
fn the_canary_sings_when_a_file_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "secret").unwrap();
    let mut canary = Canary::over(folder.path());
    fs::metadata(&file).unwrap();
    assert!(!canary.sang());
    File::open(&file).unwrap();
    assert!(canary.sang() && !canary.sang());
}

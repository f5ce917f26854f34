//! The binary, as a user runs it in a clone of the repository.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// A path of the repository: where cargo says at run time that it lies, else where it lay at compile time. A test that was
/// carried to another machine is told by `CARGO_MANIFEST_DIR`.
pub fn repo(path: &str) -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from).join(path)
}

pub fn titan(args: &[&str]) -> Command {
    let binary = std::env::var_os("CARGO_BIN_EXE_titan").unwrap_or_else(|| env!("CARGO_BIN_EXE_titan").into());
    let mut command = Command::new(binary);
    command.args(args).current_dir(repo("")).stdin(Stdio::null());
    command
}

pub fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    output
}

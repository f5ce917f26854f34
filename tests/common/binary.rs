//! The binary, as a user runs it in a clone of the repository.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

pub fn repo(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

pub fn titan(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_titan"));
    command.args(args).current_dir(repo("")).stdin(Stdio::null());
    command
}

pub fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    output
}

//! Runs with `preload.rs` between them and the system.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use crate::binary::succeed;
use crate::common::Job;

/// Compiled by the compiler that compiled this; kept until the drills are over.
static LIBRARY: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("libfaults.so");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .args(["--edition", "2024", "-O", "-C", "panic=abort", "--crate-type", "cdylib"])
        .args([Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults/preload.rs").as_os_str(), "-o".as_ref()])
        .arg(&library)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (folder, library)
});

/// The job's command, whose operations on files below `root` are watched.
pub fn watched(job: &Job, root: &Path) -> Command {
    let mut command = job.command();
    watch(&mut command, &job.folder().canonicalize().unwrap().join(root));
    command
}

/// `root` is absolute.
pub fn watch(command: &mut Command, root: &Path) {
    command.env("LD_PRELOAD", &LIBRARY.1).env("FAULT_ROOT", root);
}

/// An operation that succeeded; paths are relative to the job's folder.
#[derive(Clone, Debug)]
pub struct Operation {
    pub name: String,
    pub path: PathBuf,
    /// Of a rename.
    pub to: PathBuf,
    /// What a write wrote, or what was logged.
    pub data: Vec<u8>,
}

/// Trains undisturbed, and returns what it did to files below `root`.
pub fn operations(job: &Job, root: &Path) -> Vec<Operation> {
    operations_of(&mut job.command(), job.folder(), root)
}

/// The same of any command; `folder` is where it runs.
pub fn operations_of(command: &mut Command, folder: &Path, root: &Path) -> Vec<Operation> {
    let folder = folder.canonicalize().unwrap();
    let log = tempfile::NamedTempFile::new().unwrap();
    watch(command, &folder.join(root));
    succeed(command.env("FAULT_LOG", log.path()));
    let relative = |path: &str| Path::new(path).strip_prefix(&folder).unwrap_or(Path::new("")).to_owned();

    let log = std::fs::read(log).unwrap();
    let mut rest = &log[..];
    let mut operations = Vec::new();
    while !rest.is_empty() {
        let end = rest.iter().position(|byte| *byte == b'\n').unwrap();
        let line = std::str::from_utf8(&rest[..end]).unwrap();
        let [name, path, to, len] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let (data, after) = rest[end + 1..].split_at(len.parse().unwrap());
        operations.push(Operation {
            name: name.to_owned(),
            path: relative(path),
            to: relative(to),
            data: data.to_owned(),
        });
        rest = after;
    }
    operations
}

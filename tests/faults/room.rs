//! Disks that are full, small or closed, noticed before the first step.

use std::fs;
use std::path::Path;

use crate::common::{Ended, Job, Run, files, held};
use crate::preloaded::watched;

fn run(job: &Job, variables: &[(&str, &str)]) -> Ended {
    let mut command = watched(job, Path::new("outputs"));
    command.envs(variables.iter().copied());
    Run::start(command, &job.folder().join("log")).wait()
}

/// Asserts that no step was trained, and what the user reads.
fn assert_stopped_at_once(ended: &Ended, words: &[&str]) {
    assert_eq!((ended.code, ended.first_step()), (Some(1), None), "{}", ended.log);
    let error = ended.log.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert!(words.iter().all(|words| error.contains(words)), "{words:?}: {}", ended.log);
}

#[test]
fn a_dump_folder_that_cannot_be_written_stops_a_run_before_its_first_step() {
    for (errno, cause) in
        [("30", "Read-only file system"), ("13", "Permission denied"), ("28", "No space left on device")]
    {
        assert_stopped_at_once(&run(&Job::new(&[]), &[("FAULT_AT", "1"), ("FAULT", errno)]), &["outputs", cause]);
        // What is there already can be read.
        let mut job = Job::new(&[]);
        job.outcome();
        let before = files(&job.checkpoints());
        job.flags.push("--training.steps=8".to_owned());
        assert_stopped_at_once(&run(&job, &[("FAULT_AT", "1"), ("FAULT", errno)]), &["outputs", cause]);
        assert!(files(&job.checkpoints()) == before);
    }

    let job = Job::new(&[]);
    fs::write(job.dump_folder(), b"a file in the way").unwrap();
    assert_stopped_at_once(&job.run(), &["outputs", "File exists"]);
    let job = Job::new(&[]);
    fs::create_dir(job.dump_folder()).unwrap();
    fs::write(job.checkpoints(), b"a file in the way").unwrap();
    assert_stopped_at_once(&job.run(), &["outputs/checkpoint", "File exists"]);
    held("the dump folder is read-only, full or blocked: said before step 1", "8 of 8");
}

#[test]
fn a_disk_too_small_for_the_next_checkpoint_stops_a_run_before_its_first_step() {
    let ended = run(&Job::new(&[]), &[("FAULT_FREE", "524288")]);
    assert_stopped_at_once(&ended, &["outputs/checkpoint: the next checkpoint takes ", " and 512.00 KiB are free"]);

    // Room for one, though not for the two that stay and the one that is written.
    let job = Job::new(&[]);
    let ended = run(&job, &[("FAULT_FREE", "2097152")]);
    ended.assert_succeeded();
    assert!(
        ended.log.contains("WARN ") && ended.log.contains("are free, and the checkpoints to come take "),
        "{}",
        ended.log
    );
    assert!(!job.run().log.contains("are free"), "nothing is to come");
    held("the disk is too small for the next checkpoint: said before step 1, needed against free", "1 of 1");
}

#[test]
fn a_limit_of_the_file_size_is_an_error_with_the_path() {
    let job = Job::new(&[]);
    // Writes beyond 200 KiB fail; titan's own log is a pipe or a file, and small.
    let mut shell = std::process::Command::new("bash");
    let titan = job.command();
    shell.current_dir(job.folder()).args(["-c", "ulimit -f 200; exec \"$@\"", "titan"]);
    shell.arg(titan.get_program()).args(titan.get_args());
    let ended = Run::start(shell, &job.folder().join("log")).wait();
    assert_eq!(ended.code, Some(1), "{}", ended.log);
    let error = ended.log.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert!(error.contains("step-2/model.safetensors") && error.contains("File too large"), "{}", ended.log);
    assert!(ended.announced().is_none());

    let again = job.run();
    again.assert_succeeded();
    assert_eq!(again.first_step(), Some(1));
    held("the file size is limited: an error with path and cause", "1 of 1");
}

//! Every operation that saves do to files, each failing in every way: a run that dies there, or meets a full or broken disk,
//! loses nothing and announces nothing that is not there.

use std::path::Path;

use rayon::prelude::*;
use titan::components::checkpoint::Survey;

use crate::common::{Ended, Job, Outcome, Run, amount, held};
use crate::preloaded::{operations, watched};

const SAVES: &str = "outputs/checkpoint";
const MODES: [&str; 2] = ["--checkpoint.async_mode=disabled", "--checkpoint.async_mode=async"];

/// As `preload.rs` takes them, with the words that a user must read.
const ERRORS: [(&str, &str); 5] = [
    ("28", "No space left on device"),
    ("5", "Input/output error"),
    ("30", "Read-only file system"),
    ("122", "quota exceeded"),
    ("24", "Too many open files"),
];

/// One run that meets `fault` at operation `at`, and what came of it.
struct Case<'a> {
    job: Job,
    outcome: &'a Outcome,
    at: usize,
    fault: &'a str,
    ended: Ended,
}

/// Runs every combination of `faults` with one operation in `stride`, of both ways to save, and returns their number.
fn try_all(faults: &[&str], stride: usize, check: impl Fn(&Case) + Sync) -> usize {
    let cases = MODES.iter().enumerate().map(|(nth, mode)| {
        let outcome = Job::new(&[mode]).outcome();
        let counted = operations(&Job::new(&[mode]), Path::new(SAVES));
        let n = counted.iter().filter(|operation| operation.name != "log").count();
        let tries: Vec<_> =
            (1..=n).flat_map(|at| faults.iter().enumerate().map(move |(which, fault)| (at, which, *fault))).collect();
        // Each fault begins at another operation, so that even a few tries meet many.
        let tries = tries.into_par_iter().filter(|(at, which, _)| (at + 5 * which + 3 * nth) % stride == 0);
        let tried = tries.map(|(at, _, fault)| {
            let job = Job::new(&[mode]);
            let mut command = watched(&job, Path::new(SAVES));
            command.env("FAULT_AT", at.to_string()).env("FAULT", fault);
            let ended = Run::start(command, &job.folder().join("log")).wait();
            check(&Case { job, outcome: &outcome, at, fault, ended });
        });
        tried.count()
    });
    cases.sum()
}

impl Case<'_> {
    /// Every step that has a name is whole, the one that was announced last among them, and the same command goes on from
    /// there to the end of the undisturbed run.
    fn assert_nothing_is_lost(&self) {
        let Self { at, fault, .. } = self;
        let whole: Vec<usize> = match Survey::of(&self.job.checkpoints(), true) {
            Ok(survey) => survey
                .found
                .iter()
                .map(|found| match &found.manifest {
                    Ok(_) => found.step().unwrap(),
                    Err(damage) => panic!("{fault} at {at}: {}: {damage}", found.path.display()),
                })
                .collect(),
            Err(_) => Vec::new(),
        };
        let announced = self.ended.announced().unwrap_or(0);
        assert!(announced == 0 || whole.contains(&announced), "{fault} at {at}: {whole:?}\n{}", self.ended.log);

        let again = self.job.run();
        again.assert_succeeded();
        if let Some(first) = again.first_step() {
            assert_eq!(first, whole.last().unwrap_or(&0) + 1, "{fault} at {at}\n{}", again.log);
        }
        self.job.assert_came_to(self.outcome);
    }
}

#[test]
fn death_at_any_operation_of_a_save_loses_nothing() {
    let n = try_all(&["kill", "torn"], amount(16, 1), |case| {
        // A torn operation that is no write is done.
        assert!(
            case.ended.code == Some(137) || case.fault == "torn" && case.ended.code == Some(0),
            "{}",
            case.ended.log
        );
        case.assert_nothing_is_lost();
    });
    held(
        "death before an operation of a save, or amid a write: nothing announced is lost, the same end",
        format_args!("{n} of {n}"),
    );
}

#[test]
fn errors_at_any_operation_of_a_save_are_told_and_lose_nothing() {
    let faults = ERRORS.map(|(errno, _)| errno);
    let n = try_all(&faults, amount(32, 1), |case| {
        let (_, words) = ERRORS.into_iter().find(|(errno, _)| errno == &case.fault).unwrap();
        let Case { at, ended, .. } = case;
        if ended.code == Some(0) {
            // Where old steps are removed, faults are no more than a pity.
            case.job.assert_came_to(case.outcome);
        } else {
            let last = ended.log.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
            assert_eq!(ended.code, Some(1), "at {at}: {}", ended.log);
            assert!(last.contains(SAVES) && last.contains(words), "at {at}: {}", ended.log);
        }
        case.assert_nothing_is_lost();
    });
    held(
        "ENOSPC, EIO, EROFS, EDQUOT, EMFILE at an operation of a save: path and cause, nothing is lost, the same end",
        format_args!("{n} of {n}"),
    );
}

#[test]
fn writes_that_take_only_half_are_gone_on_with() {
    let n = try_all(&["short"], amount(24, 1), |case| {
        case.ended.assert_succeeded();
        case.job.assert_came_to(case.outcome);
    });
    held("a write of a save that takes only half: gone on with, the same end", format_args!("{n} of {n}"));
}

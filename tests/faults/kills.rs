//! kill -9 at random moments.

use std::path::Path;
use std::time::Duration;

use rand::Rng;

use crate::common::{Job, amount, files, held};

const INTERVAL: usize = 3;

#[test]
fn a_run_that_is_killed_at_any_moment_goes_on_to_the_same_end() {
    let kills = amount(5, 100);
    for mode in ["disabled", "async"] {
        let flags = [
            "--training.steps=60",
            &format!("--checkpoint.interval={INTERVAL}"),
            &format!("--checkpoint.async_mode={mode}"),
        ];
        let outcome = Job::new(&flags).outcome();
        let mut left = kills;
        while left > 0 {
            let job = Job::new(&flags);
            kill_until_done(&job, &mut left);
            job.assert_came_to(&outcome);
        }
    }
    held(
        "kill -9 at a random moment: the same command goes on, every loss and the last checkpoint's bits as unbroken",
        format_args!("{n} of {n}", n = 2 * kills),
    );
}

/// Starts a job again and again, and kills it at random moments, until it has ended by itself; `left` kills at most.
fn kill_until_done(job: &Job, left: &mut usize) {
    // Of the runs before: the step that was announced last, and the last step that was logged.
    let (mut announced, mut logged) = (0, 0);
    loop {
        let mut run = job.start();
        run.wait_for("Training starts at step");
        if *left > 0 {
            std::thread::sleep(Duration::from_micros(rand::rng().random_range(0..400_000)));
            run.signal("KILL");
        }
        let ended = run.wait();
        if let Some(first) = ended.first_step() {
            assert!(first > announced, "step {announced} was announced as saved, and is lost:\n{}", ended.log);
            assert!(logged < first + redone(job), "{} steps are done again", logged + 1 - first);
        }
        if ended.signal != Some(9) {
            ended.assert_succeeded();
            return;
        }
        *left -= 1;
        announced = ended.announced().unwrap_or(announced);
        logged = job.losses().last().map_or(0, |(step, _)| *step as usize);
    }
}

/// The most steps that a run may have to do again. In the background, a save takes a while; the next waits for it.
fn redone(job: &Job) -> usize {
    if job.flags.iter().any(|flag| flag.ends_with("=async")) { 2 * INTERVAL } else { INTERVAL }
}

#[test]
fn saving_in_the_background_changes_no_bit_of_what_is_saved() {
    let saved = |mode: &str| {
        let job = Job::new(&[&format!("--checkpoint.async_mode={mode}")]);
        job.outcome();
        // The last step is always waited for.
        [4, 6].map(|step| files(&job.step(step)))
    };
    let [expected, found] = ["disabled", "async_with_pinned_mem"].map(saved);
    for (mut expected, mut found) in expected.into_iter().zip(found) {
        for differs in ["config.toml", "manifest.json"] {
            assert_ne!(expected.remove(Path::new(differs)), found.remove(Path::new(differs)), "the mode");
        }
        assert!(expected == found);
    }
}

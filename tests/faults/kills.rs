//! kill -9 at random moments.

use std::time::Duration;

use rand::Rng;

use crate::common::{Job, amount, held};

#[test]
fn a_run_that_is_killed_at_any_moment_goes_on_to_the_same_end() {
    const INTERVAL: usize = 3;
    let (kills, mut moments) = (amount(10, 200), rand::rng());
    let flags = ["--training.steps=60".to_owned(), format!("--checkpoint.interval={INTERVAL}")];
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let outcome = Job::new(&flags).outcome();

    let mut killed = 0;
    while killed < kills {
        let job = Job::new(&flags);
        // What the last run that was killed had announced, and the last step that it had logged.
        let mut before: Option<(usize, usize)> = None;
        loop {
            let mut run = job.start();
            run.wait_for("Training starts at step");
            if killed < kills {
                std::thread::sleep(Duration::from_micros(moments.random_range(0..400_000)));
                run.signal("KILL");
            }
            let ended = run.wait();
            if let (Some((announced, logged)), Some(first)) = (before, ended.first_step()) {
                assert!(first > announced, "step {announced} was announced as saved, and is lost:\n{}", ended.log);
                assert!(logged < first + INTERVAL, "{} steps are done again", logged + 1 - first);
            }
            if ended.signal != Some(9) {
                ended.assert_succeeded();
                break;
            }
            killed += 1;
            let logged = job.losses().last().map_or(0, |(step, _)| *step as usize);
            before = Some((ended.announced().or(before.map(|it| it.0)).unwrap_or(0), logged));
        }
        job.assert_came_to(&outcome);
    }
    held(
        "kill -9 at a random moment: the same command goes on, every loss and the last checkpoint's bits as unbroken",
        format_args!("{killed} of {kills}"),
    );
}

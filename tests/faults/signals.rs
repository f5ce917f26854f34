//! Signals at random moments, and everything else that a terminal, a batch system or a clock does to a process.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rand::Rng;

use crate::binary::{succeed, titan};
use crate::common::{Ended, Job, Run, amount, held};

/// Within so much time a run that was told to stop has saved and ended.
const STOPS_WITHIN: Duration = Duration::from_secs(15);
/// A second signal ends it within this.
const ENDS_WITHIN: Duration = Duration::from_secs(2);

const SIGNALS: [(&str, i32); 3] = [("TERM", 143), ("INT", 130), ("HUP", 129)];

/// Sends a signal, and says how the run ended.
fn stop(run: Run, name: &str, within: Duration) -> Ended {
    run.signal(name);
    let ended = run.wait();
    assert!(ended.waited < within, "ends {:?} after {name}:\n{}", ended.waited, ended.log);
    ended
}

#[test]
fn a_run_that_is_told_to_stop_at_any_moment_ends_with_its_last_step_saved() {
    let (stops, mut random) = (amount(12, 100), rand::rng());
    let flags = [
        "--training.steps=80",
        "--checkpoint.interval=5",
        "--validation.enable",
        "--validation.dataset=text",
        "--validation.dataset_path=words.txt",
        "--validation.seq_len=16",
        "--validation.local_batch_size=1",
        "--validation.steps=20",
        "--validation.freq=4",
    ];
    let outcome = Job::new(&flags).outcome();

    let mut stopped = 0;
    while stopped < stops {
        let job = Job::new(&flags);
        loop {
            let (name, code) = SIGNALS[random.random_range(0..SIGNALS.len())];
            let before = job.losses().len();
            let run = job.start();
            if stopped < stops {
                std::thread::sleep(Duration::from_micros(random.random_range(0..400_000)));
            }
            let ended = if stopped < stops { stop(run, name, STOPS_WITHIN) } else { run.wait() };
            let done = job.losses().len();
            if let Some(first) = ended.first_step() {
                assert_eq!(first, before + 1, "the run before had done {before} steps");
            }
            if ended.code == Some(0) {
                break;
            }
            // Before the program has asked for it, the system does what it always does.
            let is_told = ended.code == Some(code) || ended.log.is_empty() && ended.signal == Some(code - 128);
            assert!(is_told, "{name}: {:?} {:?}\n{}", ended.code, ended.signal, ended.log);
            assert!(done == before || ended.announced() == Some(done), "{done} steps: {}", ended.log);
            stopped += 1;
        }
        job.assert_came_to(&outcome);
    }
    held(
        "SIGTERM, SIGINT or SIGHUP at a random moment: ends with 128 + its number within 15 s, no step is lost",
        format_args!("{stopped} of {stops}"),
    );
}

/// A job on two files.
fn job_on_two_files() -> Job {
    let job = Job::new(&[
        "--training.dataset=json",
        "--training.dataset_path=data",
        "--training.steps=800",
        "--checkpoint.interval=1000",
        "--data.no-shuffle",
        "--data.num_workers=1",
    ]);
    let text = fs::read_to_string(job.folder().join("words.txt")).unwrap();
    let line = serde_json::json!({ "text": &text[..400] }).to_string() + "\n";
    fs::create_dir(job.folder().join("data")).unwrap();
    for file in ["a.jsonl", "b.jsonl"] {
        fs::write(job.folder().join("data").join(file), line.repeat(90)).unwrap();
    }
    job
}

/// Starts the job, and waits until it has done all that it has data for: its second file becomes a pipe that nobody writes
/// long before it is opened.
fn run_until_blocked(job: &Job) -> Run {
    let mut run = job.start();
    run.wait_for("Training starts");
    let path = job.folder().join("data/b.jsonl");
    fs::rename(&path, job.folder().join("b.jsonl")).unwrap();
    succeed(Command::new("mkfifo").arg(path));
    run.wait_for("step:  2");
    let mut done = 0;
    while job.losses().len() > done {
        done = job.losses().len();
        std::thread::sleep(Duration::from_millis(500));
    }
    run
}

#[test]
fn a_run_that_waits_for_data_gives_up_and_loses_no_step() {
    let outcome = job_on_two_files().outcome();
    let job = job_on_two_files();
    let ended = stop(run_until_blocked(&job), "TERM", STOPS_WITHIN);
    assert_eq!((ended.code, ended.announced()), (Some(143), Some(job.losses().len())), "{}", ended.log);
    assert!(job.losses().len() < 800);

    fs::rename(job.folder().join("b.jsonl"), job.folder().join("data/b.jsonl")).unwrap();
    job.run().assert_succeeded();
    job.assert_came_to(&outcome);
    held("SIGTERM while a read is blocked: gives up, saves, goes on as unbroken", "1 of 1");
}

#[test]
fn a_second_signal_ends_a_run_at_once() {
    let mut found = Duration::ZERO;
    let times = amount(2, 20);
    for i in 0..times {
        let job = job_on_two_files();
        let mut run = run_until_blocked(&job);
        run.signal("TERM");
        run.wait_for("press Ctrl-C again");
        std::thread::sleep(Duration::from_millis(200));
        let (name, code) = SIGNALS[i % SIGNALS.len()];
        let ended = stop(run, name, ENDS_WITHIN);
        assert_eq!(ended.code, Some(code));
        found = found.max(ended.waited);
    }
    held(
        "a second signal: the run ends within 2 s",
        format_args!("{times} of {times}, at most {:.2} s", found.as_secs_f64()),
    );
}

#[test]
fn sigusr1_saves_a_checkpoint_and_the_run_goes_on() {
    let flags = ["--training.steps=300", "--checkpoint.interval=1000"];
    let outcome = Job::new(&flags).outcome();
    let times = amount(2, 20);
    for _ in 0..times {
        let job = Job::new(&flags);
        let mut run = job.start();
        run.wait_for("step: 10");
        run.signal("USR1");
        let ended = run.wait();
        ended.assert_succeeded();
        assert_eq!(ended.log.matches("(asked for by SIGUSR1)").count(), 1, "{}", ended.log);
        job.assert_came_to(&outcome);
    }
    held("SIGUSR1: saves at the next step and goes on as unbroken", format_args!("{times} of {times}"));
}

#[test]
fn a_run_that_is_stopped_and_continued_goes_on() {
    let flags = ["--training.steps=100"];
    let outcome = Job::new(&flags).outcome();
    let job = Job::new(&flags);
    let run = job.start();
    let times = amount(5, 50);
    for _ in 0..times {
        run.signal("STOP");
        std::thread::sleep(Duration::from_millis(20));
        run.signal("CONT");
        std::thread::sleep(Duration::from_millis(rand::rng().random_range(0..20)));
    }
    run.wait().assert_succeeded();
    job.assert_came_to(&outcome);
    held("SIGSTOP and SIGCONT: goes on as unbroken", format_args!("{times} of {times}"));
}

#[test]
fn a_run_outlives_those_who_read_its_output() {
    let outcome = Job::new(&[]).outcome();

    // `titan train 2>&1 | head -n 1`.
    let job = Job::new(&[]);
    let mut child = job.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut log = BufReader::new(child.stderr.take().unwrap());
    log.read_line(&mut String::new()).unwrap();
    drop(log);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    job.assert_came_to(&outcome);

    // `titan train >&- 2>&-`, and where everything that is written is lost.
    for redirected in [r#"exec "$0" "$@" >&- 2>&-"#, r#"exec "$0" "$@" >/dev/full 2>/dev/full"#] {
        let job = Job::new(&[]);
        let train = job.command();
        let mut shell = Command::new("sh");
        shell.args(["-c", redirected]).arg(train.get_program()).args(train.get_args()).current_dir(job.folder());
        assert_eq!(shell.env("RAYON_NUM_THREADS", "1").status().unwrap().code(), Some(0), "{redirected}");
        job.assert_came_to(&outcome);
    }

    // What a command is for cannot be written: an error, not a bug.
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    let output = titan(&["models"]).stdout(full()).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && message.contains("standard output: cannot write"), "{message}");
    assert_eq!(titan(&["models", "--no-such"]).stderr(full()).status().unwrap().code(), Some(2));
    held("standard output and error closed, or full: goes on as unbroken", "3 of 3");
}

#[cfg(target_os = "linux")]
#[test]
fn a_clock_that_jumps_changes_nothing() {
    let flags = ["--metrics.enable_tensorboard"];
    let outcome = Job::new(&flags).outcome();
    let job = Job::new(&flags);
    let library = job.folder().join("clock.so");
    let mut compile = Command::new("cc");
    compile.args(["-shared", "-fPIC", "-o"]).arg(&library);
    succeed(compile.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults/clock.c")));
    let mut command = job.command();
    command.env("LD_PRELOAD", library);
    let ended = Run::start(command, &job.folder().join("log")).wait();
    ended.assert_succeeded();
    job.assert_came_to(&outcome);
    held("a wall clock that jumps by years, back and forth: goes on as unbroken", "1 of 1");
}

#[test]
fn other_commands_end_at_once_and_leave_nothing_half_written() {
    let job = Job::new(&[]);
    job.run().assert_succeeded();
    let folder = job.folder();
    let start = |args: &[&str]| {
        let mut command = titan(args);
        command.current_dir(folder);
        Run::start(command, &folder.join("log"))
    };

    // Text for ever: the shards that are whole stand, and none is half written.
    fs::create_dir(folder.join("texts")).unwrap();
    let text = fs::read(folder.join("words.txt")).unwrap().repeat(200);
    (0..40).for_each(|i| fs::write(folder.join(format!("texts/{i}.txt")), &text).unwrap());
    let tokenizer = crate::binary::repo("assets/tokenizer");
    let tokenize = ["tokenize", "--dataset=text", "--dataset-path=texts", "--output=shards", "--shard-tokens=100000"];
    let run = start(&[&tokenize[..], &["--tokenizer", tokenizer.to_str().unwrap()]].concat());
    while !folder.join("shards/text-00000.bin").exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(stop(run, "INT", ENDS_WITHIN).signal, Some(2));
    let shards = fs::read_dir(folder.join("shards")).unwrap().map(|entry| entry.unwrap().path());
    let shards: Vec<_> = shards.filter(|path| path.extension().is_some_and(|it| it == "bin")).collect();
    for shard in &shards {
        assert!(fs::metadata(shard).unwrap().len() >= 200_000 && shard.with_extension("json").is_file(), "{shard:?}");
    }

    let run = start(&["generate", "--num-samples=1000000", "--prompt=Once"]);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(stop(run, "INT", ENDS_WITHIN).signal, Some(2));

    let times = amount(10, 100);
    let mut whole = 0;
    for i in 0..times {
        let (name, end) = (format!("converted-{i}"), Duration::from_micros(rand::rng().random_range(0..40_000)));
        let run = start(&["convert", "--to-hf=latest", "--to", &name]);
        std::thread::sleep(end);
        stop(run, "INT", ENDS_WITHIN);
        if folder.join(&name).exists() {
            let found = crate::common::files(&folder.join(&name));
            assert!(found.contains_key(Path::new("config.json")) && found.contains_key(Path::new("model.safetensors")));
            whole += 1;
        }
    }
    held(
        "Ctrl-C in tokenize, generate and convert: ends at once, nothing half written under its name",
        format_args!("{} of {0} ({whole} were already whole)", times + 2),
    );
}

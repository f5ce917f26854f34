//! What the drills share: a job that trains in less than a second, its runs, and what must come of it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value as Json;

use crate::binary::{repo, succeed, titan};

/// Lets a moment pass, and says how long it was: no longer than a busy machine makes it, if somebody stopped the drill and
/// its runs meanwhile.
pub fn nap() -> Duration {
    let start = Instant::now();
    std::thread::sleep(Duration::from_millis(1));
    start.elapsed().min(Duration::from_millis(50))
}

/// Looks again after a nap, for longer than anything should take, and says how long that was.
fn wait_for<T>(mut look: impl FnMut() -> Option<T>, fault: impl FnOnce() -> String) -> (T, Duration) {
    let mut waited = Duration::ZERO;
    while waited < Duration::from_secs(120) {
        match look() {
            Some(found) => return (found, waited),
            None => waited += nap(),
        }
    }
    panic!("{}", fault());
}

/// `quick` in CI, `full` in `scripts/drill.sh`.
pub fn amount(quick: usize, full: usize) -> usize {
    if std::env::var_os("TITAN_DRILL").is_some_and(|value| value == "full") { full } else { quick }
}

/// A row of the table that `scripts/drill.sh` prints: what happened, and how often what was promised held.
pub fn held(when: &str, figure: impl std::fmt::Display) {
    println!("\n| {when} | {figure} |");
}

/// A job in a folder of its own, which trains six steps, saves every other one and keeps two of them.
pub struct Job {
    folder: tempfile::TempDir,
    /// What is given over the job file.
    pub flags: Vec<String>,
}

impl Job {
    pub fn new(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("words.txt"), words()).unwrap();
        fs::write(folder.path().join("job.toml"), job_toml()).unwrap();
        Self { folder, flags: flags.iter().map(|flag| (*flag).to_owned()).collect() }
    }

    /// Where the runs are started.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn dump_folder(&self) -> PathBuf {
        self.folder().join("outputs")
    }

    pub fn checkpoints(&self) -> PathBuf {
        self.dump_folder().join("checkpoint")
    }

    pub fn step(&self, step: usize) -> PathBuf {
        self.checkpoints().join(format!("step-{step}"))
    }

    /// Trains, in the folder of the job, so that no checkpoint names it.
    pub fn command(&self) -> Command {
        let mut command = titan(&["train", "--config", "job.toml"]);
        command.current_dir(self.folder()).args(&self.flags).env("RAYON_NUM_THREADS", "1").env("NO_COLOR", "1");
        command
    }

    pub fn start(&self) -> Run {
        Run::start(self.command(), &self.folder().join("log"))
    }

    /// Trains to the end, and says how it went.
    pub fn run(&self) -> Ended {
        self.start().wait()
    }

    /// Trains to the end, undisturbed: what every other run of such a job must come to.
    pub fn outcome(&self) -> Outcome {
        succeed(&mut self.command());
        Outcome { losses: self.losses().into_iter().collect(), last_step: files(&self.step(self.last_step())) }
    }

    /// Asserts that every loss ever logged, those of steps that were done again too, and the last checkpoint are those of
    /// the undisturbed run.
    pub fn assert_came_to(&self, outcome: &Outcome) {
        for (step, loss) in self.losses() {
            assert_eq!(outcome.losses.get(&step), Some(&loss), "the loss of step {step}");
        }
        let steps: BTreeMap<_, _> = self.losses().into_iter().collect();
        assert_eq!(steps, outcome.losses, "every step was logged");
        let found = files(&self.step(self.last_step()));
        assert!(found.keys().eq(outcome.last_step.keys()), "{:?}", found.keys());
        for (name, bytes) in found {
            assert!(outcome.last_step[&name] == bytes, "the last {} is the same bits", name.display());
        }
    }

    /// Every line of `metrics.jsonl` that has a loss, and those that a resumed run took back.
    pub fn losses(&self) -> Vec<(u64, f64)> {
        let texts = ["metrics.superseded.jsonl", "metrics.jsonl"]
            .map(|name| fs::read_to_string(self.dump_folder().join(name)).unwrap_or_default());
        let whole = texts.iter().flat_map(|text| text.split_inclusive('\n')).filter(|line| line.ends_with('\n'));
        let lines = whole.map(|line| serde_json::from_str::<Json>(line).unwrap());
        lines.filter_map(|line| Some((line["step"].as_u64()?, line["loss"].as_f64()?))).collect()
    }

    fn last_step(&self) -> usize {
        let steps = self.flags.iter().rev().find_map(|flag| flag.strip_prefix("--training.steps="));
        steps.map_or(6, |steps| steps.parse().unwrap())
    }
}

/// What an undisturbed run came to.
pub struct Outcome {
    pub losses: BTreeMap<u64, f64>,
    /// The files of the last checkpoint.
    pub last_step: BTreeMap<PathBuf, Vec<u8>>,
}

/// A process that trains.
pub struct Run {
    child: Child,
    log: PathBuf,
}

/// How a run ended.
pub struct Ended {
    /// `None`: by a signal.
    pub code: Option<i32>,
    pub signal: Option<i32>,
    /// How long that was waited for.
    pub waited: Duration,
    pub log: String,
}

impl Run {
    /// Standard error goes to the file `log`: a pipe that is not read would stop the run.
    pub fn start(mut command: Command, log: &Path) -> Self {
        let heed_signals = || {
            for signal in [libc::SIGINT, libc::SIGHUP] {
                // SAFETY: a system call, which is all that there may be between fork and exec.
                unsafe { libc::signal(signal, libc::SIG_DFL) };
            }
            Ok(())
        };
        // A drill in the background of a shell, or under nohup, was told to ignore one of them, and hands that on.
        // SAFETY: see there.
        unsafe { command.pre_exec(heed_signals) };
        let child = command.stdout(Stdio::null()).stderr(File::create(log).unwrap()).spawn().unwrap();
        Self { child, log: log.to_owned() }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until the log has these words, or the run has ended.
    pub fn wait_for(&mut self, words: &str) {
        let Self { child, log } = self;
        let read = || fs::read_to_string(&*log).unwrap();
        let look = || (read().contains(words) || child.try_wait().unwrap().is_some()).then_some(());
        wait_for(look, || format!("no {words:?} in\n{}", read()));
    }

    /// `KILL`, `TERM` and so on.
    pub fn signal(&self, name: &str) {
        // It may have ended by itself.
        let _ = Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).output().unwrap();
    }

    pub fn wait(mut self) -> Ended {
        let (status, waited) = wait_for(
            || self.child.try_wait().unwrap(),
            || format!("does not end:\n{}", fs::read_to_string(&self.log).unwrap()),
        );
        Ended { code: status.code(), signal: status.signal(), waited, log: self.log() }
    }
}

impl Drop for Run {
    /// A drill that fails leaves nothing running.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    #[track_caller]
    pub fn assert_succeeded(&self) {
        assert_eq!(self.code, Some(0), "{}", self.log);
    }

    /// The step that training started at; `None` if it did not.
    pub fn first_step(&self) -> Option<usize> {
        let (_, rest) = self.log.split_once("Training starts at step ")?;
        rest.split('.').next()?.parse().ok()
    }

    /// The newest step that was announced as saved.
    pub fn announced(&self) -> Option<usize> {
        let lines = self.log.lines().filter(|line| line.contains("Finished saving the checkpoint"));
        lines.filter_map(|line| line.rsplit("step-").next()?.parse().ok()).next_back()
    }
}

/// The files below a folder, by their path in it.
pub fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).unwrap_or_else(|error| panic!("{}: {error}", next.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.insert(path.strip_prefix(folder).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    found
}

fn words() -> String {
    let words: Vec<&str> = "once upon a time an owl sat in a tree by the sea and sang to the moon".split(' ').collect();
    let lines = (0..200).map(|line| {
        let line: Vec<&str> = (0..12).map(|word| words[(line * line + word * (line + 1)) % words.len()]).collect();
        line.join(" ") + "\n"
    });
    lines.collect()
}

fn job_toml() -> String {
    format!(
        r#"
[model]
name = "llama3"
hf_assets_path = "{}"
[model.args]
dim = 16
n_layers = 1
n_heads = 2
multiple_of = 16
[metrics]
log_freq = 1
[lr_scheduler]
warmup_steps = 2
[training]
dataset = "text"
dataset_path = "words.txt"
local_batch_size = 1
seq_len = 16
steps = 6
[data]
shuffle = true
[checkpoint]
enable = true
interval = 2
keep_latest_k = 2
[debug]
seed = 3
"#,
        repo("assets/tokenizer").display()
    )
}

//! Checkpoints that changed after they were saved, and what only looks like one.

use std::fs;
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use titan::components::checkpoint::manifest::Manifest;
use titan::components::checkpoint::{StepFolder, Survey, Use};

use crate::common::{Job, Outcome, amount, files, held};

/// A job that was trained, which the drills damage and make whole again.
struct Trained {
    job: Job,
    outcome: Outcome,
    /// The checkpoints as they were saved: steps 4 and 6.
    saved: Vec<(PathBuf, Vec<u8>)>,
}

impl Trained {
    fn new() -> Self {
        let job = Job::new(&[]);
        let outcome = job.outcome();
        let saved = files(&job.checkpoints()).into_iter().collect();
        Self { job, outcome, saved }
    }

    fn restore(&self) {
        fs::remove_dir_all(self.job.checkpoints()).unwrap();
        for (name, bytes) in &self.saved {
            let path = self.job.checkpoints().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }

    /// Asserts that step 6 is refused with these words, by the library and by the binary, which goes on from step 4 to the
    /// same end.
    fn assert_noticed(&self, words: &str) {
        let damage = StepFolder::open(&self.job.step(6), Use::Everything).unwrap_err();
        assert!(damage.contains(words), "{words}: {damage}");
        let ended = self.job.run();
        ended.assert_succeeded();
        assert_eq!(ended.first_step(), Some(5), "{}", ended.log);
        let warning = format!("WARN ./outputs/checkpoint/step-6 cannot be used: {damage}");
        assert!(ended.log.contains(&warning), "{warning}\n{}", ended.log);
        self.job.assert_came_to(&self.outcome);
    }
}

#[test]
fn every_flipped_bit_is_noticed_and_named() {
    let trained = Trained::new();
    let step = trained.job.step(6);
    let saved: Vec<_> = files(&step).into_iter().collect();
    let mut chance = StdRng::seed_from_u64(1);
    let n = amount(200, 1000);
    for nth in 0..n {
        // Each file in turn: most of the bytes are in one of them.
        let (name, bytes) = &saved[nth % saved.len()];
        let mut flipped = bytes.clone();
        flipped[chance.random_range(0..bytes.len())] ^= 1 << chance.random_range(0..8);
        fs::write(step.join(name), flipped).unwrap();
        let damage = StepFolder::open(&step, Use::Everything).expect_err("a flipped bit is noticed");
        assert!(damage.contains(name.to_str().unwrap()), "{}: {damage}", name.display());
        fs::write(step.join(name), bytes).unwrap();
    }
    StepFolder::open(&step, Use::Everything).expect("whole again");
    held("a bit of a checkpoint flipped: noticed, and the file named", format_args!("{n} of {n}"));

    let n = amount(3, saved.len());
    for (name, bytes) in &saved[..n] {
        let mut flipped = bytes.clone();
        flipped[bytes.len() / 2] ^= 4;
        fs::write(step.join(name), flipped).unwrap();
        trained.assert_noticed(name.to_str().unwrap());
        trained.restore();
    }
    held(
        "a bit of a checkpoint flipped (the binary): warned, the step before is loaded, the same end",
        format_args!("{n} of {n}"),
    );
}

#[test]
fn no_mutated_manifest_is_accepted() {
    let trained = Trained::new();
    let json = fs::read(trained.job.step(6).join("manifest.json")).unwrap();
    Manifest::from_json(&json).unwrap();
    let mut chance = StdRng::seed_from_u64(2);
    let n = amount(10_000, 1_000_000);
    for _ in 0..n {
        let mut mutated = json.clone();
        (0..chance.random_range(1..4)).for_each(|_| mutate(&mut mutated, &mut chance));
        let accepted = Manifest::from_json(&mutated).is_ok();
        assert!(!accepted || mutated == json, "{}", String::from_utf8_lossy(&mutated));
    }
    held("a manifest mutated at random: refused", format_args!("{n} of {n}"));
}

/// Replaces, removes, or repeats some bytes.
fn mutate(bytes: &mut Vec<u8>, chance: &mut StdRng) {
    let start = chance.random_range(0..=bytes.len());
    let end = bytes.len().min(start + chance.random_range(0..20));
    let inserted: Vec<u8> = match chance.random_range(0..4) {
        0 => Vec::new(),
        1 => vec![chance.random()],
        2 => b"-1.9e999\"\\{[,:]}null"[chance.random_range(0..10)..].to_vec(),
        _ => bytes[start..end].repeat(2),
    };
    bytes.splice(start..end, inserted);
}

#[test]
fn files_that_are_cut_swapped_gone_or_new_are_noticed_and_named() {
    type Damage = fn(&Path);
    let cases: [(Damage, &str); 10] = [
        (|step| truncate(&step.join("model.safetensors")), "model.safetensors has "),
        (|step| truncate(&step.join("manifest.json")), "manifest.json is damaged"),
        (|step| fs::write(step.join("optimizer.safetensors"), b"").unwrap(), "optimizer.safetensors has 0 bytes"),
        (|step| fs::write(step.join("manifest.json"), b"").unwrap(), "manifest.json is damaged"),
        (
            |step| {
                let name = "optimizer.safetensors";
                fs::copy(step.with_file_name("step-4").join(name), step.join(name)).unwrap();
            },
            "optimizer.safetensors has changed",
        ),
        (
            |step| {
                for [from, to] in [
                    ["model.safetensors", "x"],
                    ["optimizer.safetensors", "model.safetensors"],
                    ["x", "optimizer.safetensors"],
                ] {
                    fs::rename(step.join(from), step.join(to)).unwrap();
                }
            },
            "model.safetensors has ",
        ),
        (|step| fs::remove_file(step.join("tokenizer/tokenizer.json")).unwrap(), "tokenizer/tokenizer.json is missing"),
        (|step| fs::write(step.join("notes.txt"), b"mine").unwrap(), "notes.txt is not in manifest.json"),
        (
            |step| fs::rename(step.join("train_state.json"), step.join("train_state.bak")).unwrap(),
            "train_state.json is missing",
        ),
        (
            |step| {
                fs::remove_dir_all(step).unwrap();
                copy_folder(&step.with_file_name("step-4"), step);
            },
            "manifest.json is that of step-4, not of step-6",
        ),
    ];
    let trained = Trained::new();
    for (damage, words) in cases {
        damage(&trained.job.step(6));
        trained.assert_noticed(words);
        trained.restore();
    }
    let n = cases.len();
    held(
        "files truncated, emptied, swapped, missing, extra, renamed, a step under another name: noticed, named, the same end",
        format_args!("{n} of {n}"),
    );
}

#[test]
fn where_every_step_is_damaged_nothing_is_trained_or_deleted() {
    let trained = Trained::new();
    for step in [4, 6] {
        truncate(&trained.job.step(step).join("model.safetensors"));
    }
    let before = files(&trained.job.checkpoints());
    let ended = trained.job.run();
    assert_eq!((ended.code, ended.first_step()), (Some(1), None), "{}", ended.log);
    for words in ["nothing was deleted", "step-4: model.safetensors has ", "step-6: model.safetensors has "] {
        assert!(ended.log.contains(words), "{}", ended.log);
    }
    assert!(files(&trained.job.checkpoints()) == before);
    held("no checkpoint can be used: the run stops, and deletes nothing", "1 of 1");
}

#[test]
fn look_alikes_are_neither_loaded_nor_counted_nor_removed() {
    let folders = [
        "old-step-9-backup",
        "step-9.bak",
        "step-09",
        "step-9-copy",
        "Step-9",
        "step-",
        "xstep-9",
        "step-9 ",
        "step-+9",
        "step--9",
    ];
    let files = ["step-9", "step-8.txt"];
    let job = Job::new(&[]);
    let outcome = Job::new(&[]).outcome();
    // Each is a whole checkpoint but for its name.
    let other = Job::new(&[]);
    other.outcome();
    fs::create_dir_all(job.checkpoints()).unwrap();
    folders.iter().for_each(|name| copy_folder(&other.step(6), &job.checkpoints().join(name)));
    files.iter().for_each(|name| fs::write(job.checkpoints().join(name), b"a file").unwrap());

    let ended = job.run();
    ended.assert_succeeded();
    assert_eq!(ended.first_step(), Some(1), "{}", ended.log);
    job.assert_came_to(&outcome);
    for name in folders {
        assert!(job.checkpoints().join(name).join("manifest.json").is_file(), "{name} is left alone");
    }
    for name in files {
        assert_eq!(fs::read(job.checkpoints().join(name)).unwrap(), b"a file", "{name} is left alone");
    }
    let survey = Survey::of(&job.checkpoints(), true).unwrap();
    assert_eq!(survey.whole_steps().map(|(step, _)| step).collect::<Vec<_>>(), [4, 6]);
    let n = folders.len() + files.len();
    held("look-alikes of step folders: ignored", format_args!("{n} of {n}"));
}

fn truncate(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() - 7]).unwrap();
}

fn copy_folder(from: &Path, to: &Path) {
    for (name, bytes) in files(from) {
        let path = to.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

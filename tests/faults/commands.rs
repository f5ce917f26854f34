//! `titan checkpoint`: what it says of whole and damaged checkpoints, and what it removes.

use std::fs;
use std::path::Path;
use std::process::Output;

use titan::components::checkpoint::{StepFolder, Use, steps_in};

use crate::binary::titan;
use crate::common::Job;

fn checkpoint(job: &Job, args: &[&str]) -> Output {
    titan(&["checkpoint"]).args(args).current_dir(job.folder()).output().unwrap()
}

#[track_caller]
fn assert_says(output: &Output, code: i32, words: &[&str]) {
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert_eq!(output.status.code(), Some(code), "{stdout}{stderr}");
    for words in words {
        assert!(stdout.contains(words) || stderr.contains(words), "{words:?} in\n{stdout}{stderr}");
    }
}

/// Steps 2, 4 and 6, and an export of the last.
fn trained() -> Job {
    let job = Job::new(&["--checkpoint.keep_latest_k=0", "--checkpoint.export_dtype=bfloat16"]);
    job.outcome();
    job
}

fn spoil(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(file, bytes).unwrap();
}

#[test]
fn list_and_verify_tell_whole_checkpoints_from_damaged_ones() {
    let job = trained();
    let listed = checkpoint(&job, &["list"]);
    assert_says(
        &listed,
        0,
        &["./outputs/checkpoint\n", "step-2 ", "step-4 ", "step-6 ", "step-6-bfloat16", " full ", " model "],
    );
    assert_says(&checkpoint(&job, &["verify"]), 0, &["step-2: whole, 6 files, ", "step-6-bfloat16: whole, 4 files, "]);

    spoil(&job.step(4).join("optimizer.safetensors"));
    fs::remove_file(job.step(2).join("config.toml")).unwrap();
    let words = ["step-2: damaged: config.toml is missing", "step-4: damaged: optimizer.safetensors has changed"];
    assert_says(&checkpoint(&job, &["verify"]), 1, &words);
    assert_says(&checkpoint(&job, &["verify"]), 1, &["step-6: whole", "2 of 4 checkpoints damaged"]);
    assert_says(&checkpoint(&job, &["verify", "outputs/checkpoint/step-4"]), 1, &["1 of 1 checkpoints damaged"]);
    assert_says(&checkpoint(&job, &["verify", "outputs/checkpoint/step-6"]), 0, &["step-6: whole"]);
    assert_says(&checkpoint(&job, &["list", "outputs"]), 0, &["damaged", "config.toml is missing"]);
    assert_says(&checkpoint(&job, &["list", "words.txt"]), 1, &["words.txt is no folder"]);
    assert_says(&checkpoint(&job, &["list", "."]), 1, &[". holds no checkpoints"]);
}

#[test]
fn inspect_shows_every_tensor_and_what_its_numbers_are_like() {
    let job = trained();
    let all = checkpoint(&job, &["inspect", "outputs/checkpoint/step-6"]);
    let words =
        ["tok_embeddings.weight ", "exp_avg.layers.0.attention.wq.weight ", "exp_avg_sq.norm.weight ", " 2048 x 16 "];
    assert_says(&all, 0, &words);
    let of_norms = checkpoint(&job, &["inspect", "outputs/checkpoint/step-2", "--tensors", "attention_norm"]);
    assert_says(&of_norms, 0, &["layers.0.attention_norm.weight", "3 tensors, 48 elements"]);
    // A norm that was 1 before the first step.
    let text = String::from_utf8(of_norms.stdout).unwrap();
    let line = text.lines().find(|line| line.starts_with("layers.0.attention_norm.weight")).unwrap();
    let figures: Vec<f64> = line.split_whitespace().rev().take(6).map(|figure| figure.parse().unwrap()).collect();
    let [n_odd, rms, std, mean, max, min] = figures[..] else { panic!("{line}") };
    assert!(
        n_odd == 0.0 && min <= mean && mean <= max && (mean - 1.0).abs() < 0.1 && (rms - 1.0).abs() < 0.1 && std < 0.1
    );
    let file = "outputs/checkpoint/step-6-bfloat16/model.safetensors";
    assert_says(&checkpoint(&job, &["inspect", file]), 0, &["output.weight", "BF16"]);
}

#[test]
fn prune_keeps_the_newest_whole_steps_and_says_what_goes() {
    let job = trained();
    let damaged = job.step(6).join("model.safetensors");
    spoil(&damaged);
    let dry = checkpoint(&job, &["prune", "--keep", "1", "--dry-run"]);
    assert_says(
        &dry,
        0,
        &["would remove ./outputs/checkpoint/step-2, ", "step-6 does not count, and stays: model.safetensors"],
    );
    assert_eq!(steps_in(&job.checkpoints()).unwrap(), [2, 4, 6]);

    let reading = StepFolder::open(&job.step(2), Use::Model).unwrap();
    assert_says(&checkpoint(&job, &["prune", "--keep=1"]), 0, &["step-2 is being read and stays for now"]);
    drop(reading);
    assert_says(&checkpoint(&job, &["prune", "--keep=1"]), 0, &["removed ./outputs/checkpoint/step-2, "]);
    assert_eq!(steps_in(&job.checkpoints()).unwrap(), [4, 6], "the newest that is whole stays");
    assert_says(&checkpoint(&job, &["prune", "--keep=1"]), 0, &["nothing to remove: 1 whole steps"]);
    assert!(job.checkpoints().join("step-6-bfloat16").is_dir());
    assert_says(&checkpoint(&job, &["prune", "--keep=0"]), 2, &["--keep"]);
}

#[test]
fn prune_waits_for_no_run_that_trains() {
    let job = Job::new(&["--training.steps=1000000", "--checkpoint.interval=20"]);
    let mut run = job.start();
    run.wait_for("Finished saving");
    assert_says(&checkpoint(&job, &["prune", "--keep=1"]), 1, &["outputs is in use by process "]);
    run.signal("KILL");
    run.wait();
    assert_says(&checkpoint(&job, &["prune", "--keep=1"]), 0, &[]);
    assert_eq!(steps_in(&job.checkpoints()).unwrap().len(), 1);
}

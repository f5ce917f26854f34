//! Losses that are no numbers, or out of line.

use std::collections::HashMap;
use std::fs;

use candle_core::{Device, Tensor};

use crate::common::{Ended, Job, held};

const VOCAB_SIZE: u16 = 64;
/// Tokens of a step: a row of `training.seq_len`, and the one behind it.
const ROW: usize = 17;

/// A job that trains on these tokens, a row in each step, from weights that `poison` has changed.
fn job(rows: &[[u16; ROW]], flags: &[&str], poison: impl FnOnce(&mut HashMap<String, Tensor>)) -> Job {
    let vocab_size = format!("--model.args.vocab_size={VOCAB_SIZE}");
    let of_tokens = [
        "--training.dataset=tokens",
        "--training.dataset_path=tokens.bin",
        "--data.no-shuffle",
        "--model.hf_assets_path=./assets/tokenizer",
        &vocab_size,
    ];
    let seed = [&of_tokens[..], &["--checkpoint.create_seed_checkpoint"]].concat();
    let seed = with_tokens(Job::new(&seed), rows);
    seed.run().assert_succeeded();
    let mut weights = candle_core::safetensors::load(seed.step(0).join("model.safetensors"), &Device::Cpu).unwrap();
    poison(&mut weights);

    let flags = [&of_tokens[..], &["--checkpoint.initial_load_path=init.safetensors"], flags].concat();
    let job = with_tokens(Job::new(&flags), rows);
    candle_core::safetensors::save(&weights, job.folder().join("init.safetensors")).unwrap();
    job
}

fn with_tokens(job: Job, rows: &[[u16; ROW]]) -> Job {
    let bytes: Vec<u8> = rows.iter().flatten().flat_map(|token| token.to_le_bytes()).collect();
    fs::write(job.folder().join("tokens.bin"), bytes).unwrap();
    let sidecar = serde_json::json!({ "vocab_size": VOCAB_SIZE, "eos_id": 0, "dtype": "u16" });
    fs::write(job.folder().join("tokens.json"), sidecar.to_string()).unwrap();
    job
}

/// The same few tokens over and over.
fn plain(n: usize) -> Vec<[u16; ROW]> {
    vec![std::array::from_fn(|i| 1 + i as u16 % 4); n]
}

/// Sets one element of a weight, counted over and over.
fn set(weights: &mut HashMap<String, Tensor>, name: &str, at: usize, value: f32) {
    let shape = weights[name].dims().to_vec();
    let mut values: Vec<f32> = weights[name].flatten_all().unwrap().to_vec1().unwrap();
    let at = at % values.len();
    values[at] = value;
    weights.insert(name.to_owned(), Tensor::from_vec(values, shape, &Device::Cpu).unwrap());
}

#[track_caller]
fn assert_stopped(ended: &Ended, words: &[&str]) {
    assert_eq!(ended.code, Some(1), "{}", ended.log);
    for words in words {
        assert!(ended.log.contains(words), "{words:?} is not in\n{}", ended.log);
    }
}

#[test]
fn the_first_stage_and_parameter_that_went_bad_are_named_and_nothing_is_saved() {
    let cases = [
        ("tok_embeddings.weight", "output of `tok_embeddings`", f32::NAN),
        ("layers.0.attention.wk.weight", "output of `layers.0`", f32::INFINITY),
        ("layers.0.feed_forward.w2.weight", "output of `layers.0`", f32::NAN),
        ("norm.weight", "loss of `head`", f32::NAN),
        ("output.weight", "loss of `head`", f32::NEG_INFINITY),
    ];
    for (name, stage, value) in cases {
        // Its row of the embedding is one that is read.
        let job = job(&plain(6), &["--checkpoint.interval=1"], |weights| set(weights, name, 16, value));
        let ended = job.run();
        assert_stopped(&ended, &["step 1: the loss is ", &format!("the {stage}: the weight of `{name}` holds ")]);
        assert!(!job.step(1).exists());
    }
    // Each weight is a number, but a product of two is none.
    let job = job(&plain(6), &["--optimizer.lr=1e30", "--lr_scheduler.warmup_steps=0"], |_| ());
    let ended = job.run();
    assert_stopped(&ended, &["step 2: the loss is ", "the gradient of `head`: its weights are finite, the largest 1."]);
    held("a loss or gradient norm that is not finite: step, stage and parameter are named, nothing is saved", "6 of 6");
}

#[test]
fn a_step_that_poisons_weights_is_never_saved() {
    // Decay beyond float32, which neither the loss nor the gradients of that step show.
    let job = job(
        &plain(6),
        &[
            "--optimizer.lr=3e38",
            "--optimizer.weight_decay=10",
            "--lr_scheduler.warmup_steps=0",
            "--checkpoint.interval=1",
        ],
        |_| (),
    );
    assert_stopped(&job.run(), &["after step 1 the weight of `", "holds ", "nothing is saved"]);
    assert!(!job.step(1).exists());
    held("weights that a step made infinite: not saved", "1 of 1");
}

/// Rows 3 and 5 hold a token whose embedding is finite as it is stored, and infinite once it is multiplied.
fn poisoned_job(flags: &[&str]) -> Job {
    let poison = VOCAB_SIZE - 1;
    let mut rows = plain(6);
    rows[2][7] = poison;
    rows[4][0] = poison;
    let finite = ["--optimizer.weight_decay=0", "--model.args.embedding_multiplier=1e10"];
    let flags = [&finite[..], flags].concat();
    job(&rows, &flags, |weights| {
        let dim = weights["tok_embeddings.weight"].dims()[1];
        set(weights, "tok_embeddings.weight", usize::from(poison) * dim, f32::MAX);
    })
}

#[test]
fn steps_that_are_not_finite_are_skipped_and_counted_up_to_the_limit() {
    let skip = "--training.nan_policy=skip";
    let job = poisoned_job(&[skip]);
    let outcome = job.outcome();
    let job = poisoned_job(&[skip]);
    let ended = job.run();
    ended.assert_succeeded();
    for (step, n) in [(3, 1), (5, 2)] {
        let words = format!(
            "step {step} is skipped, {n} of at most 10: the loss is NaN and the gradient norm NaN; first to go bad"
        );
        assert!(ended.log.contains(&words), "{}", ended.log);
    }
    assert!(outcome.losses.keys().eq(&[1, 2, 4, 6]) && outcome.losses[&6] < outcome.losses[&1], "{:?}", outcome.losses);

    // Once more from step 4: the count, and the steps of the optimizer, are as they were.
    fs::remove_dir_all(job.step(6)).unwrap();
    let ended = job.run();
    assert!(ended.log.contains("step 5 is skipped, 2 of at most 10"), "{}", ended.log);
    job.assert_came_to(&outcome);

    let limited = poisoned_job(&[skip, "--training.max_skipped_steps=1"]);
    assert_stopped(
        &limited.run(),
        &["step 3 is skipped, 1 of at most 1", "step 5: the loss is NaN", "max_skipped_steps = 1"],
    );
    let stopped = poisoned_job(&[]);
    assert_stopped(
        &stopped.run(),
        &["step 3: the loss is NaN", "`tok_embeddings`", "step-2: the same command goes on"],
    );
    held("training.nan_policy = \"skip\": skipped, counted, resumed as unbroken, stopped at the limit", "4 of 4");
}

#[test]
fn a_loss_out_of_line_is_logged_or_skipped_as_configured() {
    let mut rows = plain(20);
    rows[14] = std::array::from_fn(|i| 20 + (i * i) as u16 % 40);
    let run = |policy: &str| {
        let policy = format!("--training.spike_policy={policy}");
        let flags = [
            "--training.steps=20",
            "--optimizer.lr=1e-2",
            "--training.spike_window=4",
            "--training.spike_z_score=4",
            &policy,
        ];
        let job = job(&rows, &flags, |_| ());
        let ended = job.run();
        ended.assert_succeeded();
        (ended.log, job.losses())
    };
    let ((off, losses), (log, logged), (skip, skipped)) = (run("off"), run("log"), run("skip"));
    assert!(!off.contains("standard deviations"), "{off}");
    assert!(log.contains("step 15: the loss of ") && !log.contains("is skipped"), "{log}");
    assert!(skip.contains("step 15 is skipped, 1 of at most 10: the loss of "), "{skip}");
    assert_eq!(losses, logged);
    // The step that is skipped is logged as any other, and leaves no trace in the next.
    assert_eq!(losses[..15], skipped[..15]);
    assert!(losses[15].1 != skipped[15].1, "{losses:?}");
    held("a loss spike: logged or skipped as training.spike_policy says", "3 of 3");
}

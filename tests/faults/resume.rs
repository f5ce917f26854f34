//! Runs that go on elsewhere, otherwise, or twice at once.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use crate::binary::repo;
use crate::common::{Ended, Job, Run, amount, files, held};

#[test]
fn data_that_changed_since_the_checkpoint_is_named() {
    let job = Job::new(&["--training.steps=2"]);
    job.run().assert_succeeded();
    let path = job.folder().join("words.txt");
    let text = fs::read_to_string(&path).unwrap();
    let run = Continued(job);
    let go_on = |steps: usize| {
        let ended = run.with(&[&format!("--training.steps={steps}")]);
        ended.assert_succeeded();
        ended.log
    };
    // Written again as it was: the same data.
    fs::write(&path, &text).unwrap();
    assert!(!go_on(3).contains("words.txt"));
    fs::write(&path, text.replacen("owl", "cat", 1)).unwrap();
    let log = go_on(4);
    assert!(log.contains("WARN data file words.txt has other contents: the run goes on, but on other tokens"), "{log}");
    fs::write(&path, text.clone() + &text).unwrap();
    let log = go_on(5);
    assert!(log.contains("WARN data file words.txt had ") && log.contains("now it has"), "{log}");
    held("data changed since the checkpoint: warned, by name", "2 of 2");
}

#[test]
fn of_two_runs_in_one_folder_one_trains_and_the_other_says_who_does() {
    let times = amount(3, 30);
    for _ in 0..times {
        let job = Job::new(&["--training.steps=100000", "--checkpoint.interval=100000"]);
        let start = |log: &str| Run::start(job.command(), &job.folder().join(log));
        let mut runs = vec![start("log-0"), start("log-1")];
        let pids: Vec<u32> = runs.iter().map(|run| run.id()).collect();
        let (loser, ended) = loop {
            if let Some(found) = runs.iter_mut().position(|run| run.has_ended()) {
                break (found, runs.remove(found).wait());
            }
            sleep(Duration::from_millis(5));
        };
        let words = format!("is in use by process {} on ", pids[1 - loser]);
        assert!(ended.code == Some(1) && ended.log.contains(&words) && ended.log.contains(" since "), "{}", ended.log);
        assert_eq!(ended.first_step(), None);
        let mut winner = runs.remove(0);
        winner.wait_for("step:  2");
        winner.signal("KILL");
        assert_eq!(winner.wait().first_step(), Some(1));
    }
    held("two processes in one dump folder: one trains, the other names it", format_args!("{times} of {times}"));
}

/// A job that has trained two steps, and how it goes on under these flags.
struct Continued(Job);

impl Continued {
    fn new() -> Self {
        let job = Job::new(&["--training.steps=2"]);
        job.run().assert_succeeded();
        Self(job)
    }

    fn with(&self, flags: &[&str]) -> Ended {
        let mut command = self.0.command();
        command.args(flags);
        Run::start(command, &self.0.folder().join("log")).wait()
    }
}

#[test]
fn what_may_change_in_a_run_that_goes_on_is_logged_with_what_it_means() {
    const OTHER: &str = ": the run goes on, no longer bit for bit as without that change";
    let changes = [
        ("--optimizer.lr=1e-4", "optimizer.lr: 0.0008 -> 0.0001", OTHER),
        ("--optimizer.weight_decay=0.2", "optimizer.weight_decay: 0.1 -> 0.2", OTHER),
        ("--lr_scheduler.decay_type=cosine", "lr_scheduler.decay_type: \"linear\" -> \"cosine\"", OTHER),
        ("--training.local_batch_size=2", "training.local_batch_size: 1 -> 2", OTHER),
        ("--training.global_batch_size=4", "training.global_batch_size: -1 -> 4", OTHER),
        ("--training.seq_len=8", "training.seq_len: 16 -> 8", OTHER),
        (
            "--training.mixed_precision_param=float32",
            "training.mixed_precision_param: \"bfloat16\" -> \"float32\"",
            OTHER,
        ),
        ("--training.dtype=bfloat16", "training.dtype: \"float32\" -> \"bfloat16\"", OTHER),
        ("--activation_checkpoint.mode=full", "activation_checkpoint.mode: \"selective\" -> \"full\"", ""),
        ("--metrics.log_freq=5", "metrics.log_freq: 1 -> 5", ""),
        ("--checkpoint.interval=3", "checkpoint.interval: 2 -> 3", ""),
        ("--validation.freq=7", "validation.freq: 10 -> 7", ""),
    ];
    for (flag, change, effect) in changes {
        let ended = Continued::new().with(&[flag, "--training.steps=4"]);
        ended.assert_succeeded();
        assert_eq!(ended.first_step(), Some(3));
        let line = format!("changed since the checkpoint: {change}{effect}\n");
        assert!(ended.log.contains(&line), "{line} is not in\n{}", ended.log);
        // The learning rate falls over all the steps that there are.
        assert!(ended.log.contains(&format!("training.steps: 2 -> 4{OTHER}\n")), "{}", ended.log);
    }

    let constant = ["--lr_scheduler.warmup_steps=0", "--lr_scheduler.decay_ratio=0"];
    let job = Job::new(&[&constant[..], &["--training.steps=2"]].concat());
    job.run().assert_succeeded();
    let ended = Continued(job).with(&["--training.steps=4"]);
    assert!(ended.log.contains("training.steps: 2 -> 4\n"), "{}", ended.log);
    held(
        "resumed with another config: allowed, logged by key, with what it means",
        format_args!("{0} of {0}", changes.len() + 1),
    );
}

#[test]
fn what_cannot_change_in_a_run_that_goes_on_is_refused_by_key() {
    let run = Continued::new();
    let another = run.0.folder().join("tokenizer");
    fs::create_dir(&another).unwrap();
    for entry in fs::read_dir(repo("assets/tokenizer")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, another.join(path.file_name().unwrap())).unwrap();
    }
    let config = another.join("tokenizer_config.json");
    fs::write(&config, fs::read_to_string(&config).unwrap() + "\n").unwrap();

    let before = files(&run.0.checkpoints());
    let changes = [
        ("--model.args.dim=32", "model.args.dim: 16 -> 32"),
        ("--model.args.n_layers=2", "model.args.n_layers: 1 -> 2"),
        ("--model.args.rope_theta=1e6", "model.args.rope_theta: 500000.0 -> 1000000.0"),
        ("--optimizer.name=Adam", "optimizer.name: \"AdamW\" -> \"Adam\""),
        ("--model.hf_assets_path=tokenizer", "tokenizer_config.json is not the one that it began with"),
    ];
    for (flag, change) in changes {
        let ended = run.with(&[flag, "--training.steps=4"]);
        assert_eq!(ended.code, Some(2), "{flag}\n{}", ended.log);
        let key = &flag[..flag.find('=').unwrap()];
        for words in [change, key, "checkpoint.initial_load_path = \"", "step-2\""] {
            assert!(ended.log.contains(words), "{flag}: {words:?} is not in\n{}", ended.log);
        }
        assert!(files(&run.0.checkpoints()) == before, "{flag}");
    }
    // The same tokenizer elsewhere is the same; and so is what the optimizer is told to forget.
    let same = repo("assets/./tokenizer");
    run.with(&["--model.hf_assets_path", same.to_str().unwrap(), "--training.steps=3"]).assert_succeeded();
    run.with(&["--optimizer.name=Adam", "--checkpoint.exclude_from_loading=optimizer", "--training.steps=4"])
        .assert_succeeded();
    held(
        "resumed with another model, tokenizer or optimizer: refused by key",
        format_args!("{0} of {0}", changes.len()),
    );
}

#[test]
fn the_data_position_in_a_checkpoint_is_small_whatever_the_data() {
    let texts = Job::new(&["--training.dataset_path=texts"]);
    fs::create_dir(texts.folder().join("texts")).unwrap();
    for i in 0..2000 {
        fs::write(texts.folder().join(format!("texts/a file with a long name {i:05}.txt")), "once upon a time")
            .unwrap();
    }
    let chat = Job::new(&["--training.dataset=chat", "--training.dataset_path=*.jsonl", "--training.seq_len=64"]);
    for file in ["a.jsonl", "b.jsonl"] {
        let line =
            r#"{"messages": [{"role": "user", "content": "who sang"}, {"role": "assistant", "content": "an owl"}]}"#;
        fs::write(chat.folder().join(file), format!("{line}\n").repeat(500)).unwrap();
    }
    let mut largest = 0;
    for job in [texts, chat] {
        job.run().assert_succeeded();
        let state = fs::read(job.step(6).join("train_state.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&state).unwrap();
        assert!(json["dataloader"]["file"].is_string() && json["dataloader"]["position"]["offset"].is_u64(), "{json}");
        largest = largest.max(state.len());
    }
    assert!(largest < 64 << 10, "{largest} bytes");
    held("data position in a checkpoint: under 64 KiB", format_args!("at most {:.1} KiB", largest as f64 / 1024.0));
}

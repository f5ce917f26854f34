//! The checkpoint manager as a trainer drives it: what is saved when, what is found, and what damage does.

use std::cell::RefCell;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use serde_json::json;
use titan::Error;
use titan::components::checkpoint::{
    Assets, CheckpointManager, Kind, Parameter, Progress, Resume, State, TrainState, Weights, Why, open_step, steps_in,
};
use titan::config::{self, AsyncMode, CheckpointState, ExportDtype};
use titan::models::Decoder;
use titan::models::args::DecoderArgs;

/// A dump folder, and a run in it whose weights are made of its step.
struct Run {
    dump_folder: tempfile::TempDir,
    settings: config::Checkpoint,
}

impl Run {
    fn new() -> Self {
        let settings = config::Checkpoint { enable: true, interval: 10, ..Default::default() };
        Self { dump_folder: tempfile::tempdir().unwrap(), settings }
    }

    fn with(change: impl Fn(&mut config::Checkpoint)) -> Self {
        let mut run = Self::new();
        change(&mut run.settings);
        run
    }

    fn folder(&self) -> PathBuf {
        self.dump_folder.path().join("checkpoint")
    }

    fn path(&self, step: usize) -> PathBuf {
        self.folder().join(format!("step-{step}"))
    }

    fn open(&self) -> CheckpointManager {
        self.try_open().unwrap()
    }

    fn try_open(&self) -> titan::Result<CheckpointManager> {
        let assets = Assets {
            hf_assets_path: "nowhere".into(),
            model_name: "llama3".into(),
            args: args(),
            config_toml: "[model]\nname = \"llama3\"\n".into(),
            tokenizer_files: vec![("tokenizer.json".into(), b"{}".to_vec())],
            bos_id: Some(1),
            eos_id: Some(2),
        };
        CheckpointManager::open(self.settings.clone(), self.dump_folder.path(), assets)
    }

    /// Saves these steps and ends.
    fn saved(self, steps: &[usize]) -> Self {
        let mut manager = self.open();
        for step in steps {
            save(&mut manager, *step, Why::Interval);
        }
        drop(manager);
        self
    }

    fn found(&self) -> Option<Resume> {
        self.open().find().unwrap()
    }

    fn refusal(&self) -> String {
        match self.open().find() {
            Err(error @ (Error::Checkpoint(_) | Error::Model(_))) => error.to_string(),
            Err(error) => panic!("another error: {error}"),
            Ok(_) => panic!("not refused"),
        }
    }
}

fn save(manager: &mut CheckpointManager, step: usize, why: Why) {
    let weights = model(step);
    let tensor = |name: &str| (name.to_owned(), weights[0].1.clone());
    let progress = progress(step);
    let optimizer = [tensor("exp_avg.tok_embeddings.weight"), tensor("exp_avg_sq.tok_embeddings.weight")];
    let state = State { model: &weights, optimizer: &optimizer, progress: &progress };
    let path = manager.save(step, why, &state).unwrap().unwrap();
    assert!(path.ends_with(format!("step-{step}")));
}

fn progress(step: usize) -> Progress {
    Progress {
        train_state: TrainState { step, n_tokens_seen: 100 * step as u64, seed: 7 },
        lr_scheduler: json!({ "last_step": step }),
        dataloader: json!({ "document": 3 * step }),
        optimizer_steps: step as u64,
        loss_guard: json!(null),
    }
}

fn model(step: usize) -> Vec<(String, Tensor)> {
    let filled = |shape: &[usize]| Tensor::full(step as f32 + 0.1, shape, &Device::Cpu).unwrap();
    let shapes = Decoder::new(&args(), None).unwrap().state_shapes();
    shapes.into_iter().map(|(name, shape)| (name, filled(&shape))).collect()
}

fn args() -> DecoderArgs {
    DecoderArgs { dim: 4, n_layers: 1, n_heads: 1, hidden_dim: Some(2), vocab_size: 3, ..Default::default() }
}

fn shapes(model: &[(String, Tensor)]) -> Vec<Parameter> {
    model.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect()
}

fn load(weights: &Weights, expected: &[Parameter]) -> titan::Result<Vec<(String, Tensor)>> {
    let mut loaded = Vec::new();
    weights.load(expected, |name, tensor| {
        loaded.push((name.to_owned(), tensor));
        Ok(())
    })?;
    Ok(loaded)
}

fn values(tensors: &[(String, Tensor)]) -> Vec<(String, Vec<f32>)> {
    let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap();
    tensors.iter().map(|(name, tensor)| (name.clone(), flat(tensor))).collect()
}

/// The step of the weights that were found.
fn step_of_weights(resume: &Resume) -> usize {
    let loaded = load(resume.model.as_ref().unwrap(), &shapes(&model(0))).unwrap();
    let step = values(&loaded)[0].1[0] as usize;
    assert_eq!(values(&loaded), values(&model(step)), "bit for bit");
    step
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

thread_local! {
    static LOG: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What `act` writes to the log on this thread.
fn logged<T>(act: impl FnOnce() -> T) -> (T, String) {
    struct Log;
    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            LOG.with_borrow_mut(|log| log.write(bytes))
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    static SUBSCRIBER: Once = Once::new();
    SUBSCRIBER.call_once(|| tracing_subscriber::fmt().with_ansi(false).with_writer(|| Log).init());
    LOG.take();
    let result = act();
    (result, String::from_utf8(LOG.take()).unwrap())
}

#[test]
fn everything_that_is_saved_comes_back() {
    let run = Run::new().saved(&[20]);
    assert_eq!(
        names(&run.path(20)),
        ["config.toml", "manifest.json", "model.safetensors", "optimizer.safetensors", "tokenizer", "train_state.json"]
    );
    let resume = run.found().unwrap();
    assert_eq!((resume.step(), step_of_weights(&resume)), (20, 20));
    let moments = ["exp_avg.tok_embeddings.weight", "exp_avg_sq.tok_embeddings.weight"].map(|n| (n.into(), vec![3, 4]));
    let optimizer = load(resume.optimizer.as_ref().unwrap(), &moments).unwrap();
    assert!(values(&optimizer).iter().all(|(_, values)| values == &[20.1; 12]));
    assert_eq!(resume.train_state, Some(TrainState { step: 20, n_tokens_seen: 2000, seed: 7 }));
    assert_eq!(resume.lr_scheduler, Some(json!({ "last_step": 20 })));
    assert_eq!(resume.dataloader, Some(json!({ "document": 60 })));
}

#[test]
fn a_new_run_finds_nothing_and_a_disabled_one_does_not_look() {
    assert!(Run::new().found().is_none());
    let mut run = Run::new().saved(&[10]);
    run.settings.enable = false;
    assert!(run.found().is_none());
    assert_eq!(run.open().due(10, 10), None);
}

#[test]
fn saving_is_due_at_intervals_at_the_last_step_and_on_wish_at_the_first() {
    let due = |run: &Run| {
        let manager = run.open();
        (1..=25).filter_map(|step| Some((step, manager.due(step, 25)?))).collect::<Vec<_>>()
    };
    assert_eq!(due(&Run::new()), [(10, Why::Interval), (20, Why::Interval), (25, Why::Last)]);
    let first = Run::with(|settings| settings.enable_first_step_checkpoint = true);
    assert_eq!(due(&first)[0], (1, Why::First));
}

#[test]
fn load_only_loads_and_never_writes() {
    let mut run = Run::new().saved(&[10]);
    run.settings.load_only = true;
    let before = names(&run.folder());
    let mut manager = run.open();
    assert_eq!(manager.find().unwrap().unwrap().step(), 10);
    assert_eq!(manager.due(20, 20), None);
    let progress = progress(20);
    let state = State { model: &model(20), optimizer: &[], progress: &progress };
    assert_eq!(manager.save(20, Why::Interrupt, &state).unwrap(), None);
    assert_eq!(names(&run.folder()), before);
}

#[test]
fn the_newest_k_steps_stay_and_look_alikes_are_left_alone() {
    let run = Run::with(|settings| settings.keep_latest_k = 2);
    let look_alikes = ["old-step-9-backup", "step-010", "step-10.bak", "step-5"];
    for name in look_alikes {
        fs::create_dir_all(run.folder().join(name)).unwrap();
    }
    let run = run.saved(&[10, 20, 30]);
    assert_eq!(names(&run.folder()), ["old-step-9-backup", "step-010", "step-10.bak", "step-20", "step-30", "step-5"]);
}

#[test]
fn the_step_just_saved_stays_even_where_higher_ones_exist() {
    let mut run = Run::new().saved(&[10, 20, 30]);
    run.settings.keep_latest_k = 2;
    let run = run.saved(&[15]);
    assert_eq!(steps_in(&run.folder()).unwrap(), [15, 30]);
}

#[test]
fn keep_latest_k_of_zero_keeps_all() {
    let run = Run::with(|settings| settings.keep_latest_k = 0).saved(&[1, 2, 3, 4]);
    assert_eq!(steps_in(&run.folder()).unwrap(), [1, 2, 3, 4]);
}

#[test]
fn a_step_that_is_being_read_is_not_removed() {
    let mut run = Run::new().saved(&[10, 20]);
    run.settings.keep_latest_k = 2;
    let reading = open_step("step-10", run.dump_folder.path(), "checkpoint").unwrap();
    let run = run.saved(&[30]);
    assert_eq!(steps_in(&run.folder()).unwrap(), [10, 20, 30]);
    drop(reading);
    let run = run.saved(&[40]);
    assert_eq!(steps_in(&run.folder()).unwrap(), [30, 40]);
}

#[test]
fn leftovers_of_a_save_that_died_are_removed_at_start_and_never_loaded() {
    let run = Run::new().saved(&[10]);
    let leftover = run.folder().join(".tmp-step-20");
    fs::create_dir(&leftover).unwrap();
    fs::write(leftover.join("model.safetensors"), b"half of it").unwrap();
    assert_eq!(run.found().unwrap().step(), 10);
    assert!(!leftover.exists());
}

#[test]
fn a_damaged_newest_step_is_named_and_the_one_before_is_loaded() {
    let model = |run: &Run| run.path(20).join("model.safetensors");
    let flip = |run: &Run| {
        let mut bytes = fs::read(model(run)).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(model(run), bytes).unwrap();
    };
    type Case<'a> = (&'a dyn Fn(&Run), &'a str);
    let cases: [Case; 7] = [
        (&flip, "model.safetensors has changed"),
        (&|run| fs::write(model(run), b"").unwrap(), "model.safetensors has 0 bytes instead of"),
        (&|run| fs::remove_file(run.path(20).join("train_state.json")).unwrap(), "train_state.json is missing"),
        (
            &|run| fs::remove_file(run.path(20).join("tokenizer/tokenizer.json")).unwrap(),
            "tokenizer/tokenizer.json is missing",
        ),
        (&|run| fs::remove_file(run.path(20).join("manifest.json")).unwrap(), "manifest.json: No such file"),
        (&|run| fs::write(run.path(20).join("extra"), b"").unwrap(), "extra is not in manifest.json"),
        (
            &|run| {
                fs::remove_dir_all(run.path(20)).unwrap();
                fs::rename(run.path(5), run.path(20)).unwrap();
            },
            "manifest.json is that of step-5, not of step-20",
        ),
    ];
    for (damage, words) in cases {
        let run = Run::new().saved(&[5, 10, 20]);
        damage(&run);
        let (resume, log) = logged(|| run.found().unwrap());
        assert_eq!((resume.step(), step_of_weights(&resume)), (10, 10), "{words}");
        assert!(log.contains("WARN") && log.contains("step-20 cannot be used: ") && log.contains(words), "{log}");
        assert!(log.contains("step-10 instead"), "{log}");
    }
}

#[test]
fn training_past_a_damaged_step_replaces_it() {
    let run = Run::new().saved(&[10, 20]);
    fs::remove_file(run.path(20).join("model.safetensors")).unwrap();
    let mut manager = run.open();
    assert_eq!(manager.find().unwrap().unwrap().step(), 10);
    save(&mut manager, 20, Why::Interval);
    drop(manager);
    assert_eq!(step_of_weights(&run.found().unwrap()), 20);
    assert_eq!(names(&run.folder()), ["step-10", "step-20"]);
}

#[test]
fn where_no_checkpoint_loads_the_run_stops_and_deletes_nothing() {
    let run = Run::new().saved(&[10, 20]);
    for step in [10, 20] {
        fs::remove_file(run.path(step).join("model.safetensors")).unwrap();
    }
    let message = run.refusal();
    for words in ["nothing was deleted", "step-10: model.safetensors is missing", "step-20: ", "job.dump_folder"] {
        assert!(message.contains(words), "{message}");
    }
    assert_eq!(steps_in(&run.folder()).unwrap(), [10, 20]);
}

#[test]
fn load_step_loads_that_step_or_says_what_there_is() {
    let mut run = Run::new().saved(&[10, 20, 30]);
    run.settings.load_step = Some(20);
    assert_eq!(step_of_weights(&run.found().unwrap()), 20);
    run.settings.load_step = Some(15);
    let message = run.refusal();
    assert!(
        message.contains("checkpoint.load_step = 15") && message.contains("step-10, step-20, step-30"),
        "{message}"
    );
    run.settings.load_step = Some(20);
    fs::remove_file(run.path(20).join("train_state.json")).unwrap();
    assert!(run.refusal().contains("step-20 cannot be used: train_state.json is missing"));
}

#[test]
fn a_second_process_is_kept_out_of_the_dump_folder() {
    let run = Run::new();
    let first = run.open();
    let message = run.try_open().err().unwrap().to_string();
    assert!(message.contains(&format!("in use by process {}", std::process::id())), "{message}");
    drop(first);
    run.open();
}

#[test]
fn parts_excluded_from_loading_start_afresh() {
    let mut run = Run::new().saved(&[10]);
    run.settings.exclude_from_loading = vec![CheckpointState::Dataloader, CheckpointState::Optimizer];
    let resume = run.found().unwrap();
    assert!(resume.dataloader.is_none() && resume.optimizer.is_none());
    assert!(resume.model.is_some() && resume.lr_scheduler.is_some() && resume.step() == 10);

    run.settings.exclude_from_loading = vec![CheckpointState::TrainState];
    let mut manager = run.open();
    assert_eq!(manager.find().unwrap().unwrap().step(), 0);
    save(&mut manager, 10, Why::Interval);
    drop(manager);
}

#[test]
fn a_seed_checkpoint_gives_weights_only() {
    let run = Run::new();
    save(&mut run.open(), 0, Why::Seed);
    let resume = run.found().unwrap();
    assert_eq!((step_of_weights(&resume), resume.step()), (0, 0));
    assert!(resume.optimizer.is_none() && resume.dataloader.is_none());
}

#[test]
fn own_checkpoints_win_over_the_initial_ones() {
    let other = Run::new().saved(&[40]);
    let run = Run::with(|settings| settings.initial_load_path = Some(other.path(40)));
    let resume = run.found().unwrap();
    assert_eq!((step_of_weights(&resume), resume.step()), (40, 0));
    assert!(resume.optimizer.is_none() && resume.dataloader.is_none());

    let run = run.saved(&[10]);
    assert_eq!(step_of_weights(&run.found().unwrap()), 10);
}

#[test]
fn an_initial_checkpoint_gives_everything_if_asked() {
    let other = Run::new().saved(&[40]);
    let mut run = Run::with(|settings| {
        settings.initial_load_path = Some(other.path(40));
        settings.initial_load_model_only = false;
    });
    let resume = run.found().unwrap();
    assert_eq!((resume.step(), resume.optimizer.is_some()), (40, true));

    let weights = other.path(40).join("model.safetensors");
    run.settings.initial_load_path = Some(weights.clone());
    assert!(run.refusal().contains("holds weights only"));
    run.settings.initial_load_model_only = true;
    assert_eq!(step_of_weights(&run.found().unwrap()), 40, "a file alone");
    run.settings.initial_load_path = Some(other.folder());
    assert!(run.refusal().contains("name one step; "));
    run.settings.initial_load_path = Some("no/such/folder".into());
    assert_eq!(run.refusal(), "checkpoint.initial_load_path: there is no no/such/folder");
    fs::write(other.path(40).join("config.toml"), b"").unwrap();
    run.settings.initial_load_path = Some(other.path(40));
    assert!(run.refusal().contains("config.toml has 0 bytes"));
}

#[test]
fn weights_that_do_not_fit_are_listed_all_at_once() {
    let run = Run::new().saved(&[10]);
    let weights = run.found().unwrap().model.unwrap();
    let expected: Vec<Parameter> = vec![
        ("tok_embeddings.weight".into(), vec![5, 4]),
        ("norm.weight".into(), vec![4]),
        ("layers.1.attention.wq.weight".into(), vec![4, 4]),
    ];
    let message = load(&weights, &expected).unwrap_err().to_string();
    for words in [
        "missing: layers.1.attention.wq.weight",
        "tok_embeddings.weight: shape [3, 4], the model's is [5, 4]",
        "not of this model: output.weight",
        "compare model.name, model.flavor and [model.args]",
    ] {
        assert!(message.contains(words), "{message}");
    }
    assert!(!message.contains("norm.weight:"), "{message}");
}

#[test]
fn an_absent_expert_bias_is_zeros_and_buffers_are_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    let tensor = |n: usize| Tensor::ones(n, DType::F32, &Device::Cpu).unwrap();
    let stored = [("norm.weight", 4), ("freqs_cis", 8), ("layers.1.moe.tokens_per_expert", 2)];
    candle_core::safetensors::save(&stored.map(|(name, n)| (name, tensor(n))).into(), &path).unwrap();
    let expected = vec![("norm.weight".to_owned(), vec![4]), ("layers.1.moe.expert_bias".to_owned(), vec![2])];
    let (loaded, log) = logged(|| load(&Weights::open(&path).unwrap(), &expected).unwrap());
    let mut loaded = values(&loaded);
    loaded.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(loaded, [("layers.1.moe.expert_bias".into(), vec![0.0; 2]), ("norm.weight".into(), vec![1.0; 4])]);
    assert!(log.contains("has no expert_bias"), "{log}");
}

#[test]
fn the_last_step_can_be_resumed_and_its_export_stands_beside_it() {
    let mut run = Run::with(|settings| settings.export_dtype = ExportDtype::Bfloat16);
    save(&mut run.open(), 25, Why::Last);
    assert_eq!(names(&run.folder()), ["step-25", "step-25-bfloat16"]);
    assert_eq!(run.found().unwrap().step(), 25);

    let export = run.folder().join("step-25-bfloat16");
    let opened = open_step(export.to_str().unwrap(), run.dump_folder.path(), "checkpoint").unwrap();
    assert_eq!((opened.kind(), opened.step()), (Kind::ModelOnly, 25));
    let loaded = load(&opened.model().unwrap(), &shapes(&model(0))).unwrap();
    assert!(loaded.iter().all(|(_, tensor)| tensor.dtype() == DType::BF16));
    drop(opened);

    // As the last step of a run that was already done: nothing to save, but the export that is asked for now.
    run.settings.last_save_in_hf = true;
    let mut manager = run.open();
    manager.find().unwrap();
    let before = fs::metadata(run.path(25).join("manifest.json")).unwrap().modified().unwrap();
    save(&mut manager, 25, Why::Last);
    assert_eq!(fs::metadata(run.path(25).join("manifest.json")).unwrap().modified().unwrap(), before);
    assert_eq!(
        names(&run.folder().join("step-25-hf")),
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    );
}

#[test]
fn no_second_copy_is_written_where_the_step_is_already_the_export() {
    let run = Run::new();
    let ((), log) = logged(|| save(&mut run.open(), 25, Why::Last));
    assert_eq!(names(&run.folder()), ["step-25"]);
    assert!(log.contains("The model alone, in float32, is step-25/model.safetensors"), "{log}");
}

#[test]
fn a_save_that_fails_is_not_announced_and_says_where() {
    let run = Run::new();
    let mut manager = run.open();
    let ((), log) = logged(|| save(&mut manager, 10, Why::Interval));
    assert!(log.contains("Finished saving the checkpoint in "), "{log}");

    fs::remove_dir_all(run.folder()).unwrap();
    let progress = progress(20);
    let state = State { model: &model(20), optimizer: &[], progress: &progress };
    let (result, log) = logged(|| manager.save(20, Why::Interval, &state));
    assert!(result.unwrap_err().to_string().contains(".tmp-step-20: create: "));
    assert!(!log.contains("Finished saving"), "{log}");
}

#[test]
fn a_save_in_the_background_holds_the_state_as_it_was_when_it_began() {
    let run = Run::with(|settings| settings.async_mode = AsyncMode::Async);
    let mut manager = run.open();
    let weights = model(10);
    for step in [10, 20] {
        let now = model(step);
        weights.iter().zip(&now).for_each(|((_, tensor), (_, now))| tensor.slice_set(now, 0, 0).unwrap());
        let progress = progress(step);
        let state = State { model: &weights, optimizer: &[], progress: &progress };
        manager.save(step, Why::Interval, &state).unwrap();
        // Training goes on.
        weights.iter().for_each(|(_, tensor)| tensor.zero_set().unwrap());
    }
    drop(manager);
    assert_eq!(steps_in(&run.folder()).unwrap(), [10, 20]);
    assert_eq!(step_of_weights(&run.found().unwrap()), 20);
    fs::remove_dir_all(run.path(20)).unwrap();
    assert_eq!(step_of_weights(&run.found().unwrap()), 10);
}

#[test]
fn a_fault_in_the_background_stops_the_run_at_its_next_step() {
    let run = Run::with(|settings| settings.async_mode = AsyncMode::Async);
    let mut manager = run.open();
    fs::remove_dir_all(run.folder()).unwrap();
    let progress = progress(20);
    let state = State { model: &model(20), optimizer: &[], progress: &progress };
    let begun = |manager: &mut CheckpointManager, why| manager.save(20, why, &state);
    begun(&mut manager, Why::Interval).unwrap();
    let start = Instant::now();
    let error = loop {
        match manager.check() {
            Err(error) => break error,
            Ok(()) => assert!(start.elapsed() < Duration::from_secs(60), "no fault is found"),
        }
    };
    assert!(error.to_string().contains(".tmp-step-20: create: "), "{error}");
    manager.check().expect("an error is told once");

    // The next save, should it come first, does not begin; the last one is tried in any case.
    begun(&mut manager, Why::Interval).unwrap();
    assert!(begun(&mut manager, Why::Interval).is_err());
    begun(&mut manager, Why::Interval).unwrap();
    fs::create_dir_all(run.folder()).unwrap();
    begun(&mut manager, Why::Interrupt).unwrap();
    drop(manager);
    assert_eq!(step_of_weights(&run.found().unwrap()), 20);
}

#[test]
fn generate_finds_checkpoints_by_folder_by_name_and_the_latest() {
    let run = Run::new().saved(&[10, 20]);
    let open = |name: &str| open_step(name, run.dump_folder.path(), "checkpoint");
    assert_eq!(open("step-10").unwrap().step(), 10);
    assert_eq!(open("latest").unwrap().step(), 20);
    let by_path = open(run.path(10).to_str().unwrap()).unwrap();
    assert_eq!(by_path.config_toml().unwrap(), "[model]\nname = \"llama3\"\n");
    assert_eq!(by_path.tokenizer_files().unwrap(), [("tokenizer.json".to_owned(), b"{}".to_vec())]);

    for (name, words) in
        [("step-15", "there is no checkpoint `step-15`"), (run.folder().to_str().unwrap(), "is no checkpoint")]
    {
        let message = open(name).unwrap_err().to_string();
        assert!(message.contains(words) && message.contains("holds step-10, step-20"), "{message}");
    }
    let empty = tempfile::tempdir().unwrap();
    let message = open_step("latest", empty.path(), "checkpoint").unwrap_err().to_string();
    assert!(message.contains("holds no checkpoints"), "{message}");

    fs::write(run.path(20).join("model.safetensors"), b"").unwrap();
    assert_eq!(open("latest").unwrap().step(), 10);
    assert!(open("step-20").unwrap_err().to_string().contains("step-20 cannot be used: model.safetensors has 0 bytes"));
}

#[test]
fn weights_stay_readable_when_their_folder_goes() {
    let run = Run::new().saved(&[10]);
    let resume = run.found().unwrap();
    fs::remove_dir_all(run.path(10)).unwrap();
    assert_eq!(step_of_weights(&resume), 10);
}

//! What saving costs a step: the debug model of the README, on random tokens, saved every ten steps in each way there is.
//!
//! `cargo bench --bench saving -- [--rounds 15]`. The ways take turns, so that whatever else the machine does meets all of
//! them; figures are medians over the rounds, and ratios to the round's own steps without saves. Processor time counts all
//! threads: what saving would cost if steps left no processor idle.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use clap::Parser;
use rand::Rng;
use titan::autograd::Precision;
use titan::components::checkpoint::{Assets, CheckpointManager, Progress, State, TrainState, Why};
use titan::components::optimizer::Optimizer;
use titan::config::{self, AsyncMode};
use titan::engine::{self, MicroBatch, Recompute, Stages};
use titan::models::{self, Decoder};
use titan::ops::{Adam, StepRules};
use titan::tools::{memory, random};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Steps from one save to the next.
const INTERVAL: usize = 10;
const WAYS: [(&str, Option<AsyncMode>); 3] =
    [("no saves", None), ("in the background", Some(AsyncMode::Async)), ("waited for", Some(AsyncMode::Disabled))];

/// The cost of saving, beside steps without.
#[derive(Parser)]
struct Options {
    /// Each has ten steps of every way.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Rows of 256 tokens in a step.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// What `cargo bench` passes. Without it, a round shows that the bench runs.
    #[arg(long, hide = true)]
    bench: bool,
    /// What `cargo bench NAME` passes to every bench.
    #[arg(hide = true)]
    names: Vec<String>,
}

fn main() -> ExitCode {
    memory::keep_freed_pages();
    let options = Options::parse();
    if !options.names.is_empty() && !options.names.iter().any(|name| "saving".contains(name)) {
        return ExitCode::SUCCESS;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut run = Run::new(options.batch as usize);
    let mut managers = WAYS.map(|(name, mode)| mode.map(|mode| manager(&folder.path().join(name), mode)));
    let mut times: [Vec<[f64; 2]>; 3] = Default::default();
    // Memory is taken in the first round, which does not count.
    for round in 0..=if options.bench { options.rounds } else { 0 } {
        for (manager, times) in managers.iter_mut().zip(&mut times) {
            let (start, cpu_start_s) = (Instant::now(), cpu_s());
            run.train_interval(manager.as_mut());
            if round > 0 || !options.bench {
                times.push([start.elapsed().as_secs_f64(), cpu_s() - cpu_start_s]);
            }
        }
    }
    println!("{} of state, a save every {INTERVAL} steps", indicatif::HumanBytes(run.state_bytes()));
    for ((name, _), way) in WAYS.iter().zip(&times) {
        print!("{name:<18}");
        for (which, what) in ["", " of processor time"].into_iter().enumerate() {
            let step_ms = way.iter().map(|times| 1e3 * times[which] / INTERVAL as f64).collect();
            let ratios = way.iter().zip(&times[0]).map(|(way, without)| way[which] / without[which]).collect();
            print!("{:9.1} ms per step{what} {:.3}", median(step_ms), median(ratios));
        }
        println!();
    }
    ExitCode::SUCCESS
}

fn manager(folder: &Path, async_mode: AsyncMode) -> CheckpointManager {
    let assets = Assets {
        hf_assets_path: Default::default(),
        model_name: "llama4".into(),
        args: Default::default(),
        config_toml: String::new(),
        tokenizer_files: Vec::new(),
        bos_id: None,
        eos_id: None,
    };
    let keys = config::Checkpoint { enable: true, async_mode, keep_latest_k: 2, ..Default::default() };
    CheckpointManager::open(keys, folder, assets).unwrap()
}

/// A model that trains on fresh tokens at each step.
struct Run {
    model: Decoder,
    optimizer: Optimizer,
    batch: usize,
    step: usize,
}

const SEQ_LEN: usize = 256;
/// Of the tokenizer that titan ships.
const VOCAB_SIZE: usize = 2048;

impl Run {
    fn new(batch: usize) -> Self {
        let mut args = models::flavor("llama4", "debugmodel").unwrap();
        (args.vocab_size, args.max_seq_len) = (VOCAB_SIZE, SEQ_LEN);
        let mut model = Decoder::new(&args, None).unwrap();
        let precision = Precision { storage: DType::F32, compute: DType::BF16 };
        model.allocate(precision, &Device::Cpu, true).unwrap();
        model.parameters().for_each(|parameter| models::initialize(parameter, 0).unwrap());
        let adam = Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true };
        let optimizer = Optimizer::new(adam, model.stages()).unwrap();
        Self { model, optimizer, batch, step: 0 }
    }

    /// Saves after the first step, and has the save end within the interval, as if the next were due.
    fn train_interval(&mut self, mut manager: Option<&mut CheckpointManager>) {
        self.train_step();
        let saved = self.step;
        if let Some(manager) = &mut manager {
            self.save(manager, saved, Why::Interval);
        }
        (1..INTERVAL).for_each(|_| self.train_step());
        if let Some(manager) = manager {
            self.save(manager, saved, Why::Interrupt);
        }
    }

    fn train_step(&mut self) {
        self.step += 1;
        let mut ids = random::keyed(self.step as u64, "tokens", "saving");
        let mut row = || (0..=SEQ_LEN).map(|_| ids.random_range(0..VOCAB_SIZE as u32)).collect();
        let rows: Vec<Vec<u32>> = (0..self.batch).map(|_| row()).collect();
        let rows = Tensor::new(rows, &Device::Cpu).unwrap();
        let window = |start| rows.narrow(1, start, SEQ_LEN).unwrap().contiguous().unwrap();
        let batch = MicroBatch::new(window(0), window(1));
        let loss = engine::forward_backward(&self.model, &batch, 1.0, Recompute::None).unwrap();
        self.model.expert_loads().values().for_each(|load| load.rebalance(true).unwrap());
        let rules = StepRules { lr: 1e-3, max_norm: 1.0, max_loss: f64::INFINITY };
        self.optimizer.step(self.model.stages(), &loss, &rules).unwrap();
    }

    fn save(&self, manager: &mut CheckpointManager, step: usize, why: Why) {
        let [model, optimizer] = self.state();
        let progress = Progress {
            train_state: TrainState { step, n_tokens_seen: 0, seed: 0 },
            lr_scheduler: Default::default(),
            dataloader: Default::default(),
            optimizer_steps: 0,
            loss_guard: serde_json::Value::Null,
        };
        let state = State { model: &model, optimizer: &optimizer, progress: &progress };
        manager.save(step, why, &state).unwrap();
    }

    fn state(&self) -> [Vec<(String, Tensor)>; 2] {
        [self.model.state().unwrap(), self.optimizer.state(self.model.stages()).unwrap()]
    }

    fn state_bytes(&self) -> u64 {
        let [model, optimizer] = self.state();
        let bytes = |(_, tensor): &(String, Tensor)| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
        model.iter().chain(&optimizer).map(bytes).sum()
    }
}

/// Processor time of this process so far.
fn cpu_s() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: memory for the answer.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

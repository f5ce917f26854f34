//! Whole optimizer steps of the cases in `cases.json`, on random tokens: forward, backward, clipping, AdamW.
//!
//! `cargo bench --bench train_step -- [--case A] [--param-dtype bfloat16] [--steps 10]`; `scripts/bench_compare.sh` sets
//! the figures beside PyTorch's. The floor of a step is the time that the model's FLOPs would take at the machine's peak,
//! which is measured in the same process: titan's own product of two square matrices.

use std::collections::BTreeMap;
use std::fmt;
use std::process::{Command, ExitCode};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, ValueEnum};
use rand::Rng;
use serde::{Deserialize, Serialize};
use titan::autograd::Precision;
use titan::components::optimizer::{Optimizer, OptimizerKind};
use titan::config::ModelArgs;
use titan::engine::{self, MicroBatch, Recompute, Stages};
use titan::models::{self, Decoder};
use titan::ops;
use titan::tools::device::{GIB, MemoryUse};
use titan::tools::{memory, random};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Whole optimizer steps on random tokens.
#[derive(Parser)]
struct Options {
    /// A case of `cases.json`. All, if not given.
    #[arg(long, overrides_with = "case")]
    case: Option<String>,
    /// Both, if not given.
    #[arg(long, overrides_with = "param_dtype")]
    param_dtype: Option<ParamDtype>,
    /// Which activations backward computes again. What the case says, if not given.
    #[arg(long)]
    recompute: Option<RecomputeMode>,
    /// Timed steps, after one that takes the memory.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// As many as there are cores, if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// A line of JSON for each run.
    #[arg(long)]
    json: bool,
    /// What `cargo bench` passes. Without it, as under `cargo test`, one step on few tokens shows that a case runs.
    #[arg(long, hide = true)]
    bench: bool,
    /// What `cargo bench NAME` passes to every bench.
    #[arg(hide = true)]
    names: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ParamDtype {
    Bfloat16,
    Float32,
}

#[derive(Clone, Copy, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum RecomputeMode {
    None,
    Full,
}

#[derive(Deserialize)]
struct Case {
    model: String,
    flavor: String,
    /// Over those of the flavor.
    args: ModelArgs,
    batch: usize,
    seq_len: usize,
    recompute: RecomputeMode,
}

/// What a run took.
#[derive(Serialize)]
struct Figures<'a> {
    program: &'a str,
    case: &'a str,
    way: &'a str,
    threads: usize,
    n_params: usize,
    /// The median.
    step_s: f64,
    tps: f64,
    flops_per_token: u64,
    peak_flops: f64,
    peak_mem_bytes: u64,
    first_loss: f32,
    last_loss: f32,
}

fn main() -> ExitCode {
    memory::keep_freed_pages();
    let options = Options::parse();
    if !options.names.is_empty() && !options.names.iter().any(|name| "train_step".contains(name)) {
        return ExitCode::SUCCESS;
    }
    let cases: BTreeMap<String, Case> = serde_json::from_str(include_str!("cases.json")).unwrap();
    let names: Vec<_> = cases.keys().filter(|name| options.case.as_ref().is_none_or(|case| case == *name)).collect();
    if names.is_empty() {
        let known = cases.keys().cloned().collect::<Vec<_>>().join(", ");
        Options::command().error(ErrorKind::InvalidValue, format!("no such case; there are {known}")).exit();
    }
    let dtypes = options.param_dtype.map_or(vec![ParamDtype::Bfloat16, ParamDtype::Float32], |dtype| vec![dtype]);
    if let ([name], [dtype]) = (&names[..], &dtypes[..]) {
        let figures = run(name, &cases[*name], *dtype, &options);
        match options.json {
            true => println!("{}", serde_json::to_string(&figures).unwrap()),
            false => println!("{figures}"),
        }
        return ExitCode::SUCCESS;
    }
    // Each in a process of its own: peak memory is that of a process.
    let runs = names.into_iter().flat_map(|name| dtypes.iter().map(move |dtype| (name, dtype)));
    let all_succeed = runs.into_iter().all(|(name, dtype)| {
        let dtype = dtype.to_possible_value().unwrap();
        let mut this = Command::new(std::env::current_exe().unwrap());
        this.args(std::env::args_os().skip(1)).args(["--case", name, "--param-dtype", dtype.get_name()]);
        this.status().unwrap().success()
    });
    ExitCode::from(u8::from(!all_succeed))
}

/// Trains on fresh tokens at each step.
fn run<'a>(name: &'a str, case: &Case, dtype: ParamDtype, options: &Options) -> Figures<'a> {
    if let Some(threads) = options.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().unwrap();
    }
    let (batch, seq_len, steps) = match options.bench {
        true => (case.batch, case.seq_len, 1 + options.steps as usize),
        false => (1, 64, 1),
    };
    let (way, compute) = match dtype {
        ParamDtype::Bfloat16 => ("bf16", DType::BF16),
        ParamDtype::Float32 => ("f32", DType::F32),
    };
    let precision = Precision { storage: DType::F32, compute };
    let recompute = match options.recompute.unwrap_or(case.recompute) {
        RecomputeMode::None => Recompute::None,
        RecomputeMode::Full => Recompute::All,
    };
    let peak_flops = ops::measured_peak_flops(precision.compute);

    let mut args = case.args.apply(&models::flavor(&case.model, &case.flavor).unwrap()).unwrap();
    args.max_seq_len = seq_len;
    let mut model = Decoder::new(&args, None).unwrap();
    model.allocate(precision, &Device::Cpu, true).unwrap();
    model.parameters().for_each(|parameter| models::initialize(parameter, 0).unwrap());
    let kind = OptimizerKind { decoupled: true, betas: (0.9, 0.95), eps: 1e-8 };
    let mut optimizer = Optimizer::new(kind, 0.1, model.stages()).unwrap();

    let mut ids = random::keyed(0, "tokens", name);
    let (mut losses, mut elapsed_s) = (Vec::new(), Vec::new());
    for _ in 0..steps {
        let mut row = || (0..=seq_len).map(|_| ids.random_range(0..args.vocab_size as u32)).collect();
        let rows: Vec<Vec<u32>> = (0..batch).map(|_| row()).collect();
        let rows = Tensor::new(rows, &Device::Cpu).unwrap();
        let window = |start| rows.narrow(1, start, seq_len).unwrap().contiguous().unwrap();
        let rows = MicroBatch::new(window(0), window(1));

        let start = Instant::now();
        let loss = engine::forward_backward(&model, &rows, 1.0, recompute).unwrap();
        losses.push(loss.to_scalar::<f32>().unwrap());
        model.expert_loads().values().for_each(|load| drop(load.rebalance(true)));
        optimizer.step(model.stages(), 1e-3, 1.0).unwrap();
        elapsed_s.push(start.elapsed().as_secs_f64());
    }
    let timed = &mut elapsed_s[usize::from(options.bench)..];
    timed.sort_by(f64::total_cmp);
    let step_s = timed[timed.len() / 2];

    Figures {
        program: concat!("titan ", env!("CARGO_PKG_VERSION")),
        case: name,
        way,
        threads: rayon::current_num_threads(),
        n_params: model.n_params(),
        step_s,
        tps: (batch * seq_len) as f64 / step_s,
        flops_per_token: model.flops_per_token(seq_len),
        peak_flops,
        peak_mem_bytes: MemoryUse::of_process().peak_bytes,
        first_loss: losses[0],
        last_loss: losses[steps - 1],
    }
}

impl fmt::Display for Figures<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { case, way, threads, step_s, tps, peak_flops, first_loss, last_loss, .. } = self;
        let flops = tps * self.flops_per_token as f64;
        let (tflops, of_floor, gib) = (flops / 1e12, 100.0 * flops / peak_flops, self.peak_mem_bytes as f64 / GIB);
        write!(
            f,
            "{case} {way:<4} {step_s:8.3} s per step  {tps:7.0} tok/s  {tflops:6.3} TFLOP/s, {of_floor:3.0}% of the floor  \
             {gib:5.2} GiB  loss {first_loss:.3} -> {last_loss:.3}  {threads} threads"
        )
    }
}

//! Whole optimizer steps of the cases in `cases.json`, on random tokens: forward, backward, clipping, AdamW.
//!
//! `cargo bench --bench train_step -- [--case A] [--param-dtype bfloat16] [--steps 10]`; `scripts/bench_compare.sh` sets
//! the figures beside PyTorch's, `scripts/gpu_bench.sh` those of a GPU. The floor of a step is the time that the model's
//! FLOPs would take at the machine's peak. That of a processor is measured in the same process: titan's own product of two
//! square matrices. That of a GPU is its data sheet's.
//!
//! On a processor, the time of a step is the median. A GPU works on one step while the host prepares the next: there it is
//! the wall clock from the first timed step to the end of the last, over their number.

use std::collections::BTreeMap;
use std::fmt;
use std::process::{Command, ExitCode};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, ValueEnum};
use rand::Rng;
use serde::{Deserialize, Serialize};
use titan::Result;
use titan::autograd::Precision;
use titan::components::optimizer::Optimizer;
use titan::config::ModelArgs;
use titan::engine::{self, MicroBatch, Recompute, Stages};
use titan::models::decoder::Sequence;
use titan::models::{self, Decoder};
use titan::ops::{self, Adam, StepRules};
use titan::tools::device::{self, Choice, GIB};
use titan::tools::profiler::{self, Category, Table};
use titan::tools::{memory, random};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Whole optimizer steps on random tokens.
#[derive(Parser)]
struct Options {
    /// A case of `cases.json`. All that are meant for the device, if not given.
    #[arg(long, overrides_with = "case")]
    case: Option<String>,
    /// Both, if not given; on a GPU, bfloat16.
    #[arg(long, overrides_with = "param_dtype")]
    param_dtype: Option<ParamDtype>,
    /// Which activations backward computes again. What the case says, if not given.
    #[arg(long)]
    recompute: Option<RecomputeMode>,
    /// Timed steps: 3, if not given, and 20 on a GPU.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,
    /// Steps before them, which take the memory: 1, if not given, and 5 on a GPU.
    #[arg(long)]
    warm_up: Option<u32>,
    /// Record a step of a GPU, and repeat it by one launch, as `compile.enable` does.
    #[arg(long)]
    recorded: bool,
    /// As many as there are cores, if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Say where the time of the timed steps goes.
    #[arg(long)]
    profile: bool,
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

/// The cases by the kind of device that they are meant for; any runs on any.
#[derive(Deserialize)]
struct Cases {
    cpu: BTreeMap<String, Case>,
    gpu: BTreeMap<String, Case>,
}

/// What a run took.
#[derive(Serialize)]
struct Figures<'a> {
    program: &'a str,
    case: &'a str,
    way: &'a str,
    device: String,
    threads: usize,
    n_params: usize,
    step_s: f64,
    tps: f64,
    flops_per_token: u64,
    peak_flops: f64,
    peak_mem_bytes: u64,
    /// Kernels that the host launched in a step; `None` on a processor.
    launches: Option<f64>,
    first_loss: f32,
    last_loss: f32,
}

fn main() -> ExitCode {
    memory::keep_freed_pages();
    let options = Options::parse();
    if !options.names.is_empty() && !options.names.iter().any(|name| "train_step".contains(name)) {
        return ExitCode::SUCCESS;
    }
    let choice = Choice::of_environment().unwrap_or_else(|error| panic!("{error}"));
    let on_gpu = !choice.device.is_cpu();
    let Cases { cpu, gpu } = serde_json::from_str(include_str!("cases.json")).unwrap();
    let meant = if on_gpu { &gpu } else { &cpu };
    let named = options.case.as_ref().map(|name| [cpu.get_key_value(name), gpu.get_key_value(name)]);
    let cases: Vec<_> = named.map_or_else(|| meant.iter().collect(), |it| it.into_iter().flatten().collect());
    if cases.is_empty() {
        let known = cpu.keys().chain(gpu.keys()).cloned().collect::<Vec<_>>().join(", ");
        Options::command().error(ErrorKind::InvalidValue, format!("no such case; there are {known}")).exit();
    }
    let dtypes = match options.param_dtype {
        Some(dtype) => vec![dtype],
        None if on_gpu => vec![ParamDtype::Bfloat16],
        None => vec![ParamDtype::Bfloat16, ParamDtype::Float32],
    };
    if let ([(name, case)], [dtype]) = (&cases[..], &dtypes[..]) {
        let figures = run(name, case, *dtype, &choice, &options);
        match options.json {
            true => println!("{}", serde_json::to_string(&figures).unwrap()),
            false => println!("{figures}"),
        }
        return ExitCode::SUCCESS;
    }
    // Each in a process of its own: peak memory is that of a process.
    let runs = cases.into_iter().flat_map(|(name, _)| dtypes.iter().map(move |dtype| (name, dtype)));
    let all_succeed = runs.into_iter().all(|(name, dtype)| {
        let dtype = dtype.to_possible_value().unwrap();
        let mut this = Command::new(std::env::current_exe().unwrap());
        this.args(std::env::args_os().skip(1)).args(["--case", name, "--param-dtype", dtype.get_name()]);
        this.status().unwrap().success()
    });
    ExitCode::from(u8::from(!all_succeed))
}

/// Trains on fresh tokens at each step.
fn run<'a>(name: &'a str, case: &Case, dtype: ParamDtype, choice: &Choice, options: &Options) -> Figures<'a> {
    if let Some(threads) = options.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().unwrap();
    }
    let device = &choice.device;
    let (batch, seq_len) = if options.bench { (case.batch, case.seq_len) } else { (1, 64) };
    let (warm_up, steps) = match (options.bench, device.is_cpu()) {
        (true, true) => (options.warm_up.unwrap_or(1), options.steps.unwrap_or(3)),
        (true, false) => (options.warm_up.unwrap_or(5), options.steps.unwrap_or(20)),
        (false, _) => (0, 1),
    };
    let (way, compute) = match (dtype, options.recorded) {
        (ParamDtype::Bfloat16, false) => ("bf16", DType::BF16),
        (ParamDtype::Bfloat16, true) => ("bf16-recorded", DType::BF16),
        (ParamDtype::Float32, false) => ("f32", DType::F32),
        (ParamDtype::Float32, true) => ("f32-recorded", DType::F32),
    };
    let precision = Precision { storage: DType::F32, compute };
    let recompute = match options.recompute.unwrap_or(case.recompute) {
        RecomputeMode::None => Recompute::None,
        RecomputeMode::Full => Recompute::All,
    };
    let facts = choice.facts().unwrap();
    let peak_flops = if device.is_cpu() { ops::measured_peak_flops(compute) } else { facts.peak_flops };

    let mut args = case.args.apply(&models::flavor(&case.model, &case.flavor).unwrap()).unwrap();
    args.max_seq_len = seq_len;
    let mut model = Decoder::new(&args, None).unwrap();
    model.allocate(precision, device, true).unwrap();
    model.parameters().for_each(|parameter| models::initialize(parameter, 0).unwrap());
    let adam = Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true };
    let mut optimizer = Optimizer::new(adam, model.stages()).unwrap();
    let rules = StepRules { lr: 1e-3, max_norm: 1.0, max_loss: f64::INFINITY };

    let mut ids = random::keyed(0, "tokens", name);
    let mut row = || (0..=seq_len).map(|_| ids.random_range(0..args.vocab_size as u32)).collect();
    let mut rows = || Tensor::new((0..batch).map(|_| row()).collect::<Vec<Vec<u32>>>(), &Device::Cpu).unwrap();
    let batches: Vec<Tensor> = (0..warm_up + steps).map(|_| rows()).collect();

    let (mut losses, mut elapsed_s) = (Vec::new(), Vec::new());
    let (mut begin, mut launched) = (Instant::now(), launches());
    let mut recorded = None;
    for (i, rows) in batches.iter().enumerate() {
        let window = |start| rows.narrow(1, start, seq_len).unwrap().contiguous().unwrap().to_device(device).unwrap();
        if i == warm_up as usize {
            if options.recorded {
                let rows = MicroBatch::new(window(0), window(1));
                let context = engine::context(&model, &rows).unwrap();
                // Once in earnest: what is made when it is first needed cannot be made while launches are recorded.
                optimizer.prepare(&rules).unwrap();
                enqueue(&model, &rows, &context, recompute, &optimizer).unwrap();
                optimizer.finish().unwrap();
                let before = launches();
                let repeat = record(device, || enqueue(&model, &rows, &context, recompute, &optimizer));
                recorded = Some((rows, context, repeat, launches().zip(before).map_or(0, |(now, then)| now - then)));
            }
            device::synchronize(device).unwrap();
            if options.profile {
                profiler::wait_for(device);
                profiler::start(false);
            }
            (begin, launched) = (Instant::now(), launches());
        }
        let _span = profiler::span_in(Category::Step, format_args!("step {i}"));
        let start = Instant::now();
        let rows = MicroBatch::new(window(0), window(1));
        optimizer.prepare(&rules).unwrap();
        match &recorded {
            Some((fixed, _, repeat, _)) => {
                fixed.tokens.slice_set(&rows.tokens, 0, 0).unwrap();
                fixed.labels.slice_set(&rows.labels, 0, 0).unwrap();
                repeat().unwrap();
            }
            None => {
                let context = engine::context(&model, &rows).unwrap();
                enqueue(&model, &rows, &context, recompute, &optimizer).unwrap();
            }
        }
        let outcome = profiler::span_in(Category::Optimizer, "finish").around(|| optimizer.finish()).unwrap();
        assert!(outcome.applied, "step {i}: {outcome:?}");
        losses.push(outcome.loss);
        model.expert_loads().values().for_each(|load| load.rebalance(true).unwrap());
        elapsed_s.push(start.elapsed().as_secs_f64());
    }
    device::synchronize(device).unwrap();
    let mean_s = begin.elapsed().as_secs_f64() / f64::from(steps);
    let in_recording = recorded.map_or(0, |(.., n)| n) as f64;
    let launches = launches().zip(launched).map(|(now, then)| in_recording + (now - then) as f64 / f64::from(steps));
    if options.profile {
        eprintln!("{}", Table::of(&profiler::stop()));
    }
    let timed = &mut elapsed_s[warm_up as usize..];
    timed.sort_by(f64::total_cmp);
    let step_s = if device.is_cpu() { timed[timed.len() / 2] } else { mean_s };

    Figures {
        program: concat!("titan ", env!("CARGO_PKG_VERSION")),
        case: name,
        way,
        device: choice.name(),
        threads: rayon::current_num_threads(),
        n_params: model.n_params(),
        step_s,
        tps: (batch * seq_len) as f64 / step_s,
        flops_per_token: model.flops_per_token(seq_len),
        peak_flops,
        peak_mem_bytes: facts.memory_use().peak_bytes,
        launches: launches.filter(|_| !device.is_cpu()),
        first_loss: losses[0],
        last_loss: losses[losses.len() - 1],
    }
}

/// All that a step launches.
fn enqueue(
    model: &Decoder,
    rows: &MicroBatch,
    context: &Sequence,
    recompute: Recompute,
    optimizer: &Optimizer,
) -> Result<()> {
    let loss = engine::forward_backward_in(model, rows, context, 1.0, recompute)?;
    profiler::span_in(Category::Optimizer, "optimizer").around(|| optimizer.enqueue(model.stages(), &loss))
}

/// What repeats the launches of `body`.
#[cfg(feature = "cuda")]
fn record(device: &Device, body: impl FnOnce() -> Result<()>) -> Box<dyn Fn() -> Result<()>> {
    use titan::tools::gpu::{Graph, trim_pool};
    let Device::Cuda(device) = device else { panic!("only steps of a GPU are recorded") };
    trim_pool(device).unwrap();
    let graph = Graph::record(device, body).unwrap();
    Box::new(move || graph.launch())
}

#[cfg(not(feature = "cuda"))]
fn record(_: &Device, _: impl FnOnce() -> Result<()>) -> Box<dyn Fn() -> Result<()>> {
    panic!("only steps of a GPU are recorded")
}

/// Kernels launched since the process began, where titan has any.
fn launches() -> Option<u64> {
    #[cfg(feature = "cuda")]
    return Some(ops::launches());
    #[cfg(not(feature = "cuda"))]
    None
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
        )?;
        self.launches.map_or(Ok(()), |launches| write!(f, "  {launches:.0} launches"))
    }
}

//! Each op forward and backward, beside what the machine can do.
//!
//! `cargo bench --bench ops -- [part of a name]...`
//!
//! Rates are those of the fastest run, because other programs only ever add time. An op that is bound by memory reads as
//! GB/s (each input read once, each result written once), one that is bound by arithmetic as GFLOP/s. Peaks are measured
//! in the same run: for memory a triad over as many elements as the ops', for arithmetic titan's own product of two
//! square matrices.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use titan::autograd::{Init, Parameter, Precision, StageBuilder, Value};
use titan::models::args::{RopeArgs, RopeLayout, ScoreFunc, Stretch};
use titan::ops::{self, Adam, AdamSteps, AttentionMask, Experts, Gate, RopeTable, Router, Scores, StepRules};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Sequences in a batch, tokens in a sequence, tokens in a batch.
const B: usize = 8;
const S: usize = 1024;
const N: usize = B * S;
/// Of the residual stream, and of the feed-forward.
const DIM: usize = 256;
const HIDDEN: usize = 768;

const DTYPES: [DType; 2] = [DType::F32, DType::BF16];

fn main() {
    titan::tools::memory::keep_freed_pages();
    // Cargo passes `--bench`.
    let names: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let bench = Bench { names, peaks: Peaks::measure() };
    println!(
        "{} threads; peaks: {:.1} GB/s, {:.0} GFLOP/s f32, {:.0} GFLOP/s bf16\n",
        rayon::current_num_threads(),
        bench.peaks.memory / 1e9,
        bench.peaks.f32 / 1e9,
        bench.peaks.bf16 / 1e9
    );
    println!(
        "{:<22} {:<26} {:<5} {:>11} {:>11} {:>14} {:>7}",
        "op", "shape", "dtype", "fastest", "median", "rate", "of peak"
    );
    bench.elementwise();
    bench.rows();
    bench.optimizer();
    bench.products();
    bench.attention();
    bench.experts();
}

/// What the machine can do, per second.
struct Peaks {
    memory: f64,
    f32: f64,
    bf16: f64,
}

impl Peaks {
    fn measure() -> Self {
        let n = N * DIM;
        let (mut a, b, c) = (vec![0f32; n], vec![1f32; n], vec![2f32; n]);
        let triad = |()| {
            a.par_chunks_mut(1 << 14).zip(b.par_chunks(1 << 14).zip(c.par_chunks(1 << 14))).for_each(|(a, (b, c))| {
                a.iter_mut().zip(b.iter().zip(c)).for_each(|(a, (b, c))| *a = b + 0.5 * c);
            });
        };
        let memory = 12.0 * n as f64 / time(|| (), triad).fastest_s;
        let [f32, bf16] = [DType::F32, DType::BF16].map(ops::measured_peak_flops);
        Self { memory, f32, bf16 }
    }
}

/// What is timed.
struct Op<'a> {
    name: &'a str,
    shape: String,
    dtype: DType,
}

impl<'a> Op<'a> {
    fn new(name: &'a str, shape: impl Into<String>, dtype: DType) -> Self {
        Self { name, shape: shape.into(), dtype }
    }
}

/// The work of one call.
#[derive(Clone, Copy)]
enum Work {
    Bytes(usize),
    Flops(usize),
}
use Work::{Bytes, Flops};

struct Bench {
    names: Vec<String>,
    peaks: Peaks,
}

impl Bench {
    /// Prints the time of `run` on what `setup` makes, unless other names were asked for.
    fn line<I, O>(&self, op: &Op, work: Work, setup: impl FnMut() -> I, run: impl FnMut(I) -> O) {
        let Op { name, shape, dtype } = op;
        let label = format!("{name} {}", dtype.as_str());
        if !self.names.is_empty() && !self.names.iter().any(|part| label.contains(part.as_str())) {
            return;
        }
        let times = time(setup, run);
        let (amount, unit, peak) = match (work, dtype) {
            (Bytes(n), _) => (n, "GB/s", self.peaks.memory),
            (Flops(n), DType::BF16) => (n, "GFLOP/s", self.peaks.bf16),
            (Flops(n), _) => (n, "GFLOP/s", self.peaks.f32),
        };
        let rate = amount as f64 / times.fastest_s;
        println!(
            "{name:<22} {shape:<26} {:<5} {:>8.3} ms {:>8.3} ms {:>6.1} {unit:<7} {:>5.0} %",
            dtype.as_str(),
            times.fastest_s * 1e3,
            times.median_s * 1e3,
            rate / 1e9,
            100.0 * rate / peak
        );
    }

    /// An op on `x`, which needs no gradient.
    fn forward(&self, op: &Op, work: Work, x: &Tensor, run: impl Fn(&Value) -> Value) {
        let x = Value::constant(x.clone());
        self.line(op, work, || (), |()| run(&x));
    }

    /// The gradient of `x` under `dy`.
    fn backward(&self, op: &Op, work: Work, x: &Tensor, dy: &Tensor, run: impl Fn(&Value) -> Value) {
        let name = format!("{} backward", op.name);
        let op = Op::new(&name, op.shape.as_str(), op.dtype);
        let recorded = || (run(&Value::input(x.clone())), dy.clone());
        self.line(&op, work, recorded, |(y, dy)| y.backward(dy).unwrap());
    }

    fn both(&self, op: &Op, work: [Work; 2], x: &Tensor, dy: &Tensor, run: impl Fn(&Value) -> Value) {
        self.forward(op, work[0], x, &run);
        self.backward(op, work[1], x, dy, run);
    }

    fn elementwise(&self) {
        for dtype in DTYPES {
            let size = dtype.size_in_bytes();
            let (n, x) = (N * DIM, tensor(&[B, S, DIM], DType::F32));
            let branch = Value::constant(tensor(&[B, S, DIM], dtype));
            let op = Op::new("add", shape(&[N, DIM]), dtype);
            let add = |x: &Value| ops::add(x, &branch).unwrap();
            self.forward(&op, Bytes(n * (8 + size)), &x, add);
            // In f32, backward only hands the gradient on.
            if dtype == DType::BF16 {
                self.backward(&op, Bytes(n * (4 + size)), &x, &x, add);
            }

            let (n, gate) = (N * HIDDEN, tensor(&[B, S, HIDDEN], dtype));
            let up = Value::constant(tensor(&[B, S, HIDDEN], dtype));
            let (weight, dy) = (parameter(&[DIM, HIDDEN], dtype), tensor(&[B, S, DIM], dtype));
            let work = [Flops(2 * n * DIM), Flops(4 * n * DIM)];
            let op = Op::new("swiglu", shape(&[N, HIDDEN, DIM]), dtype);
            self.both(&op, work, &gate, &dy, |gate| ops::glu(gate, &up, &weight, Gate::Silu, None).unwrap());
        }
    }

    fn rows(&self) {
        let n = N * DIM;
        for (dtype, dim) in product(DTYPES, [DIM, 2048]) {
            let size = dtype.size_in_bytes();
            let dims = [n / dim, dim];
            let (x, dy, weight) = (tensor(&dims, DType::F32), tensor(&dims, dtype), parameter(&[dim], dtype));
            let work = [Bytes(n * (4 + size)), Bytes(n * (8 + size))];
            let op = Op::new("rms_norm", shape(&dims), dtype);
            self.both(&op, work, &x, &dy, |x| ops::rms_norm(x, &weight, 0.0, 1e-5).unwrap());
        }
        for (dtype, head_dim) in product(DTYPES, [16, 64, 128]) {
            let dims = [B, S, DIM / head_dim, head_dim];
            let x = tensor(&dims, dtype);
            let (layout, stretch) = (RopeLayout::Pairs, Stretch::None);
            let args = RopeArgs { dim: head_dim, theta: 5e5, layout, stretch };
            let table = RopeTable::new(&args, S, &Device::Cpu).unwrap();
            let work = [Bytes(2 * n * dtype.size_in_bytes()); 2];
            self.both(&Op::new("rope", shape(&dims), dtype), work, &x, &x, |x| ops::rope(x, &table).unwrap());
        }
        for vocab_size in [2048, 202_048] {
            let (table, ids) = (parameter(&[vocab_size, DIM], DType::F32), tokens(vocab_size));
            let dy = tensor(&[B, S, DIM], DType::F32);
            let shape = format!("{vocab_size} x {DIM}, {N} ids");
            let op = Op::new("embedding", shape.as_str(), DType::F32);
            self.line(&op, Bytes(8 * n), || (), |()| ops::embedding(&ids, &table).unwrap());
            let op = Op::new("embedding backward", shape, DType::F32);
            self.line(&op, Bytes(12 * n), || (), |()| ops::embedding_backward(&ids, &table, &dy).unwrap());
        }
    }

    fn optimizer(&self) {
        let n = 1 << 23;
        let grads = tensor(&[n], DType::F32);
        let op = Op::new("sum_of_squares", shape(&[n]), DType::F32);
        let adam = Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true };
        let steps = AdamSteps::new(adam, 1, &Device::Cpu).unwrap();
        self.line(&op, Bytes(4 * n), || (), |()| steps.measure(0, &grads).unwrap());
        steps.prepare(10, &StepRules { lr: 1e-3, max_norm: f64::INFINITY, max_loss: f64::INFINITY }).unwrap();
        steps.decide(&Tensor::new(1f32, &Device::Cpu).unwrap()).unwrap();
        for (storage, compute) in [(DType::F32, DType::F32), (DType::F32, DType::BF16), (DType::BF16, DType::BF16)] {
            let mut stage = StageBuilder::default();
            stage.parameter("w", &[n], Init::Constant(0.0));
            stage.allocate(Precision { storage, compute }, &Device::Cpu, true).unwrap();
            let moments = [0, 1].map(|_| Tensor::zeros(n, storage, &Device::Cpu).unwrap());
            let copy = if compute == storage { 0 } else { compute.size_in_bytes() };
            let work = Bytes(n * (6 * storage.size_in_bytes() + 8 + copy));
            let op = Op::new("adam_step", format!("{n}, stored {}", storage.as_str()), compute);
            let run = |()| steps.apply(stage.buffers(), &moments[0], &moments[1]).unwrap();
            self.line(&op, work, || (), run);
        }
    }

    fn products(&self) {
        for (dtype, (inner, outer)) in product(DTYPES, [(DIM, HIDDEN), (HIDDEN, DIM), (2048, 2048)]) {
            let (x, dy) = (tensor(&[N, inner], dtype), tensor(&[N, outer], dtype));
            let weight = parameter(&[outer, inner], dtype);
            let flops = 2 * N * inner * outer;
            let op = Op::new("linear", format!("{N} x {inner} -> {outer}"), dtype);
            let work = [Flops(flops), Flops(2 * flops)];
            self.both(&op, work, &x, &dy, |x| ops::linear(x, &weight).unwrap());
        }
        for (dtype, vocab_size) in product(DTYPES, [2048, 32_768]) {
            let (weight, x) = (parameter(&[vocab_size, DIM], dtype), tensor(&[B, S, DIM], DType::F32));
            let targets = tokens(vocab_size);
            let flops = 2 * N * vocab_size * DIM;
            let shape = format!("{N} x {DIM} -> {vocab_size}");
            let op = Op::new("cross_entropy_loss", shape.as_str(), dtype);
            self.line(&op, Flops(flops), || (), |()| ops::cross_entropy_loss(&x, &weight, None, &targets).unwrap());
            let op = Op::new("cross_entropy_grad", shape, dtype);
            let grad = |()| ops::cross_entropy_grad(&x, &weight, None, &targets, 1.0).unwrap();
            self.line(&op, Flops(3 * flops), || (), grad);
        }
    }

    fn attention(&self) {
        for (dtype, head_dim) in product(DTYPES, [16, 64, 128]) {
            let dims = [B, S, DIM / head_dim, head_dim];
            let x = tensor(&dims, dtype);
            let kv = Value::constant(x.clone());
            // Half the scores are masked; forward has two products, backward five.
            let flops = 2 * B * S * S / 2 * DIM;
            let work = [Flops(2 * flops), Flops(5 * flops)];
            self.both(&Op::new("attention", shape(&dims), dtype), work, &x, &x, |q| {
                ops::attention(q, &kv, &kv, &AttentionMask::causal(), &Scores::scaled(0.25)).unwrap()
            });
        }
    }

    fn experts(&self) {
        let (n_experts, hidden) = (8, 512);
        let router = Router {
            score_func: ScoreFunc::Sigmoid,
            top_k: 1,
            route_norm: false,
            route_scale: 1.0,
            groups: None,
            force_load_balance: false,
        };
        let logits = Value::constant(tensor(&[N, n_experts], DType::F32));
        let op = Op::new("route", shape(&[N, n_experts]), DType::F32);
        let work = Bytes(N * (n_experts + 2) * 4);
        self.line(&op, work, || (), |()| ops::route(&logits, None, &router, None).unwrap());
        let (scores, routing) = ops::route(&logits, None, &router, None).unwrap();
        let x = tensor(&[N, DIM], DType::F32);
        for dtype in DTYPES {
            let [w1, w2, w3] = [[hidden, DIM], [DIM, hidden], [hidden, DIM]]
                .map(|[rows, cols]| parameter(&[n_experts, rows, cols], dtype));
            let weights = Experts { w1, w2, w3, biases: None, gate: Gate::Silu, score_before_experts: true };
            let flops = 3 * 2 * N * hidden * DIM;
            let work = [Flops(flops), Flops(2 * flops)];
            let op = Op::new("experts", format!("{N} x {DIM} -> {n_experts} x {hidden}"), dtype);
            self.both(&op, work, &x, &x, |x| ops::experts(x, &scores, &routing, &weights, None).unwrap());
        }
    }
}

/// Each of `xs` with each of `ys`.
fn product<X: Copy, Y: Copy, const M: usize, const N: usize>(xs: [X; M], ys: [Y; N]) -> impl Iterator<Item = (X, Y)> {
    xs.into_iter().flat_map(move |x| ys.into_iter().map(move |y| (x, y)))
}

/// How long runs take.
struct Times {
    fastest_s: f64,
    median_s: f64,
}

/// Times `run` on what `setup` makes, for half a second and at least seven times.
fn time<I, O>(mut setup: impl FnMut() -> I, mut run: impl FnMut(I) -> O) -> Times {
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < 7 || begin.elapsed() < Duration::from_millis(500) {
        let input = setup();
        let start = Instant::now();
        let output = run(input);
        times.push(start.elapsed().as_secs_f64());
        black_box(output);
    }
    times.sort_by(f64::total_cmp);
    Times { fastest_s: times[0], median_s: times[times.len() / 2] }
}

fn shape(dims: &[usize]) -> String {
    dims.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ")
}

fn tensor(shape: &[usize], dtype: DType) -> Tensor {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 500.0).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// A parameter with f32 master weights, a tenth of [`tensor`]'s: outputs are of the size that models have.
fn parameter(shape: &[usize], compute: DType) -> Arc<Parameter> {
    let mut stage = StageBuilder::default();
    let parameter = stage.parameter("w", shape, Init::Constant(0.0));
    stage.allocate(Precision { storage: DType::F32, compute }, &Device::Cpu, true).unwrap();
    parameter.set(&(tensor(shape, DType::F32) * 0.1).unwrap()).unwrap();
    parameter
}

/// Ids as text has them: low ones often, but all of the vocabulary.
fn tokens(vocab_size: usize) -> Tensor {
    let uniform = |i: usize| (i * 7919 % 10_007) as f64 / 10_007.0;
    let ids: Vec<u32> = (0..N).map(|i| ((vocab_size as f64).powf(uniform(i)) - 1.0) as u32).collect();
    Tensor::from_vec(ids, (B, S), &Device::Cpu).unwrap()
}

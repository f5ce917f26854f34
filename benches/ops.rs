//! Each op forward and backward, beside what the machine can do.
//!
//! `cargo bench --bench ops -- [part of a name]...`
//!
//! Rates are those of the fastest run, because other programs only ever add time. An op that is bound by memory reads as
//! GB/s (each input read once, each result written once), one that is bound by arithmetic as GFLOP/s; peaks are measured
//! in the same run: a triad for memory, titan's own product of two square matrices for arithmetic.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use titan::autograd::{Init, Parameter, Precision, StageBuilder, Value};
use titan::models::args::ScoreFunc;
use titan::ops::{self, AdamStep, AttentionMask, Experts, RopeTable, Router};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Sequences in a batch, tokens in a sequence, and elements in a token.
const B: usize = 8;
const S: usize = 1024;
const N: usize = B * S;
const DIM: usize = 256;

fn main() {
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
    for dtype in [DType::F32, DType::BF16] {
        bench.elementwise(dtype);
        bench.rows(dtype);
        bench.optimizer(dtype);
        bench.products(dtype);
        bench.attention(dtype);
        bench.experts(dtype);
    }
}

/// What the machine can do, per second.
struct Peaks {
    memory: f64,
    f32: f64,
    bf16: f64,
}

impl Peaks {
    fn measure() -> Self {
        let n = 1 << 24;
        let (mut a, b, c) = (vec![0f32; n], vec![1f32; n], vec![2f32; n]);
        let triad = time(
            || (),
            |()| {
                a.par_chunks_mut(1 << 14).zip(b.par_chunks(1 << 14).zip(c.par_chunks(1 << 14))).for_each(
                    |(a, (b, c))| {
                        a.iter_mut().zip(b.iter().zip(c)).for_each(|(a, (b, c))| *a = b + 0.5 * c);
                    },
                );
            },
        );
        let size = 2048;
        let product = |dtype| {
            let (w, x) = (parameter(&[size, size], dtype), Value::constant(tensor(&[size, size], dtype)));
            2.0 * (size as f64).powi(3) / time(|| (), |()| ops::linear(&x, &w).unwrap()).fastest_s
        };
        Self { memory: 12.0 * n as f64 / triad.fastest_s, f32: product(DType::F32), bf16: product(DType::BF16) }
    }
}

/// The work of one call.
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
    fn line<I, O>(
        &self,
        name: &str,
        shape: &str,
        dtype: DType,
        work: Work,
        setup: impl FnMut() -> I,
        run: impl FnMut(I) -> O,
    ) {
        if !self.names.is_empty() && !self.names.iter().any(|part| name.contains(part.as_str())) {
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

    /// An op of one tracked input, forward and backward.
    fn both(
        &self,
        name: &str,
        shape: &str,
        dtype: DType,
        work: [Work; 2],
        x: &Tensor,
        dy: &Tensor,
        op: impl Fn(&Value) -> Value,
    ) {
        let [forward, backward] = work;
        let constant = Value::constant(x.clone());
        self.line(name, shape, dtype, forward, || (), |()| op(&constant));
        let recorded = || (op(&Value::input(x.clone())), dy.clone());
        self.line(&format!("{name} backward"), shape, dtype, backward, recorded, |(y, dy)| y.backward(dy).unwrap());
    }

    fn elementwise(&self, dtype: DType) {
        let size = dtype.size_in_bytes();
        let x = tensor(&[B, S, DIM], DType::F32);
        let branch = Value::constant(tensor(&[B, S, DIM], dtype));
        let n = N * DIM;
        // Backward hands the gradient on, and narrows it for the branch.
        let narrowed = if dtype == DType::F32 { 0 } else { n * (4 + size) };
        let work = [Bytes(n * (8 + size)), Bytes(narrowed)];
        self.both("add", &shape(&[N, DIM]), dtype, work, &x, &x, |x| ops::add(x, &branch).unwrap());

        let hidden = 768;
        let n = N * hidden;
        let (gate, up) = (tensor(&[B, S, hidden], dtype), Value::constant(tensor(&[B, S, hidden], dtype)));
        let work = [Bytes(3 * n * size), Bytes(5 * n * size)];
        self.both("swiglu", &shape(&[N, hidden]), dtype, work, &gate, &gate, |gate| ops::swiglu(gate, &up).unwrap());
    }

    fn rows(&self, dtype: DType) {
        let size = dtype.size_in_bytes();
        for dim in [DIM, 2048] {
            let (x, dy) = (tensor(&[N * DIM / dim, dim], DType::F32), tensor(&[N * DIM / dim, dim], dtype));
            let weight = parameter(&[dim], dtype);
            let n = N * DIM;
            let work = [Bytes(n * (4 + size)), Bytes(n * (8 + size))];
            let shape = shape(&[N * DIM / dim, dim]);
            self.both("rms_norm", &shape, dtype, work, &x, &dy, |x| ops::rms_norm(x, &weight, 1e-5).unwrap());
        }
        for head_dim in [16, 64, 128] {
            let dims = [B, S, DIM / head_dim, head_dim];
            let x = tensor(&dims, dtype);
            let table = RopeTable::new(head_dim, 5e5, None, S, &Device::Cpu).unwrap();
            let work = [0, 0].map(|_| Bytes(2 * N * DIM * size));
            self.both("rope", &shape(&dims), dtype, work, &x, &x, |x| ops::rope(x, &table).unwrap());
        }
        for vocab_size in [2048, 202_048] {
            let table = parameter(&[vocab_size, DIM], dtype);
            let ids = tokens(vocab_size);
            let dy = tensor(&[B, S, DIM], DType::F32);
            let shape = format!("{vocab_size} x {DIM}, {N} ids");
            let work = Bytes(8 * N * DIM);
            self.line("embedding", &shape, dtype, work, || (), |()| ops::embedding(&ids, &table).unwrap());
            let run = |()| ops::embedding_backward(&ids, &table, &dy).unwrap();
            self.line("embedding backward", &shape, dtype, Bytes(12 * N * DIM), || (), run);
        }
    }

    fn optimizer(&self, dtype: DType) {
        let n = 1 << 23;
        for storage in [DType::F32, dtype] {
            let mut stage = StageBuilder::default();
            stage.parameter("w", &[n], Init::Constant(0.0));
            stage.allocate(Precision { storage, compute: dtype }, &Device::Cpu, true).unwrap();
            let moments = [0, 1].map(|_| Tensor::zeros(n, storage, &Device::Cpu).unwrap());
            let step = AdamStep {
                t: 10,
                lr: 1e-3,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                decoupled: true,
                grad_scale: 1.0,
            };
            let copy = if dtype == storage { 0 } else { dtype.size_in_bytes() };
            let work = Bytes(n * (6 * storage.size_in_bytes() + 8 + copy));
            let run = |()| ops::adam_step(stage.buffers(), &moments[0], &moments[1], &step).unwrap();
            self.line("adam_step", &format!("{n}, stored {}", storage.as_str()), dtype, work, || (), run);
            if dtype == DType::F32 {
                let grads = stage.buffers().grads.as_ref().unwrap();
                let run = |()| ops::sum_of_squares(grads).unwrap();
                self.line("sum_of_squares", &shape(&[n]), DType::F32, Bytes(4 * n), || (), run);
                break;
            }
        }
    }

    fn products(&self, dtype: DType) {
        for (inner, outer) in [(256, 768), (768, 256), (2048, 2048)] {
            let (x, dy) = (tensor(&[N, inner], dtype), tensor(&[N, outer], dtype));
            let weight = parameter(&[outer, inner], dtype);
            let flops = 2 * N * inner * outer;
            let shape = format!("{N} x {inner} -> {outer}");
            let work = [Flops(flops), Flops(2 * flops)];
            self.both("linear", &shape, dtype, work, &x, &dy, |x| ops::linear(x, &weight).unwrap());
        }
        for vocab_size in [2048, 32_768] {
            let (weight, x) = (parameter(&[vocab_size, DIM], dtype), tensor(&[B, S, DIM], DType::F32));
            let targets = tokens(vocab_size);
            let flops = 2 * N * vocab_size * DIM;
            let shape = format!("{N} x {DIM} -> {vocab_size}");
            let loss = |()| ops::cross_entropy_loss(&x, &weight, &targets).unwrap();
            self.line("cross_entropy_loss", &shape, dtype, Flops(flops), || (), loss);
            let grad = |()| ops::cross_entropy_grad(&x, &weight, &targets, 1.0).unwrap();
            self.line("cross_entropy_grad", &shape, dtype, Flops(3 * flops), || (), grad);
        }
    }

    fn attention(&self, dtype: DType) {
        for head_dim in [16, 64, 128] {
            let dims = [B, S, DIM / head_dim, head_dim];
            let x = tensor(&dims, dtype);
            let kv = Value::constant(x.clone());
            // Half the scores are masked; forward has two products, backward five.
            let flops = 2 * B * S * S / 2 * DIM;
            let work = [Flops(2 * flops), Flops(5 * flops)];
            self.both("attention", &shape(&dims), dtype, work, &x, &x, |q| {
                ops::attention(q, &kv, &kv, &AttentionMask::causal(), 0.25).unwrap()
            });
        }
    }

    fn experts(&self, dtype: DType) {
        let (n_experts, hidden) = (8, 512);
        let [w1, w2, w3] = [[hidden, DIM], [DIM, hidden], [hidden, DIM]]
            .map(|[rows, cols]| parameter(&[n_experts, rows, cols], dtype));
        let weights = Experts { w1, w2, w3, score_before_experts: true };
        let router = Router {
            score_func: ScoreFunc::Sigmoid,
            top_k: 1,
            route_norm: false,
            route_scale: 1.0,
            force_load_balance: false,
        };
        let logits = Value::constant(tensor(&[N, n_experts], DType::F32));
        let shape = format!("{N} x {DIM} -> {n_experts} x {hidden}");
        let work = Bytes(N * (n_experts + 2) * 4);
        self.line("route", &shape, dtype, work, || (), |()| ops::route(&logits, None, &router).unwrap());
        let (scores, routing) = ops::route(&logits, None, &router).unwrap();
        let flops = 3 * 2 * N * hidden * DIM;
        let x = tensor(&[N, DIM], DType::F32);
        let work = [Flops(flops), Flops(2 * flops)];
        self.both("experts", &shape, dtype, work, &x, &x, |x| ops::experts(x, &scores, &routing, &weights).unwrap());
    }
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

/// A parameter with f32 master weights.
fn parameter(shape: &[usize], compute: DType) -> Arc<Parameter> {
    let mut stage = StageBuilder::default();
    let parameter = stage.parameter("w", shape, Init::Constant(0.0));
    stage.allocate(Precision { storage: DType::F32, compute }, &Device::Cpu, true).unwrap();
    parameter.set(&tensor(shape, DType::F32)).unwrap();
    parameter
}

/// Ids as text has them: low ones often, but all of the vocabulary.
fn tokens(vocab_size: usize) -> Tensor {
    let uniform = |i: usize| (i * 7919 % 10_007) as f64 / 10_007.0;
    let ids: Vec<u32> = (0..N).map(|i| ((vocab_size as f64).powf(uniform(i)) - 1.0) as u32).collect();
    Tensor::from_vec(ids, (B, S), &Device::Cpu).unwrap()
}

//! Each op on a GPU beside its floor, at the sizes that the GPU's cases in `cases.json` train at, in bf16.
//!
//! `cargo bench --features cuda --bench gpu_ops -- [part of a name]...`
//!
//! The floor is the larger of two times: that of the FLOPs at the rate that large products of random numbers reach, and that
//! of the bytes (each input read once, each result written once) at the rate of a large copy. Ops are launched many times on
//! inputs that take turns, so that caches do not hold them, and waited for at the end; of several such rounds the median
//! counts. Backward is forward and backward less forward. What is marked reaches less than 60% of its floor.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use titan::autograd::{Float8, Init, Parameter, Precision, Scaling, StageBuilder, Value};
use titan::models::args::{RopeArgs, RopeLayout, ScoreFunc, Stretch};
use titan::ops::{self, Adam, AdamSteps, AttentionMask, Experts, Gate, RopeTable, Router, Scores, StepRules};
use titan::tools::device::{self, Choice};

/// FLOP/s of bf16 products, and bytes per second of a copy, both read and written, as measured by other programs.
const PEAKS: [(&str, f64, f64); 2] = [("H200", 790e12, 4.3e12), ("H100", 790e12, 3.0e12)];

const BF16: DType = DType::BF16;
const F32: DType = DType::F32;

/// What fits into no cache.
const UNCACHED_BYTES: usize = 256 << 20;
const MOST_INPUTS: usize = 16;
const ROUNDS: usize = 7;
const ROUND_S: f64 = 0.01;

/// A model's sizes, and those of its batch.
#[derive(Clone, Copy)]
struct Sizes {
    name: &'static str,
    b: usize,
    s: usize,
    dim: usize,
    n_heads: usize,
    n_kv_heads: usize,
    hidden_dim: usize,
    vocab_size: usize,
    /// Experts, how many of them see a token, and their hidden width.
    moe: Option<(usize, usize, usize)>,
}

#[rustfmt::skip]
const SIZES: [Sizes; 5] = [
    Sizes { name: "debug", b: 8, s: 2048, dim: 256, n_heads: 16, n_kv_heads: 16, hidden_dim: 768, vocab_size: 2048, moe: Some((8, 1, 512)) },
    Sizes { name: "colab", b: 2, s: 2048, dim: 256, n_heads: 16, n_kv_heads: 16, hidden_dim: 768, vocab_size: 202_048, moe: None },
    Sizes { name: "124M", b: 32, s: 1024, dim: 768, n_heads: 12, n_kv_heads: 12, hidden_dim: 2048, vocab_size: 50_304, moe: None },
    Sizes { name: "1B", b: 4, s: 4096, dim: 2048, n_heads: 32, n_kv_heads: 8, hidden_dim: 8192, vocab_size: 128_256, moe: None },
    Sizes { name: "moe", b: 8, s: 2048, dim: 1024, n_heads: 16, n_kv_heads: 16, hidden_dim: 1024, vocab_size: 32_000, moe: Some((8, 2, 1024)) },
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let choice = Choice::of_environment().unwrap_or_else(|error| panic!("{error}"));
    // Cargo passes `--bench`. Without it, as under `cargo test`, one run of each op at small sizes shows that all run.
    let in_earnest = arguments.iter().any(|argument| argument == "--bench");
    if in_earnest && choice.device.is_cpu() {
        println!("this is for GPUs, and titan would compute on the CPU: {choice}");
        return;
    }
    let names = arguments.into_iter().filter(|argument| !argument.starts_with("--")).collect();
    let (card, flops, bytes) = PEAKS.into_iter().find(|(card, ..)| choice.name().contains(card)).unwrap_or(PEAKS[0]);
    println!(
        "{}; floors: those of an {card}, {:.0} TFLOP/s and {:.1} TB/s\n",
        choice.name(),
        flops / 1e12,
        bytes / 1e12
    );
    println!("{:<28} {:<28} {:>11} {:>11} {:>9}", "op", "shape", "time", "floor", "reached");
    let bench = Bench { device: choice.device, names, in_earnest, flops, bytes };
    for sizes in SIZES {
        let sizes = if in_earnest {
            sizes
        } else {
            Sizes { b: 1, s: 32, dim: 64, n_heads: 4, n_kv_heads: 2, hidden_dim: 64, vocab_size: 100, ..sizes }
        };
        bench.run(&sizes);
        println!();
    }
}

/// The least work of one call.
#[derive(Clone, Copy)]
struct Work {
    flops: usize,
    bytes: usize,
}

struct Bench {
    device: Device,
    names: Vec<String>,
    in_earnest: bool,
    flops: f64,
    bytes: f64,
}

impl Bench {
    fn is_wanted(&self, op: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|part| op.contains(part.as_str()))
    }

    fn line(&self, op: &str, shape: &str, work: Work, time_s: f64) {
        if !self.in_earnest {
            return println!("{op:<28} {shape:<28} runs");
        }
        let (by_flops, by_bytes) = (work.flops as f64 / self.flops, work.bytes as f64 / self.bytes);
        let floor_s = by_flops.max(by_bytes);
        let bound = if by_flops > by_bytes { "arithmetic" } else { "memory" };
        let mark = if floor_s < 0.6 * time_s { " <" } else { "" };
        println!(
            "{op:<28} {shape:<28} {:>8.1} µs {:>8.1} µs {:>7.0} % of {bound}{mark}",
            time_s * 1e6,
            floor_s * 1e6,
            100.0 * floor_s / time_s
        );
    }

    /// Seconds of one of many runs, which are told their number.
    fn time(&self, mut run: impl FnMut(usize)) -> f64 {
        if !self.in_earnest {
            run(0);
            device::synchronize(&self.device).unwrap();
            return 1.0;
        }
        let mut round = |n: usize| {
            device::synchronize(&self.device).unwrap();
            let start = Instant::now();
            (0..n).for_each(&mut run);
            device::synchronize(&self.device).unwrap();
            start.elapsed().as_secs_f64() / n as f64
        };
        round(3);
        let n = ((ROUND_S / round(3)) as usize).clamp(3, 300);
        let mut times: Vec<f64> = (0..ROUNDS).map(|_| round(n)).collect();
        times.sort_by(f64::total_cmp);
        times[ROUNDS / 2]
    }

    /// An op on `x`s of a shape, forward, and backward under a gradient of the result's shape.
    fn both(
        &self,
        op: &str,
        shape: &str,
        [forward, backward]: [Work; 2],
        x: (&[usize], DType),
        run: impl Fn(&Value) -> Value,
    ) {
        if !self.is_wanted(op) {
            return;
        }
        let xs = self.tensors(x.0, x.1);
        let y = run(&Value::constant(xs[0].clone()));
        let dy = self.tensor(y.tensor().dims(), y.tensor().dtype());
        drop(y);
        let forward_s = self.time(|i| drop(run(&Value::constant(xs[i % xs.len()].clone()))));
        self.line(op, shape, forward, forward_s);
        let both_s = self.time(|i| {
            let y = run(&Value::input(xs[i % xs.len()].clone()));
            drop(y.backward(dy.clone()).unwrap());
        });
        self.line(&format!("{op} backward"), "", backward, (both_s - forward_s).max(1e-9));
    }

    /// As many as no cache holds.
    fn tensors(&self, shape: &[usize], dtype: DType) -> Vec<Tensor> {
        let bytes = shape.iter().product::<usize>() * dtype.size_in_bytes();
        let n = if self.in_earnest { UNCACHED_BYTES.div_ceil(bytes).min(MOST_INPUTS) } else { 1 };
        (0..n).map(|_| self.tensor(shape, dtype)).collect()
    }

    fn tensor(&self, shape: &[usize], dtype: DType) -> Tensor {
        Tensor::randn(0f32, 1.0, shape, &self.device).unwrap().to_dtype(dtype).unwrap()
    }

    /// A parameter as models have them: f32 master weights, bf16 copies, f32 gradients.
    fn parameter(&self, shape: &[usize]) -> Arc<Parameter> {
        let mut stage = StageBuilder::default();
        let parameter = stage.parameter("w", shape, Init::Constant(0.0));
        stage.allocate(Precision { storage: F32, compute: BF16 }, &self.device, true).unwrap();
        parameter.set(&(self.tensor(shape, F32) * 0.02).unwrap()).unwrap();
        parameter
    }

    fn ids(&self, sizes: &Sizes) -> Tensor {
        let n = sizes.b * sizes.s;
        let ids: Vec<u32> = (0..n).map(|i| (i * 7919 % sizes.vocab_size) as u32).collect();
        Tensor::from_vec(ids, (sizes.b, sizes.s), &self.device).unwrap()
    }

    fn run(&self, sizes: &Sizes) {
        self.elementwise(sizes);
        self.products(sizes);
        self.attention(sizes);
        self.loss(sizes);
        if let Some((n_experts, top_k, hidden_dim)) = sizes.moe {
            self.experts(sizes, n_experts, top_k, hidden_dim);
        }
        self.optimizer(sizes);
    }

    fn elementwise(&self, sizes: &Sizes) {
        let &Sizes { name, b, s, dim, n_heads, vocab_size, .. } = sizes;
        let (n, shape) = (b * s * dim, format!("{name}: {} x {dim}", b * s));
        let bytes = |per_number: usize| Work { flops: 0, bytes: n * per_number };
        let stream: (&[usize], DType) = (&[b, s, dim], F32);

        let branch = Value::constant(self.tensor(&[b, s, dim], BF16));
        self.both("add", &shape, [bytes(10), bytes(6)], stream, |x| ops::add(x, &branch).unwrap());
        let weight = self.parameter(&[dim]);
        self.both("rms_norm", &shape, [bytes(6), bytes(10)], stream, |x| ops::rms_norm(x, &weight, 0.0, 1e-5).unwrap());
        let head_dim = dim / n_heads;
        let args = RopeArgs { dim: head_dim, theta: 5e5, layout: RopeLayout::Pairs, stretch: Stretch::None };
        let table = RopeTable::new(&args, s, &self.device).unwrap();
        let heads: (&[usize], DType) = (&[b, s, n_heads, head_dim], BF16);
        self.both("rope", &shape, [bytes(4), bytes(4)], heads, |x| ops::rope(x, &table).unwrap());

        if self.is_wanted("embedding") {
            let (table, ids, dy) =
                (self.parameter(&[vocab_size, dim]), self.ids(sizes), self.tensor(&[b, s, dim], F32));
            let time_s = self.time(|_| drop(ops::embedding(&ids, &table).unwrap()));
            self.line("embedding", &shape, bytes(8), time_s);
            let time_s = self.time(|_| ops::embedding_backward(&ids, &table, &dy).unwrap());
            self.line("embedding backward", "", bytes(12), time_s);
        }
    }

    fn products(&self, sizes: &Sizes) {
        let &Sizes { name, b, s, dim, hidden_dim, .. } = sizes;
        for (op, inner, outer) in [("linear", dim, dim), ("linear up", dim, hidden_dim)] {
            let weight = self.parameter(&[outer, inner]);
            let flops = 2 * b * s * inner * outer;
            let (read, written) = (2 * b * s * inner + 2 * inner * outer, 2 * b * s * outer);
            // The gradient of the weight is added to what is there, in f32.
            let work = [
                Work { flops, bytes: read + written },
                Work { flops: 2 * flops, bytes: 2 * read + written + 8 * inner * outer },
            ];
            let shape = format!("{name}: {} x {inner} -> {outer}", b * s);
            self.both(op, &shape, work, (&[b, s, inner], BF16), |x| ops::linear(x, &weight).unwrap());

            // In half the time by arithmetic; what it takes to cast is the rest.
            let lack = device::lack_of_float8(&self.device).unwrap();
            if self.in_earnest && lack.is_some() {
                continue;
            }
            for (recipe, scaling) in [("tensorwise", Scaling::Tensorwise), ("rowwise", Scaling::Rowwise)] {
                let weight = self.parameter(&[outer, inner]);
                weight.set_float8(Float8 { scaling, emulate: lack.is_some() });
                let work = work.map(|work| Work { flops: work.flops / 2, ..work });
                let op = format!("{op} float8 {recipe}");
                self.both(&op, &shape, work, (&[b, s, inner], BF16), |x| ops::linear(x, &weight).unwrap());
            }
        }
        let (up, weight) =
            (Value::constant(self.tensor(&[b, s, hidden_dim], BF16)), self.parameter(&[dim, hidden_dim]));
        let (flops, n) = (2 * b * s * hidden_dim * dim, b * s * hidden_dim);
        let work =
            [Work { flops, bytes: 4 * n + 2 * b * s * dim }, Work { flops: 2 * flops, bytes: 6 * n + 2 * b * s * dim }];
        let shape = format!("{name}: {} x {hidden_dim} -> {dim}", b * s);
        let run = |gate: &Value| ops::glu(gate, &up, &weight, Gate::Silu, None).unwrap();
        self.both("swiglu down", &shape, work, (&[b, s, hidden_dim], BF16), run);
    }

    fn attention(&self, sizes: &Sizes) {
        let &Sizes { name, b, s, dim, n_heads, n_kv_heads, .. } = sizes;
        let head_dim = dim / n_heads;
        let kv = || Value::constant(self.tensor(&[b, s, n_kv_heads, head_dim], BF16));
        let (k, v) = (kv(), kv());
        // Half of the scores are masked. Forward has two products of them, backward five.
        let product = 2 * b * s * s / 2 * dim;
        let (q, kv) = (2 * b * s * dim, 2 * b * s * n_kv_heads * head_dim);
        let work =
            [Work { flops: 2 * product, bytes: 2 * q + 2 * kv }, Work { flops: 5 * product, bytes: 4 * q + 4 * kv }];
        let shape = format!("{name}: {b} x {s}, {n_heads}/{n_kv_heads} x {head_dim}");
        let scores = Scores::scaled((head_dim as f64).powf(-0.5) as f32);
        let run = |q: &Value| ops::attention(q, &k, &v, &AttentionMask::causal(), &scores).unwrap();
        self.both("attention", &shape, work, (&[b, s, n_heads, head_dim], BF16), run);
    }

    fn loss(&self, sizes: &Sizes) {
        if !self.is_wanted("cross_entropy") {
            return;
        }
        let &Sizes { name, b, s, dim, vocab_size, .. } = sizes;
        let (weight, x, targets) =
            (self.parameter(&[vocab_size, dim]), self.tensor(&[b, s, dim], F32), self.ids(sizes));
        let flops = 2 * b * s * dim * vocab_size;
        let shape = format!("{name}: {} x {dim} -> {vocab_size}", b * s);
        let time_s = self.time(|_| drop(ops::cross_entropy_loss(&x, &weight, None, &targets).unwrap()));
        self.line("cross_entropy", &shape, Work { flops, bytes: 2 * vocab_size * dim }, time_s);
        let time_s = self.time(|_| drop(ops::cross_entropy_grad(&x, &weight, None, &targets, 1.0).unwrap()));
        self.line("cross_entropy and gradient", "", Work { flops: 3 * flops, bytes: 10 * vocab_size * dim }, time_s);
    }

    fn experts(&self, sizes: &Sizes, n_experts: usize, top_k: usize, hidden_dim: usize) {
        let &Sizes { name, b, s, dim, .. } = sizes;
        let router = Router {
            score_func: ScoreFunc::Sigmoid,
            top_k,
            route_norm: false,
            route_scale: 1.0,
            groups: None,
            force_load_balance: false,
        };
        let logits = Value::constant(self.tensor(&[b * s, n_experts], F32));
        if self.is_wanted("route") {
            let time_s = self.time(|_| drop(ops::route(&logits, None, &router, None).unwrap()));
            let bytes = b * s * (n_experts + 3 * top_k) * 4;
            self.line("route", &format!("{name}: {} of {n_experts}", b * s), Work { flops: 0, bytes }, time_s);
        }
        let (scores, routing) = ops::route(&logits, None, &router, None).unwrap();
        let [w1, w2, w3] = [[hidden_dim, dim], [dim, hidden_dim], [hidden_dim, dim]]
            .map(|[rows, cols]| self.parameter(&[n_experts, rows, cols]));
        let weights = Experts { w1, w2, w3, biases: None, gate: Gate::Silu, score_before_experts: true };
        let flops = 3 * 2 * b * s * top_k * hidden_dim * dim;
        let (stream, weight_bytes) = (4 * b * s * dim, 3 * n_experts * hidden_dim * dim);
        let work = [
            Work { flops, bytes: 2 * stream + 2 * weight_bytes },
            Work { flops: 2 * flops, bytes: 3 * stream + 10 * weight_bytes },
        ];
        let shape = format!("{name}: {} x {dim}, {top_k} of {n_experts} x {hidden_dim}", b * s);
        let run = |x: &Value| ops::experts(x, &scores, &routing, &weights, None).unwrap();
        self.both("experts", &shape, work, (&[b * s, dim], F32), run);
    }

    fn optimizer(&self, sizes: &Sizes) {
        if !self.is_wanted("adamw") {
            return;
        }
        let n = sizes.vocab_size * sizes.dim;
        let adam = Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true };
        let steps = AdamSteps::new(adam, 1, &self.device).unwrap();
        let mut stage = StageBuilder::default();
        stage.parameter("w", &[n], Init::Constant(0.0));
        stage.allocate(Precision { storage: F32, compute: BF16 }, &self.device, true).unwrap();
        let moments = [0, 1].map(|_| Tensor::zeros(n, F32, &self.device).unwrap());
        let shape = format!("{}: {n}", sizes.name);
        let time_s = self.time(|_| steps.measure(0, stage.grads()).unwrap());
        self.line("adamw: norm", &shape, Work { flops: 0, bytes: 4 * n }, time_s);
        steps.prepare(10, &StepRules { lr: 1e-3, max_norm: 1.0, max_loss: f64::INFINITY }).unwrap();
        steps.decide(&Tensor::new(1f32, &self.device).unwrap()).unwrap();
        // Weights and both moments read and written, gradients read and zeroed, copies written.
        let time_s = self.time(|_| steps.apply(stage.buffers(), &moments[0], &moments[1]).unwrap());
        self.line("adamw", "", Work { flops: 0, bytes: 34 * n }, time_s);
    }
}

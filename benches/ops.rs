//! The ops that decide the speed, forward and backward together. Reads as FLOP per second.
//!
//! `cargo bench --bench ops`

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use divan::counter::ItemsCount;
use titan::autograd::{Init, Parameter, Precision, StageBuilder, Value};
use titan::models::args::ScoreFunc;
use titan::ops::{self, AttentionMask, Experts, Router};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    divan::main();
}

/// Tokens in a batch.
const N: usize = 2048;

fn tensor(shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 500.0).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn parameters(shapes: &[&[usize]], compute: DType) -> Vec<Arc<Parameter>> {
    let mut stage = StageBuilder::default();
    shapes.iter().for_each(|shape| drop(stage.parameter("w", shape, Init::Constant(0.0))));
    stage.allocate(Precision { storage: DType::F32, compute }, &Device::Cpu, true).unwrap();
    stage.parameters().iter().for_each(|p| p.set(&tensor(p.shape())).unwrap());
    stage.parameters().to_vec()
}

#[divan::bench(args = [DType::F32, DType::BF16])]
fn linear_256_to_768(bencher: divan::Bencher, compute: DType) {
    let (w, x, dy) = (&parameters(&[&[768, 256]], compute)[0], tensor(&[1, N, 256]), tensor(&[1, N, 768]));
    bencher
        .counter(ItemsCount::new(3 * 2 * N * 768 * 256))
        .bench_local(|| ops::linear(&Value::input(x.clone()), w).unwrap().backward(dy.clone()).unwrap());
}

#[divan::bench(args = [16, 64, 128])]
fn causal_attention(bencher: divan::Bencher, head_dim: usize) {
    let x = tensor(&[1, N, 256 / head_dim, head_dim]);
    // Half the scores are masked; backward has five products where forward has two.
    let flops = (2 + 5) * 2 * N * N / 2 * 256;
    bencher.counter(ItemsCount::new(flops)).bench_local(|| {
        let (q, kv) = (Value::input(x.clone()), Value::constant(x.clone()));
        ops::attention(&q, &kv, &kv, &AttentionMask::causal(), 0.25).unwrap().backward(x.clone()).unwrap()
    });
}

#[divan::bench(args = [2_048, 32_768])]
fn output_and_cross_entropy(bencher: divan::Bencher, vocab_size: usize) {
    let (w, x) = (&parameters(&[&[vocab_size, 256]], DType::F32)[0], tensor(&[1, N, 256]));
    let targets: Vec<u32> = (0..N).map(|i| (i * 31 % vocab_size) as u32).collect();
    let targets = Tensor::from_vec(targets, (1, N), &Device::Cpu).unwrap();
    bencher
        .counter(ItemsCount::new(3 * 2 * N * vocab_size * 256))
        .bench_local(|| ops::cross_entropy_grad(&x, w, &targets, 1.0).unwrap());
}

#[divan::bench]
fn eight_experts(bencher: divan::Bencher) {
    let (n_experts, hidden, dim) = (8, 512, 256);
    let shapes: [&[usize]; 4] =
        [&[n_experts, hidden, dim], &[n_experts, dim, hidden], &[n_experts, hidden, dim], &[n_experts, dim]];
    let w = parameters(&shapes, DType::F32);
    let weights = Experts { w1: w[0].clone(), w2: w[1].clone(), w3: w[2].clone(), score_before_experts: true };
    let router = Router {
        score_func: ScoreFunc::Sigmoid,
        top_k: 1,
        route_norm: false,
        route_scale: 1.0,
        force_load_balance: false,
    };
    let x = tensor(&[N, dim]);
    bencher.counter(ItemsCount::new(3 * 3 * 2 * N * hidden * dim)).bench_local(|| {
        let input = Value::input(x.clone());
        let (scores, routing) = ops::route(&ops::linear(&input, &w[3]).unwrap(), None, &router).unwrap();
        ops::experts(&input, &scores, &routing, &weights).unwrap().backward(x.clone()).unwrap()
    });
}

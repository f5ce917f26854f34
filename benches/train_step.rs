//! Whole training steps: micro-batch forward and backward, clipping, AdamW. Reads as tokens per second.
//!
//! `cargo bench --bench train_step`

use candle_core::{DType, Device, Tensor};
use divan::counter::ItemsCount;
use titan::autograd::Precision;
use titan::components::optimizer::{Optimizer, OptimizerKind};
use titan::engine::{self, Recompute, Stages};
use titan::models::{self, Decoder};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    divan::main();
}

fn step(bencher: divan::Bencher, (family, flavor): (&str, &str), rows: usize, compute: DType, recompute: Recompute) {
    let seq_len = 512;
    let mut args = models::flavor(family, flavor).unwrap();
    args.max_seq_len = seq_len;
    let mut model = Decoder::new(&args, Some(0)).unwrap();
    model.allocate(Precision { storage: DType::F32, compute }, &Device::Cpu, true).unwrap();
    model.parameters().for_each(|parameter| models::initialize(parameter, 0).unwrap());
    let kind = OptimizerKind { decoupled: true, betas: (0.9, 0.95), eps: 1e-8 };
    let mut optimizer = Optimizer::new(kind, 0.1, model.stages()).unwrap();
    // Ids all over the vocabulary, so that experts share the work as they do in training.
    let ids: Vec<u32> = (0..rows * seq_len).map(|i| (i * 7919 % args.vocab_size) as u32).collect();
    let tokens = Tensor::from_vec(ids, (rows, seq_len), &Device::Cpu).unwrap();
    bencher.counter(ItemsCount::new(rows * seq_len)).bench_local(|| {
        engine::forward_backward(&model, &tokens, &tokens, 1.0, recompute).unwrap();
        optimizer.step(model.stages(), 1e-4, 1.0).unwrap()
    });
}

#[divan::bench(sample_count = 5, sample_size = 1, args = [DType::F32, DType::BF16])]
fn llama4_debugmodel(bencher: divan::Bencher, compute: DType) {
    step(bencher, ("llama4", "debugmodel"), 4, compute, Recompute::None);
}

#[divan::bench(sample_count = 5, sample_size = 1)]
fn llama4_debugmodel_recomputing_all(bencher: divan::Bencher) {
    step(bencher, ("llama4", "debugmodel"), 4, DType::F32, Recompute::All);
}

#[divan::bench(sample_count = 5, sample_size = 1)]
fn llama3_debugmodel(bencher: divan::Bencher) {
    step(bencher, ("llama3", "debugmodel"), 4, DType::F32, Recompute::None);
}

//! Generating text with a model larger than the caches, beside what memory can do.
//!
//! `cargo bench --bench generate`
//!
//! A token can come no faster than memory hands over the weights, all but the embedding's, and the keys and values of
//! the tokens before it. Bandwidth is measured in the same run, before and after: the sum of a buffer larger than the
//! caches, and a triad of three such buffers. A prompt is measured beside the training forward of as many tokens. Every
//! rate is that of the median run.

use std::hint::black_box;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use titan::autograd::{Precision, Value};
use titan::engine::{Pass, Stages};
use titan::models::Decoder;
use titan::models::args::DecoderArgs;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const VOCAB_SIZE: usize = 32_768;
const PROMPT: usize = 1024;
const NEW_TOKENS: usize = 32;
/// Numbers in a buffer that bandwidth is measured with.
const BUFFER: usize = 1 << 28;

fn main() {
    titan::tools::memory::keep_freed_pages();
    let args = DecoderArgs {
        dim: 2048,
        n_layers: 8,
        n_heads: 32,
        n_kv_heads: Some(8),
        multiple_of: 1024,
        ffn_dim_multiplier: Some(1.4),
        vocab_size: VOCAB_SIZE,
        max_seq_len: 2 * PROMPT,
        ..DecoderArgs::default()
    };
    let before = Bandwidth::measure();
    println!("{} threads", rayon::current_num_threads());
    println!(
        "{:<5} {:>9} {:>9} | {:>9} {:>9} {:>9} {:>8} | {:>12} {:>16}",
        "dtype", "weights", "keys", "decode", "read", "of sum", "of triad", "prompt", "training forward"
    );
    let lines = [DType::BF16, DType::F32].map(|dtype| Line::measure(&args, dtype));
    let after = Bandwidth::measure();
    let (sum, triad) = ((before.sum + after.sum) / 2.0, (before.triad + after.triad) / 2.0);
    for line in lines {
        let rate = (line.weight_bytes + line.cache_bytes) / line.token_s;
        println!(
            "{:<5} {:>6.2} GB {:>6.3} GB | {:>5.1} t/s {:>4.1} GB/s {:>7.0} % {:>6.0} % | {:>8.0} t/s {:>12.0} t/s",
            line.dtype.as_str(),
            line.weight_bytes / 1e9,
            line.cache_bytes / 1e9,
            1.0 / line.token_s,
            rate / 1e9,
            100.0 * rate / sum,
            100.0 * rate / triad,
            PROMPT as f64 / line.prompt_s,
            PROMPT as f64 / line.forward_s,
        );
    }
    println!("memory: sum {:.1} GB/s, triad {:.1} GB/s", sum / 1e9, triad / 1e9);
}

/// Bytes per second.
struct Bandwidth {
    sum: f64,
    triad: f64,
}

impl Bandwidth {
    fn measure() -> Self {
        const CHUNK: usize = 1 << 16;
        let (mut a, b, c) = (vec![0f32; BUFFER / 3], vec![1f32; BUFFER / 3], vec![2f32; BUFFER / 3]);
        let triad_s = median(7, || {
            a.par_chunks_mut(CHUNK).zip(b.par_chunks(CHUNK).zip(c.par_chunks(CHUNK))).for_each(|(a, (b, c))| {
                a.iter_mut().zip(b.iter().zip(c)).for_each(|(a, (b, c))| *a = b + 0.5 * c);
            });
        });
        drop((a, b, c));
        let values = vec![1u64; BUFFER / 2];
        let sum_s = median(7, || {
            let sum: u64 = values.par_chunks(CHUNK).map(|values| values.iter().sum::<u64>()).sum();
            assert_eq!(sum, values.len() as u64);
        });
        let bytes = 4.0 * BUFFER as f64;
        Self { sum: bytes / sum_s, triad: bytes / triad_s }
    }
}

struct Line {
    dtype: DType,
    /// Read for each token.
    weight_bytes: f64,
    cache_bytes: f64,
    token_s: f64,
    prompt_s: f64,
    forward_s: f64,
}

impl Line {
    fn measure(args: &DecoderArgs, dtype: DType) -> Self {
        let mut model = Decoder::new(args, None).unwrap();
        model.allocate(Precision { storage: dtype, compute: dtype }, &Device::Cpu, false).unwrap();
        for parameter in model.parameters() {
            let n = parameter.numel();
            let values: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 504.0 * 0.03).collect();
            parameter.set(&Tensor::from_vec(values, parameter.shape(), &Device::Cpu).unwrap()).unwrap();
        }
        let ids: Vec<u32> = (0..PROMPT).map(|i| (i * 7919 % VOCAB_SIZE) as u32).collect();
        let prompt = Tensor::from_vec(ids, (1, PROMPT), &Device::Cpu).unwrap();
        let prompt_s = median(3, || model.next_logits(&prompt, &mut model.cache()).unwrap());
        let forward_s = median(3, || training_forward(&model, &prompt));

        let mut cache = model.cache();
        model.next_logits(&prompt, &mut cache).unwrap();
        let token = Tensor::new(&[[7u32]], &Device::Cpu).unwrap();
        let token_s = median(NEW_TOKENS, || model.next_logits(&token, &mut cache).unwrap());
        let kv = args.n_layers * 2 * args.n_kv_heads() * args.head_dim();
        Self {
            dtype,
            weight_bytes: ((model.n_params() - VOCAB_SIZE * args.dim) * dtype.size_in_bytes()) as f64,
            cache_bytes: (kv * (PROMPT + NEW_TOKENS / 2) * dtype.size_in_bytes()) as f64,
            token_s,
            prompt_s,
            forward_s,
        }
    }
}

/// The forward pass of a training step, with its loss.
fn training_forward(model: &Decoder, tokens: &Tensor) -> f32 {
    let sequence = model.context(tokens, None).unwrap();
    let mut x = model.embed(tokens).unwrap();
    for layer in 0..model.n_blocks() {
        x = model.block(layer, &Value::input(x), &sequence, Pass::Training).unwrap().tensor().clone();
    }
    model.loss(x, tokens).unwrap()
}

/// Seconds that a run takes.
fn median<R>(runs: usize, mut run: impl FnMut() -> R) -> f64 {
    let mut times: Vec<f64> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            black_box(run());
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[runs / 2]
}

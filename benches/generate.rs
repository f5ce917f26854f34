//! Generating text with a model larger than the caches, beside what memory can do.
//!
//! `cargo bench --bench generate`
//!
//! A token can come no faster than memory hands over the weights, all but the embedding's, and the keys and values of
//! the tokens before it. After each token, bandwidth is measured: by the sum of a buffer larger than the caches, and by a
//! triad of three such buffers. A prompt is measured beside the training forward of as many tokens. Times are medians.

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
/// Numbers in each of the buffers that bandwidth is measured with.
const BUFFER: usize = 1 << 27;

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
    println!("{} threads", rayon::current_num_threads());
    println!(
        "{:<5} {:>9} {:>9} | {:>10} {:>9} {:>9} {:>9} {:>6} | {:>8} {:>16}",
        "dtype", "weights", "keys", "decode", "read", "sum", "triad", "of sum", "prompt", "training forward"
    );
    let mut memory = Memory::new();
    for dtype in [DType::BF16, DType::F32] {
        let line = Line::measure(&args, dtype, &mut memory);
        let rate = (line.weight_bytes + line.cache_bytes) / line.token_s;
        println!(
            "{:<5} {:>6.2} GB {:>6.3} GB | {:>6.1} t/s {:>4.1} GB/s {:>4.1} GB/s {:>4.1} GB/s {:>4.0} % | {:>4.0} t/s {:>12.0} t/s",
            dtype.as_str(),
            line.weight_bytes / 1e9,
            line.cache_bytes / 1e9,
            1.0 / line.token_s,
            rate / 1e9,
            line.sum / 1e9,
            line.triad / 1e9,
            100.0 * rate / line.sum,
            PROMPT as f64 / line.prompt_s,
            PROMPT as f64 / line.forward_s,
        );
    }
}

/// Three buffers, together larger than the caches.
struct Memory([Vec<f32>; 3]);

impl Memory {
    const CHUNK: usize = 1 << 16;
    const BYTES: f64 = 12.0 * BUFFER as f64;

    fn new() -> Self {
        Self([0.0, 1.0, 2.0].map(|x| vec![x; BUFFER]))
    }

    /// Of the numbers' patterns, because sums of integers vectorise.
    fn sum(&self) -> u32 {
        let add = |sum: u32, x: &f32| sum.wrapping_add(x.to_bits());
        let sums = self.0.iter().map(|buffer| buffer.par_chunks(Self::CHUNK).map(|values| values.iter().fold(0, add)));
        sums.map(|sums| sums.reduce(|| 0, u32::wrapping_add)).fold(0, u32::wrapping_add)
    }

    fn triad(&mut self) {
        let [a, b, c] = &mut self.0;
        let inputs = b.par_chunks(Self::CHUNK).zip(c.par_chunks(Self::CHUNK));
        a.par_chunks_mut(Self::CHUNK).zip(inputs).for_each(|(a, (b, c))| {
            a.iter_mut().zip(b.iter().zip(c)).for_each(|(a, (b, c))| *a = b + 0.5 * c);
        });
    }
}

struct Line {
    /// Read for each token.
    weight_bytes: f64,
    cache_bytes: f64,
    token_s: f64,
    /// Bytes per second.
    sum: f64,
    triad: f64,
    prompt_s: f64,
    forward_s: f64,
}

impl Line {
    fn measure(args: &DecoderArgs, dtype: DType, memory: &mut Memory) -> Self {
        let mut model = Decoder::new(args, None).unwrap();
        model.allocate(Precision { storage: dtype, compute: dtype }, &Device::Cpu, false).unwrap();
        for parameter in model.parameters() {
            let n = parameter.numel();
            let values: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 504.0 * 0.03).collect();
            parameter.set(&Tensor::from_vec(values, parameter.shape(), &Device::Cpu).unwrap()).unwrap();
        }
        let ids: Vec<u32> = (0..PROMPT).map(|i| (i * 7919 % VOCAB_SIZE) as u32).collect();
        let prompt = Tensor::from_vec(ids, (1, PROMPT), &Device::Cpu).unwrap();
        let [mut prompts, mut forwards] = [const { Vec::new() }; 2];
        for _ in 0..3 {
            prompts.push(time(|| model.next_logits(&prompt, &mut model.cache()).unwrap()));
            forwards.push(time(|| training_forward(&model, &prompt)));
        }

        let mut cache = model.cache();
        model.next_logits(&prompt, &mut cache).unwrap();
        let token = Tensor::new(&[[7u32]], &Device::Cpu).unwrap();
        let [mut tokens, mut sums, mut triads] = [const { Vec::new() }; 3];
        for _ in 0..NEW_TOKENS {
            tokens.push(time(|| model.next_logits(&token, &mut cache).unwrap()));
            sums.push(time(|| memory.sum()));
            triads.push(time(|| memory.triad()));
        }
        let kv = args.n_layers * 2 * args.n_kv_heads() * args.head_dim();
        Self {
            weight_bytes: ((model.n_params() - VOCAB_SIZE * args.dim) * dtype.size_in_bytes()) as f64,
            cache_bytes: (kv * (PROMPT + NEW_TOKENS / 2) * dtype.size_in_bytes()) as f64,
            token_s: median(tokens),
            sum: Memory::BYTES / median(sums),
            triad: Memory::BYTES / median(triads),
            prompt_s: median(prompts),
            forward_s: median(forwards),
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
    model.loss(x, tokens).unwrap().to_scalar().unwrap()
}

/// Seconds that a run takes.
fn time<R>(run: impl FnOnce() -> R) -> f64 {
    let start = Instant::now();
    black_box(run());
    start.elapsed().as_secs_f64()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

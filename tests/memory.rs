//! What forward and backward hold at each moment, under each way of recomputing.

use std::alloc::System;
use std::cell::{Cell, RefCell};

use candle_core::{DType, Device, Tensor};
use titan::autograd::{Precision, StageBuilder, Value};
use titan::engine::{self, MicroBatch, Pass, Recompute, Stages};
use titan::models::args::DecoderArgs;
use titan::models::{self, Decoder};
use titan::ops::LossAndGrad;
use titan::tools::memory::{self, Counted};

#[global_allocator]
static ALLOCATOR: Counted<System, 0> = Counted(System);

const ROWS: usize = 2;
const SEQ_LEN: usize = 128;
const TOKENS: usize = ROWS * SEQ_LEN;

fn args(n_layers: usize) -> DecoderArgs {
    let mut args = models::flavor("llama3", "debugmodel").unwrap();
    args.n_layers = n_layers;
    args.dim = 256;
    args.n_heads = 8;
    args.n_kv_heads = Some(4);
    args.vocab_size = 512;
    args.max_seq_len = SEQ_LEN;
    args
}

/// Bytes of a stage's input, `(b, s, dim)`, f32.
fn input_bytes(args: &DecoderArgs) -> usize {
    4 * TOKENS * args.dim
}

/// Bytes that a block keeps from forward to backward, its input included.
fn block_bytes(args: &DecoderArgs, compute: DType) -> usize {
    let (q, kv, hidden) = (args.dim, args.n_kv_heads() * args.head_dim(), args.ffn_hidden_dim());
    let residual = 2 * args.dim; // input, and input with attention added
    let activations = 2 * args.dim // both norms
        + 2 * q + 2 * kv // queries, keys, values, attention's result
        + 2 * hidden; // gate and up
    let statistics = 2 + args.n_heads; // of norms, and of each softmax
    TOKENS * (4 * (residual + statistics) + compute.size_in_bytes() * activations)
}

/// Bytes that an op may need besides what is kept: a few matrices as wide as the hidden layer, f32. Far less than a
/// second copy of the gradients.
fn working_bytes(args: &DecoderArgs) -> usize {
    6 * 4 * TOKENS * args.ffn_hidden_dim()
}

/// Bytes per block beyond those of its tensors' numbers: tape, shapes, reference counts. candle's `Storage` and `Device`, which
/// each tensor has, are larger by 167 bytes where they may be a GPU's.
const OVERHEAD: usize = if cfg!(feature = "cuda") { 10 << 10 } else { 8 << 10 };

/// A call of the engine, and the bytes that were live when it came, beyond those before the pass.
type Call = (&'static str, usize, usize);

/// A model that notes each call.
struct Watched {
    model: Decoder,
    before: u64,
    calls: RefCell<Vec<Call>>,
    peak: Cell<u64>,
}

impl Watched {
    fn note(&self, name: &'static str, index: usize) {
        let now = memory::mark();
        self.peak.set(self.peak.get().max(now.peak));
        self.calls.borrow_mut().push((name, index, (now.held - self.before) as usize));
    }
}

impl Stages for Watched {
    type Context = <Decoder as Stages>::Context;

    fn stages(&self) -> &[StageBuilder] {
        self.model.stages()
    }

    fn context(&self, tokens: &Tensor, document_starts: Option<&[u32]>) -> titan::Result<Self::Context> {
        self.model.context(tokens, document_starts)
    }

    fn embed(&self, tokens: &Tensor) -> titan::Result<Tensor> {
        self.model.embed(tokens)
    }

    fn embed_backward(&self, tokens: &Tensor, dy: &Tensor) -> titan::Result<()> {
        self.note("embed_backward", 0);
        self.model.embed_backward(tokens, dy)
    }

    fn n_blocks(&self) -> usize {
        self.model.n_blocks()
    }

    fn block(&self, index: usize, x: &Value, context: &Self::Context, pass: Pass) -> titan::Result<Value> {
        self.note(if pass == Pass::Recompute { "recompute" } else { "forward" }, index);
        self.model.block(index, x, context, pass)
    }

    fn loss(&self, x: Tensor, labels: &Tensor) -> titan::Result<Tensor> {
        self.model.loss(x, labels)
    }

    fn loss_grad(&self, x: Tensor, labels: &Tensor, scale: f64) -> titan::Result<LossAndGrad> {
        self.note("loss", 0);
        self.model.loss_grad(x, labels, scale)
    }
}

struct Measured {
    calls: Vec<Call>,
    /// Beyond what was live before.
    peak: usize,
    /// Live after the pass less live before it.
    left: isize,
}

/// The second of two passes: the first takes the buffers that threads keep for good. On one thread, so that these are
/// the same every time.
fn measure(args: &DecoderArgs, compute: DType, recompute: Recompute) -> Measured {
    let mut model = Decoder::new(args, Some(0)).unwrap();
    model.allocate(Precision { storage: DType::F32, compute }, &Device::Cpu, true).unwrap();
    model.parameters().for_each(|parameter| models::initialize(parameter, 0).unwrap());
    let ids: Vec<u32> = (0..TOKENS).map(|i| (i * 7919 % args.vocab_size) as u32).collect();
    let tokens = Tensor::from_vec(ids, (ROWS, SEQ_LEN), &Device::Cpu).unwrap();
    let mut watched = Watched { model, before: 0, calls: RefCell::default(), peak: Cell::default() };
    let batch = MicroBatch::new(tokens.clone(), tokens);
    let pass = |watched: &Watched| engine::forward_backward(watched, &batch, 1.0, recompute).unwrap();
    pass(&watched);

    watched.calls = RefCell::new(Vec::with_capacity(3 * args.n_layers)); // noting a call takes no memory
    watched.peak.set(0);
    watched.before = memory::mark().held;
    pass(&watched);
    let now = memory::mark();
    let left = now.held as isize - watched.before as isize;
    let peak = (now.peak.max(watched.peak.get()) - watched.before) as usize;
    Measured { calls: watched.calls.take(), peak, left }
}

/// Holds one pass to what its mode promises, and returns its peak.
fn check(n_layers: usize, compute: DType, mode: Recompute) -> usize {
    let args = args(n_layers);
    let again = |block: usize| match mode {
        Recompute::None => false,
        Recompute::EveryNth(n) => block % n == n - 1,
        Recompute::All => true,
    };
    let (input, block) = (input_bytes(&args), block_bytes(&args, compute));
    let kept = |blocks: usize| -> usize { (0..blocks).map(|i| if again(i) { input } else { block }).sum() };

    let mut expected: Vec<Call> = (0..n_layers).map(|i| ("forward", i, kept(i) + input)).collect();
    expected.push(("loss", 0, kept(n_layers) + input));
    // Its input and the gradient of its result; of the blocks behind it nothing is left.
    expected.extend((0..n_layers).rev().filter(|i| again(*i)).map(|i| ("recompute", i, kept(i) + 2 * input)));
    expected.push(("embed_backward", 0, input));

    let case = format!("{n_layers} blocks, {compute:?}, {mode:?}");
    let measured = measure(&args, compute, mode);
    let overhead = n_layers * OVERHEAD;
    assert_eq!(measured.calls.len(), expected.len(), "{case}");
    for (call, (name, index, most)) in measured.calls.iter().zip(expected) {
        assert_eq!((call.0, call.1), (name, index), "{case}");
        assert!(call.2 <= most + overhead, "{case}: {} bytes live, {most} promised at {name} {index}", call.2);
    }
    let one_again = if mode == Recompute::None { 0 } else { block };
    let most = kept(n_layers) + 2 * input + one_again + working_bytes(&args) + overhead;
    assert!(measured.peak <= most, "{case}: a peak of {} bytes, {most} promised", measured.peak);
    assert_eq!(measured.left, 0, "{case}: a pass leaves nothing behind");
    measured.peak
}

#[test]
fn each_mode_keeps_what_it_promises_and_frees_it_as_backward_goes() {
    rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(check_all);
}

fn check_all() {
    for compute in [DType::F32, DType::BF16] {
        let [none, second, all] = [Recompute::None, Recompute::EveryNth(2), Recompute::All].map(|mode| {
            let (few, many) = (check(4, compute, mode), check(8, compute, mode));
            (many, (many - few) / 4)
        });
        assert!(all.0 < second.0 && second.0 < none.0, "peaks: {all:?} {second:?} {none:?}");

        let (input, block) = (input_bytes(&args(1)), block_bytes(&args(1), compute));
        for ((_, per_block), promised) in [(all, input), (second, (input + block) / 2), (none, block)] {
            assert!(per_block <= promised + OVERHEAD, "{compute:?}: a block adds {per_block} bytes, not {promised}");
        }
        assert!(all.1 >= input, "what `All` keeps is no less than the stages' inputs");
    }
}

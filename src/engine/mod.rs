//! Forward and backward over the stages of a model.
//!
//! The stage is the unit of everything: the embedding, each block, the head with the loss. The engine keeps between
//! forward and backward only what the [`Recompute`] mode says, and walks backward stage by stage; a stage's activations
//! are freed the moment its backward is done. No code outside knows how backward is organised, and no layer knows which
//! mode is on.

mod diagnosis;

use candle_core::Tensor;

pub use diagnosis::{Fault, diagnose, largest_gradient};

use crate::Result;
use crate::autograd::{StageBuilder, Value};
use crate::ops::LossAndGrad;
use crate::tools::profiler::{self, Category};

/// What goes through a model at once.
#[derive(Clone, Debug)]
pub struct MicroBatch {
    /// `(b, s)`, u32; so are `labels`, of which those that are [`IGNORE_INDEX`](crate::ops::IGNORE_INDEX) do not count.
    pub tokens: Tensor,
    pub labels: Tensor,
    /// Where in its row the document of each token begins, `b · s` numbers; `None`: in a model that masks
    /// documents, end-of-text tokens tell.
    pub document_starts: Option<Vec<u32>>,
}

impl MicroBatch {
    pub fn new(tokens: Tensor, labels: Tensor) -> Self {
        Self { tokens, labels, document_starts: None }
    }
}

/// What a pass over a block is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The one pass of a training step that counts.
    Training,
    /// A repetition of [`Pass::Training`] for the activations inside: what comes out is read by nobody, and need not be right.
    Recompute,
    /// Neither trains nor counts.
    Evaluation,
}

/// A model as a list of stages.
pub trait Stages {
    /// What the blocks share in a pass, besides activations.
    type Context;

    /// The memory of each stage: embedding, blocks, head.
    fn stages(&self) -> &[StageBuilder];

    /// `document_starts`: as in [`MicroBatch`].
    fn context(&self, tokens: &Tensor, document_starts: Option<&[u32]>) -> Result<Self::Context>;

    /// `(b, s)` tokens to `(b, s, dim)`.
    fn embed(&self, tokens: &Tensor) -> Result<Tensor>;

    /// Adds to the embedding's gradient, if it has one.
    fn embed_backward(&self, tokens: &Tensor, dy: &Tensor) -> Result<()>;

    fn n_blocks(&self) -> usize;

    /// `(b, s, dim) -> (b, s, dim)`.
    fn block(&self, index: usize, x: &Value, context: &Self::Context, pass: Pass) -> Result<Value>;

    /// The mean loss over the `labels`, `(b, s)`, that count: `()`, f32.
    fn loss(&self, x: Tensor, labels: &Tensor) -> Result<Tensor>;

    /// As [`Stages::loss`], times `scale`, with its gradient.
    fn loss_grad(&self, x: Tensor, labels: &Tensor, scale: f64) -> Result<LossAndGrad>;
}

/// Which blocks run forward a second time in backward, instead of keeping their activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    None,
    /// Blocks `n - 1, 2n - 1, ...`
    EveryNth(usize),
    All,
}

impl Recompute {
    fn includes(self, block: usize) -> bool {
        match self {
            Self::None => false,
            Self::EveryNth(n) => (block + 1).is_multiple_of(n),
            Self::All => true,
        }
    }
}

/// What is kept of a block between its forward and its backward.
enum Kept {
    Input(Tensor),
    Graph(Value),
}

/// What comes out of a stage.
#[derive(Clone, Copy)]
enum Out<'a> {
    Activations(&'a Tensor),
    Loss(&'a Tensor),
    /// Of the stage's input, as are now those of its parameters.
    Gradients(&'a Tensor),
}

/// Runs a micro-batch forward and backward: adds the gradients of `scale` times the mean loss to the accumulators of all
/// parameters, and returns that loss, `()` f32, on the model's device: reading it waits for the pass.
pub fn forward_backward<M: Stages>(model: &M, batch: &MicroBatch, scale: f64, recompute: Recompute) -> Result<Tensor> {
    forward_backward_in(model, batch, &context(model, batch)?, scale, recompute)
}

/// What the blocks share in the passes of a micro-batch. Passes of another one may share it too where nothing depends on the
/// tokens: where all rows are as long, and no mask follows documents.
pub fn context<M: Stages>(model: &M, batch: &MicroBatch) -> Result<M::Context> {
    let MicroBatch { tokens, document_starts, .. } = batch;
    profiler::span_in(Category::Forward, "context").around(|| model.context(tokens, document_starts.as_deref()))
}

/// As [`forward_backward`], with a context that is there already.
pub fn forward_backward_in<M: Stages>(
    model: &M,
    batch: &MicroBatch,
    context: &M::Context,
    scale: f64,
    recompute: Recompute,
) -> Result<Tensor> {
    watched(model, batch, context, scale, recompute, &mut |_, _| Ok(()))
}

/// As [`forward_backward_in`]; shows `watch` what comes out of each stage, by its number.
fn watched<M: Stages>(
    model: &M,
    batch: &MicroBatch,
    context: &M::Context,
    scale: f64,
    recompute: Recompute,
    watch: &mut impl FnMut(usize, Out) -> Result<()>,
) -> Result<Tensor> {
    let MicroBatch { tokens, labels, .. } = batch;
    let span = |category, stage: usize| profiler::span_in(category, model.stages()[stage].name());
    let head = model.n_blocks() + 1;
    let mut x = span(Category::Forward, 0).around(|| model.embed(tokens))?;
    watch(0, Out::Activations(&x))?;
    let mut kept = Vec::with_capacity(model.n_blocks());
    for index in 0..model.n_blocks() {
        let _span = span(Category::Forward, index + 1);
        if recompute.includes(index) {
            let y = model.block(index, &Value::constant(x.clone()), context, Pass::Training)?;
            kept.push(Kept::Input(std::mem::replace(&mut x, y.tensor().clone())));
        } else {
            let y = model.block(index, &Value::input(x), context, Pass::Training)?;
            x = y.tensor().clone();
            kept.push(Kept::Graph(y));
        }
        watch(index + 1, Out::Activations(&x))?;
    }

    let LossAndGrad { loss, dx } =
        span(Category::ForwardBackward, head).around(|| model.loss_grad(x, labels, scale))?;
    let mut grad = dx;
    watch(head, Out::Loss(&loss))?;
    watch(head, Out::Gradients(&grad))?;
    while let Some(block) = kept.pop() {
        let index = kept.len();
        let graph = match block {
            Kept::Graph(graph) => graph,
            Kept::Input(x) => span(Category::Recompute, index + 1)
                .around(|| model.block(index, &Value::input(x), context, Pass::Recompute))?,
        };
        grad = span(Category::Backward, index + 1).around(|| graph.backward(grad))?;
        watch(index + 1, Out::Gradients(&grad))?;
    }
    span(Category::Backward, 0).around(|| model.embed_backward(tokens, &grad))?;
    watch(0, Out::Gradients(&grad))?;
    Ok(loss)
}

/// The mean loss of a batch, forward only; changes nothing.
pub fn evaluate<M: Stages>(model: &M, batch: &MicroBatch) -> Result<f32> {
    let MicroBatch { tokens, labels, .. } = batch;
    let span = |stage: usize| profiler::span(model.stages()[stage].name());
    let context = context(model, batch)?;
    let mut x = span(0).around(|| model.embed(tokens))?;
    for index in 0..model.n_blocks() {
        let _span = span(index + 1);
        x = model.block(index, &Value::constant(x), &context, Pass::Evaluation)?.tensor().clone();
    }
    let loss = span(model.n_blocks() + 1).around(|| model.loss(x, labels))?;
    Ok(loss.to_scalar()?)
}

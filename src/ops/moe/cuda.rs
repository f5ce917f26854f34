use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Tensor};

use super::{Experts, Hidden, Router, Routing};
use crate::Result;
use crate::autograd::Parameter;
use crate::models::args::ScoreFunc;
use crate::ops::Residual;
use crate::ops::gpu::{by_eights, device, elements, is_hopper, launch, suffix, uninit};
use crate::ops::sort::Groups;

/// Threads of a block, in `kernel.cu`, and the warps that they are; products have blocks of their own.
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;
/// Experts that the lanes of a warp can mark as taken.
const MAX_EXPERTS: usize = 1024;
/// Rows of the tiles that the rows of each expert are cut into.
const TILE_ROWS: usize = 128;
/// Tiles that keep the multiprocessors of a GPU busy.
const MANY_TILES: usize = 128;

/// Weights and choices.
pub fn route(logits: &Tensor, bias: Option<&Tensor>, router: &Router) -> Result<(Tensor, Tensor)> {
    let (n, n_experts) = logits.dims2()?;
    let Router { top_k, groups, .. } = *router;
    assert!(n_experts <= MAX_EXPERTS, "a warp routes among at most {MAX_EXPERTS} experts");
    assert!(top_k <= n_experts || router.force_load_balance, "a token chooses among {n_experts} experts");
    let logits = elements(logits, logits.dtype())?;
    let device = device(&logits);
    let experts = uninit((n, top_k), DType::U32, device)?;
    let weights = uninit((n, top_k), DType::F32, device)?;
    let (groups, limit) = groups.map_or((0, 0), |groups| (groups.n, groups.limit));
    // Scores and choices of each warp's token, sums of groups, and who is chosen.
    let shared = WARPS * (2 * n_experts + groups + top_k) * 4;
    launch!(
        device, "moe", &format!("moe_route_{}", suffix(logits.dtype())),
        grid: [n.div_ceil(WARPS), 1, 1], block: THREADS, shared: shared;
        &logits, bias, n, n_experts as i32, top_k as i32, is_softmax(router), groups as i32, limit as i32,
        i32::from(router.route_norm), router.route_scale, i32::from(router.force_load_balance), &experts, &weights,
    );
    Ok((weights, experts))
}

pub fn route_backward(logits: &Tensor, choices: &Tensor, router: &Router, dweights: &Tensor) -> Result<Tensor> {
    let (n, n_experts) = logits.dims2()?;
    let logits = elements(logits, logits.dtype())?;
    let dweights = elements(dweights, DType::F32)?;
    let device = device(&logits);
    let dlogits = uninit((n, n_experts), logits.dtype(), device)?;
    // Scores of each warp's token, and gradients of those that were chosen.
    let shared = WARPS * (n_experts + router.top_k) * 4;
    launch!(
        device, "moe", &format!("moe_route_backward_{}", suffix(logits.dtype())),
        grid: [n.div_ceil(WARPS), 1, 1], block: THREADS, shared: shared;
        &logits, choices, &dweights, n, n_experts as i32, router.top_k as i32, is_softmax(router),
        i32::from(router.route_norm), router.route_scale, &dlogits,
    );
    Ok(dlogits)
}

fn is_softmax(router: &Router) -> i32 {
    i32::from(matches!(router.score_func, ScoreFunc::Softmax))
}

/// Counts the slots of each expert, and cuts them into tiles of rows, `(n_tiles, 4)`.
pub fn cut(slots: &Groups, counter: Option<&Tensor>) -> Result<Option<Tensor>> {
    let n_experts = slots.offsets.elem_count() - 1;
    let n_tiles = most_tiles(slots.order.elem_count(), n_experts);
    let device = device(&slots.offsets);
    let tiles = uninit((n_tiles, 4), DType::U32, device)?;
    launch!(
        device, "moe", "moe_tiles", grid: [1, 1, 1], block: THREADS, shared: (n_experts + 1) * 4;
        &slots.offsets, n_experts, n_tiles, &tiles, counter,
    );
    Ok(Some(tiles))
}

pub fn rebalance(tokens: &Tensor, counted: &Tensor, bias: Option<(&Tensor, f32)>) -> Result<()> {
    let n_experts = tokens.dims1()?;
    let (bias, coeff) = (bias.map(|(bias, _)| bias), bias.map_or(0.0, |(_, coeff)| coeff));
    launch!(
        device(tokens), "moe", "moe_rebalance", grid: [1, 1, 1], block: THREADS, shared: n_experts * 4;
        tokens, counted, bias, n_experts, coeff,
    );
    Ok(())
}

/// How products are computed: the ends of the kernels' names.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Engine {
    /// Tiles of 128 x 128 on tensor cores.
    Large,
    /// The same by warpgroups, on a Hopper.
    Hopper,
    /// Tiles of 64 x 64 on tensor cores.
    Small,
    /// Tiles of 64 x 64 without tensor cores, for rows of any length.
    Plain(DType),
}

impl Engine {
    /// For tiles of `columns` columns and the rows of `n_experts` experts, `slots` in all.
    fn of_rows(dtype: DType, aligned: bool, slots: usize, n_experts: usize, columns: usize) -> Self {
        // Tiles of 128 rows that are mostly empty take as long as full ones.
        let filled = 4 * slots >= 3 * TILE_ROWS * n_experts;
        let tiles = slots.div_ceil(TILE_ROWS) * columns.div_ceil(TILE_ROWS);
        Self::of(dtype, aligned, filled && columns >= 96 && tiles >= MANY_TILES)
    }

    /// For gradients of `n_experts` matrices of `rows` rows and `columns` columns.
    fn of_gradients(dtype: DType, aligned: bool, n_experts: usize, rows: usize, columns: usize) -> Self {
        let tiles = n_experts * rows.div_ceil(TILE_ROWS) * columns.div_ceil(TILE_ROWS);
        Self::of(dtype, aligned, rows.min(columns) >= 96 && tiles >= MANY_TILES)
    }

    fn of(dtype: DType, aligned: bool, large: bool) -> Self {
        match dtype {
            DType::BF16 if aligned && large => Self::Large,
            DType::BF16 if aligned => Self::Small,
            _ => Self::Plain(dtype),
        }
    }

    /// The best for such products that the GPU has.
    fn on(self, is_hopper: bool) -> Self {
        if is_hopper && self == Self::Large { Self::Hopper } else { self }
    }

    /// Rows of a tile, and its columns.
    fn tile(self) -> usize {
        match self {
            Self::Large | Self::Hopper => 128,
            Self::Small | Self::Plain(_) => 64,
        }
    }

    fn threads(self) -> usize {
        match self {
            Self::Large | Self::Small => 128,
            Self::Hopper | Self::Plain(_) => 256,
        }
    }

    /// Stages of both operands, so many deep.
    fn shared_bytes(self) -> usize {
        let (stages, depth) = match self {
            Self::Large | Self::Small => (4, 32),
            Self::Hopper => (3, 64),
            Self::Plain(_) => return 0,
        };
        stages * 2 * self.tile() * depth * 2
    }

    fn module(self) -> &'static str {
        if self == Self::Hopper { "moe_hopper" } else { "moe" }
    }

    fn kernel(self, product: &str) -> String {
        let end = match self {
            Self::Large => "large",
            Self::Hopper => "hopper",
            Self::Small => "small",
            Self::Plain(dtype) => suffix(dtype),
        };
        format!("moe_{product}_{end}")
    }
}

/// Tiles that the rows of all experts can be cut into, at most: each expert has at most one that is not full, and none is
/// empty.
fn most_tiles(slots: usize, n_experts: usize) -> usize {
    (slots / TILE_ROWS + n_experts).min(slots)
}

/// What the experts of a layer are, for kernels.
struct Layer<'a> {
    device: &'a CudaDevice,
    routing: &'a Routing,
    experts: &'a Experts,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    tiles: &'a Tensor,
    n_tiles: usize,
    dtype: DType,
    slots: usize,
    n_experts: usize,
    hidden: usize,
    dim: usize,
    /// Whether tensor cores can be given the weights.
    aligned: bool,
    is_hopper: bool,
}

impl<'a> Layer<'a> {
    fn new(routing: &'a Routing, experts: &'a Experts) -> Result<Self> {
        let [n_experts, hidden, dim] = *experts.w1.shape() else {
            unreachable!("expert weights have three dimensions")
        };
        let (w1, w2, w3) = (experts.w1.compute()?, experts.w2.compute()?, experts.w3.compute()?);
        let aligned = by_eights(dim, &[&w1, &w2, &w3])? && hidden.is_multiple_of(8);
        let device = device(&routing.experts);
        let (slots, dtype) = (routing.n_slots(), w1.dtype());
        let tiles = routing.tiles.as_ref().expect("a routing on a GPU has tiles");
        let (n_tiles, is_hopper) = (tiles.dim(0)?, is_hopper(device)?);
        Ok(Self {
            device,
            routing,
            experts,
            w1,
            w2,
            w3,
            tiles,
            n_tiles,
            dtype,
            slots,
            n_experts,
            hidden,
            dim,
            aligned,
            is_hopper,
        })
    }

    fn engine(&self, columns: usize) -> Engine {
        Engine::of_rows(self.dtype, self.aligned, self.slots, self.n_experts, columns).on(self.is_hopper)
    }

    /// A block for each tile of a product of rows, each row tile in parts where tiles are smaller.
    fn grid(&self, engine: Engine, columns: usize) -> [usize; 3] {
        [columns.div_ceil(engine.tile()), self.n_tiles, TILE_ROWS / engine.tile()]
    }

    fn rows(&self, width: usize, dtype: DType) -> Result<Tensor> {
        uninit((self.slots, width), dtype, self.device)
    }

    /// Bias `which`, and whether it is bf16.
    fn bias(&self, which: usize) -> Result<(Option<Tensor>, i32)> {
        let bias = self.experts.biases.as_ref().map(|biases| biases[which].weights()).transpose()?;
        let low = bias.as_ref().is_some_and(|bias| bias.dtype() == DType::BF16);
        Ok((bias, i32::from(low)))
    }

    /// The rows of `x` in the order of the sorted slots, times the slot's weight if there are weights.
    fn gather(&self, x: &Tensor, weights: Option<&Tensor>) -> Result<Tensor> {
        self.gather_and_dots(x, weights, None)
    }

    /// As [`Layer::gather`]; and the products of the rows of `x`, unweighted, with those of `other` go to `dots`.
    fn gather_and_dots(
        &self,
        x: &Tensor,
        weights: Option<&Tensor>,
        dots: Option<(&Tensor, &Tensor)>,
    ) -> Result<Tensor> {
        let rows = self.rows(self.dim, self.dtype)?;
        let (other, dots) = dots.unzip();
        let by_eights = by_eights(self.dim, &[x, &rows, other.unwrap_or(x)])?;
        launch!(
            self.device, "moe", &row_kernel("gather", x, &rows, by_eights),
            grid: [self.slots.div_ceil(WARPS), 1, 1], block: THREADS;
            x, &self.routing.slots.order, weights, self.slots, self.routing.top_k as i32, self.dim, &rows, other, dots,
        );
        Ok(rows)
    }

    /// For each token the sum of the rows of its slots, times their weights if there are weights, and of its row of `others` if
    /// there are any; and the products of the rows, unweighted, with the token's row of `x` go to `dots`.
    fn scatter_sum(
        &self,
        rows: &Tensor,
        weights: Option<&Tensor>,
        dtype: DType,
        others: Option<&Tensor>,
        dots: Option<(&Tensor, &Tensor)>,
    ) -> Result<Tensor> {
        let top_k = self.routing.top_k;
        let n = self.slots / top_k;
        let y = uninit((n, self.dim), dtype, self.device)?;
        let others = others.map(|others| elements(others, dtype)).transpose()?;
        let (x, dots) = dots.unzip();
        let by_eights = by_eights(self.dim, &[rows, &y, others.as_ref().unwrap_or(&y), x.unwrap_or(&y)])?;
        let threads = self.dim.div_ceil(if by_eights { 8 } else { 1 }).next_multiple_of(32).min(THREADS);
        let shared = if dots.is_some() { threads / 32 * top_k * 4 } else { 0 };
        launch!(
            self.device, "moe", &row_kernel("scatter", rows, &y, by_eights),
            grid: [n, 1, 1], block: threads, shared: shared;
            rows, &self.routing.slots.positions, weights, top_k as i32, self.dim, others.as_ref(), &y, x, dots,
        );
        Ok(y)
    }

    /// Gate, up, and what is made of them, for rows of tokens in the compute dtype, times the slots' weights if there are
    /// weights.
    fn up(&self, engine: Engine, x: &Tensor, weights: Option<&Tensor>) -> Result<[Tensor; 3]> {
        let new = || self.rows(self.hidden, self.dtype);
        let [gate, up, activated] = [new()?, new()?, new()?];
        let ((b1, low), (b3, _)) = (self.bias(0)?, self.bias(2)?);
        let (kind, limit) = self.experts.gate.for_kernel();
        launch!(
            self.device, engine.module(), &engine.kernel("up"),
            grid: self.grid(engine, 2 * self.hidden), block: engine.threads(), shared: engine.shared_bytes();
            x, &self.routing.slots.order, weights, self.routing.top_k as i32, &self.w1, &self.w3, b1.as_ref(), b3.as_ref(), low,
            self.tiles, self.dim as i32, self.hidden as i32, kind, limit, &gate, &up, &activated,
        );
        Ok([gate, up, activated])
    }

    fn down(&self, engine: Engine, activated: &Tensor) -> Result<Tensor> {
        let result = self.rows(self.dim, self.dtype)?;
        let (b2, low) = self.bias(1)?;
        launch!(
            self.device, engine.module(), &engine.kernel("down"),
            grid: self.grid(engine, self.dim), block: engine.threads(), shared: engine.shared_bytes();
            activated, &self.w2, b2.as_ref(), low, self.tiles, self.dim as i32, self.hidden as i32, &result,
        );
        Ok(result)
    }

    /// The gradients of gate and up, and the activated anew where it is wanted.
    fn down_backward(
        &self,
        engine: Engine,
        dresult: &Tensor,
        hidden: &Hidden,
        wanted: bool,
    ) -> Result<(Tensor, Tensor, Option<Tensor>)> {
        let new = || self.rows(self.hidden, self.dtype);
        let (dgate, dup, activated) = (new()?, new()?, wanted.then(new).transpose()?);
        let (kind, limit) = self.experts.gate.for_kernel();
        launch!(
            self.device, engine.module(), &engine.kernel("down_backward"),
            grid: self.grid(engine, self.hidden), block: engine.threads(), shared: engine.shared_bytes();
            dresult, &self.w2, self.tiles, self.dim as i32, self.hidden as i32, kind, limit,
            &hidden.gate, &hidden.up, &dgate, &dup, activated.as_ref(),
        );
        Ok((dgate, dup, activated))
    }

    /// The gradient of the input.
    fn up_backward(&self, engine: Engine, dgate: &Tensor, dup: &Tensor) -> Result<Tensor> {
        let dinput = self.rows(self.dim, self.dtype)?;
        launch!(
            self.device, engine.module(), &engine.kernel("up_backward"),
            grid: self.grid(engine, self.dim), block: engine.threads(), shared: engine.shared_bytes();
            dgate, dup, &self.w1, &self.w3, self.tiles, self.dim as i32, self.hidden as i32, &dinput,
        );
        Ok(dinput)
    }

    /// `grads[i][e] += dys[i]ᵀ x` over the slots of each expert, for the gradients of one weight or of two alike.
    fn accumulate(&self, grads: &[Tensor], dys: &[&Tensor], x: &Tensor) -> Result<()> {
        let (n_experts, rows, columns) = grads[0].dims3()?;
        let mut aligned = rows.is_multiple_of(8);
        for (grad, dy) in grads.iter().zip(dys) {
            aligned = aligned && by_eights(columns, &[dy, x, grad])?;
        }
        let engine = Engine::of_gradients(self.dtype, aligned, grads.len() * n_experts, rows, columns);
        self.add_gradients(engine.on(self.is_hopper), grads, dys, x)
    }

    fn add_gradients(&self, engine: Engine, grads: &[Tensor], dys: &[&Tensor], x: &Tensor) -> Result<()> {
        let (n_experts, rows, columns) = grads[0].dims3()?;
        let tiles = |size: usize| size.div_ceil(engine.tile());
        launch!(
            self.device, engine.module(), &engine.kernel("gradient"),
            grid: [tiles(columns), tiles(rows), grads.len() * n_experts], block: engine.threads(),
            shared: engine.shared_bytes();
            dys[0], dys.get(1).copied(), x, &self.routing.slots.offsets, n_experts as i32, rows as i32, columns as i32,
            &grads[0], grads.get(1),
        );
        Ok(())
    }

    /// `grad[e] += Σ dy` over the slots of each expert, for bias `which`, if there are biases that are trained.
    fn accumulate_bias(&self, which: usize, dy: &Tensor) -> Result<()> {
        let Some(bias) = self.experts.biases.as_ref().map(|biases| &biases[which]) else { return Ok(()) };
        let Some(grad) = bias.accumulator()? else { return Ok(()) };
        let (n_experts, width) = grad.dims2()?;
        launch!(
            self.device, "moe", &format!("moe_bias_gradient_{}", suffix(dy.dtype())),
            grid: [width.div_ceil(32), n_experts, 1], block: THREADS;
            dy, &self.routing.slots.offsets, width, &grad,
        );
        Ok(())
    }
}

/// The kernel that moves rows of one dtype to another, 8 numbers at a time or one.
fn row_kernel(name: &str, from: &Tensor, to: &Tensor, by_eights: bool) -> String {
    let n = if by_eights { 8 } else { 1 };
    format!("moe_{name}_{}_{}_{n}", suffix(from.dtype()), suffix(to.dtype()))
}

/// The result, added to `residual` if there is one; `None` if that is not read.
pub fn forward(
    x: &Tensor,
    weights: &Tensor,
    routing: &Routing,
    experts: &Experts,
    residual: Option<Residual>,
) -> Result<(Option<Tensor>, Hidden)> {
    let layer = Layer::new(routing, experts)?;
    let (x, weights) = (elements(x, x.dtype())?, elements(weights, DType::F32)?);
    let (before, after) = weights_of(experts, &weights);

    // Products pick rows of tokens themselves.
    let low = elements(&x, layer.dtype)?;
    let aligned = by_eights(layer.dim, &[&low])?;
    let engine = if aligned { layer.engine(2 * layer.hidden) } else { Engine::Plain(layer.dtype) };
    let [gate, up, activated] = layer.up(engine, &low, before)?;
    drop(low);
    let is_read = residual.is_none_or(|residual| residual.is_read);
    let result = (is_read || after.is_some()).then(|| layer.down(layer.engine(layer.dim), &activated)).transpose()?;
    drop(activated);
    let stream = residual.map(|residual| residual.stream.tensor());
    let dtype = stream.unwrap_or(&x).dtype();
    let read = result.as_ref().filter(|_| is_read);
    let y = read.map(|result| layer.scatter_sum(result, after, dtype, stream, None)).transpose()?;
    Ok((y, Hidden { gate, up, result: result.filter(|_| after.is_some()) }))
}

/// The gradients of `x`, added to `sum` if there is one, and of `weights`.
pub fn backward(
    (x, weights, hidden): (&Tensor, &Tensor, &Hidden),
    routing: &Routing,
    experts: &Experts,
    dy: &Tensor,
    sum: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let layer = Layer::new(routing, experts)?;
    let (x, dy, weights) = (elements(x, x.dtype())?, elements(dy, dy.dtype())?, elements(weights, DType::F32)?);
    let (before, after) = weights_of(experts, &weights);
    // Weights of a stage are trained together.
    let grad = |weight: &Parameter| weight.accumulator();
    let grads = match (grad(&experts.w1)?, grad(&experts.w2)?, grad(&experts.w3)?) {
        (Some(w1), Some(w2), Some(w3)) => Some(([w1, w3], w2)),
        _ => None,
    };

    // A weight's gradient is the product of what it scaled with the gradient of the scaled: of a result here, or of `x` below.
    let dweights = uninit(weights.shape(), DType::F32, layer.device)?;
    let dresult = layer.gather_and_dots(&dy, after, hidden.result.as_ref().map(|result| (result, &dweights)))?;
    let engine = layer.engine(layer.hidden);
    let (dgate, dup, activated) = layer.down_backward(engine, &dresult, hidden, grads.is_some())?;
    if let (Some((_, grad)), Some(activated)) = (&grads, activated) {
        layer.accumulate(std::slice::from_ref(grad), &[&dresult], &activated)?;
    }
    layer.accumulate_bias(1, &dresult)?;
    drop(dresult);
    if let Some((grads, _)) = &grads {
        layer.accumulate(grads, &[&dgate, &dup], &layer.gather(&x, before)?)?;
    }
    layer.accumulate_bias(0, &dgate)?;
    layer.accumulate_bias(2, &dup)?;
    let dinput = layer.up_backward(layer.engine(layer.dim), &dgate, &dup)?;
    drop((dgate, dup));

    let dx = layer.scatter_sum(&dinput, before, x.dtype(), sum, before.map(|_| (&x, &dweights)))?;
    Ok((dx, dweights))
}

/// The weights that multiply tokens before the experts, and those that multiply results after them.
fn weights_of<'a>(experts: &Experts, weights: &'a Tensor) -> (Option<&'a Tensor>, Option<&'a Tensor>) {
    if experts.score_before_experts { (Some(weights), None) } else { (None, Some(weights)) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Device;

    use super::*;
    use crate::ops::glu::Gate;
    use crate::ops::testing::{assert_close, devices, parameters_on, random_tensor};

    /// Against the plain one, whose products other tests hold to their reference: on experts with no row, one, and a row
    /// more or less than a tile has, and matrices that no tile divides.
    #[test]
    fn all_engines_have_the_same_products() -> Result<()> {
        let (dim, hidden, counts) = (136, 200, [127, 0, 1, 300, 129, 65]);
        let slots = counts.iter().sum();
        let shapes: [&[usize]; 6] =
            [&[6, hidden, dim], &[6, dim, hidden], &[6, hidden, dim], &[6, hidden], &[6, dim], &[6, hidden]];
        let values = shapes.iter().map(|shape| random_tensor("w", shape)).collect::<Result<Vec<_>>>()?;
        for device in devices().iter().filter(|device| device.is_cuda()) {
            let p = parameters_on(device, &values, DType::BF16)?;
            let all = Experts {
                w1: p[0].clone(),
                w2: p[1].clone(),
                w3: p[2].clone(),
                biases: Some([3, 4, 5].map(|i| Arc::clone(&p[i]))),
                gate: Gate::Clamped { limit: 0.7 },
                score_before_experts: true,
            };
            // Choices in an order that is not sorted.
            let mut choices: Vec<u32> = (0..).zip(counts).flat_map(|(e, n)| vec![e; n]).collect();
            choices.rotate_left(201);
            let routing = Routing::new(Tensor::from_vec(choices, (slots / 2, 2), device)?, counts.len(), None)?;
            let tokens = random_tensor("tokens", &[slots / 2, dim])?.to_dtype(DType::BF16)?.to_device(device)?;
            let weights = random_tensor("weights", &[slots / 2, 2])?.to_device(device)?;
            let layer = Layer::new(&routing, &all)?;
            assert!(layer.aligned, "rows of multiples of 8");
            let random = |name, width: usize| -> Result<Tensor> {
                Ok(random_tensor(name, &[slots, width])?.to_dtype(DType::BF16)?.to_device(device)?)
            };
            let (input, dresult) = (random("input", dim)?, random("dresult", dim)?);
            let (gate, up) = (random("gate", hidden)?, random("up", hidden)?);
            let given = Hidden { gate: gate.clone(), up: up.clone(), result: None };
            let products = |engine| -> Result<Vec<(&str, Tensor)>> {
                let [y_gate, y_up, activated] = layer.up(engine, &tokens, Some(&weights))?;
                let result = layer.down(engine, &up)?;
                let (dgate, dup, again) = layer.down_backward(engine, &dresult, &given, true)?;
                let dinput = layer.up_backward(engine, &gate, &up)?;
                let grad = |name| -> Result<Tensor> {
                    Ok(random_tensor(name, &[counts.len(), hidden, dim])?.to_device(device)?)
                };
                let grads = [grad("grad of w1")?, grad("grad of w3")?];
                layer.add_gradients(engine, &grads, &[&gate, &up], &input)?;
                let [of_gate, of_up] = grads;
                Ok(vec![
                    ("gate", y_gate),
                    ("up", y_up),
                    ("activated", activated),
                    ("result", result),
                    ("dgate", dgate),
                    ("dup", dup),
                    ("activated in backward", again.expect("it is wanted")),
                    ("dinput", dinput),
                    ("gradient of w1", of_gate),
                    ("gradient of w3", of_up),
                ])
            };
            let expected = products(Engine::Plain(DType::BF16))?;
            let mut engines = vec![Engine::Small, Engine::Large];
            if layer.is_hopper {
                engines.push(Engine::Hopper);
            }
            for engine in engines {
                for ((what, ours), (_, expected)) in products(engine)?.iter().zip(&expected) {
                    // Sums of f32 in another order, which tensor cores cut where others round; stored as bf16, they may fall
                    // on either side.
                    let tolerance = if ours.dtype() == DType::F32 { 2e-5 } else { 8e-3 };
                    let expected = expected.to_device(&Device::Cpu)?;
                    assert_close(&format!("{what}, {engine:?}"), ours, &expected, tolerance)?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn tiles_are_enough_however_tokens_choose() {
        for counts in [vec![0, 0, 1], vec![128, 128], vec![129, 1, 1, 1], vec![1; 300], vec![0, 100_000, 127, 129]] {
            let needed: usize = counts.iter().map(|count: &usize| count.div_ceil(TILE_ROWS)).sum();
            let slots = counts.iter().sum();
            assert!(needed <= most_tiles(slots, counts.len()), "{counts:?}");
        }
        assert_eq!(most_tiles(8, 256), 8);
        assert_eq!(most_tiles(131_072, 256), 1280);
    }

    #[test]
    fn engines_suit_what_they_multiply() {
        let of_rows = |slots, n_experts, columns| Engine::of_rows(DType::BF16, true, slots, n_experts, columns);
        assert_eq!(of_rows(32_768, 64, 2048), Engine::Large);
        // A token that is generated, and many experts with few rows each.
        assert_eq!(of_rows(8, 64, 2048), Engine::Small);
        assert_eq!(of_rows(8192, 256, 2048), Engine::Small);
        assert_eq!(of_rows(32_768, 64, 64), Engine::Small);
        assert_eq!(Engine::of_rows(DType::BF16, false, 32_768, 64, 2048), Engine::Plain(DType::BF16));
        assert_eq!(Engine::of_rows(DType::F32, true, 32_768, 64, 2048), Engine::Plain(DType::F32));
        assert_eq!(Engine::of_gradients(DType::BF16, true, 64, 1408, 2048), Engine::Large);
        assert_eq!(Engine::of_gradients(DType::BF16, true, 8, 256, 256), Engine::Small);
        let on_hopper = [Engine::Large, Engine::Small, Engine::Plain(DType::BF16)].map(|engine| engine.on(true));
        assert_eq!(on_hopper, [Engine::Hopper, Engine::Small, Engine::Plain(DType::BF16)]);
        assert_eq!(Engine::Large.on(false), Engine::Large);
    }

    #[test]
    fn kernels_are_called_by_their_names() {
        assert_eq!(Engine::Large.kernel("up"), "moe_up_large");
        assert_eq!(Engine::Plain(DType::BF16).kernel("down_backward"), "moe_down_backward_bf16");
        assert_eq!(Engine::Hopper.kernel("gradient"), "moe_gradient_hopper");
        let engines = [Engine::Large, Engine::Hopper, Engine::Small];
        assert_eq!(engines.map(Engine::shared_bytes), [64 << 10, 96 << 10, 32 << 10]);
    }
}

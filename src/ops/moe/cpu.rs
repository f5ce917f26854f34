use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::{Experts, Router, Routing};
use crate::Result;
use crate::autograd::Parameter;
use crate::models::args::ScoreFunc;
use crate::ops::host::{GRAIN, dot, exp, floats, max_of, round, sum_of, tensor, update, vectorized};
use crate::ops::matmul::{Mat, Store, matmul_all};
use crate::ops::swiglu::cpu as swiglu;

/// Keeps a sum of scores that are all zero from dividing by zero.
const TINY: f32 = 1e-20;

fn scores(logits: &[f32], score_func: ScoreFunc) -> Vec<f32> {
    match score_func {
        ScoreFunc::Sigmoid => logits.iter().map(|l| swiglu::sigmoid(*l)).collect(),
        ScoreFunc::Softmax => {
            let max = max_of(logits, f32::NEG_INFINITY);
            let sum = sum_of(logits, |l| exp(l - max));
            logits.iter().map(|l| exp(l - max) / sum).collect()
        }
    }
}

pub fn route(logits: &Tensor, bias: Option<&[f32]>, router: &Router) -> Result<(Tensor, Routing)> {
    let (n, n_experts) = logits.dims2()?;
    let top_k = router.top_k;
    let logits = floats(logits)?;
    let (mut experts, mut weights) = (vec![0u32; n * top_k], vec![0f32; n * top_k]);
    experts
        .par_chunks_mut(top_k)
        .zip(weights.par_chunks_mut(top_k))
        .zip(logits.par_chunks(n_experts))
        .enumerate()
        .for_each(|(t, ((experts, weights), logits))| {
            let scores = scores(logits, router.score_func);
            if router.force_load_balance {
                experts.iter_mut().enumerate().for_each(|(j, e)| *e = ((t * top_k + j) % n_experts) as u32);
            } else {
                let choice = |e: u32| scores[e as usize] + bias.map_or(0.0, |bias| bias[e as usize]);
                let mut ranked: Vec<u32> = (0..n_experts as u32).collect();
                ranked.sort_by(|a, b| choice(*b).total_cmp(&choice(*a)));
                experts.copy_from_slice(&ranked[..top_k]);
            }
            experts.iter().zip(weights.iter_mut()).for_each(|(e, w)| *w = scores[*e as usize]);
            let norm = if router.route_norm { weights.iter().sum::<f32>() + TINY } else { 1.0 };
            weights.iter_mut().for_each(|w| *w = *w / norm * router.route_scale);
        });
    Ok((tensor(weights, (n, top_k), DType::F32)?, Routing::new(experts, n_experts, top_k)))
}

pub fn route_backward(logits: &Tensor, routing: &Routing, router: &Router, dweights: &Tensor) -> Result<Tensor> {
    let (_, n_experts) = logits.dims2()?;
    let top_k = router.top_k;
    let (values, dweights) = (floats(logits)?, floats(dweights)?);
    let mut dlogits = vec![0f32; values.len()];
    dlogits
        .par_chunks_mut(n_experts)
        .zip(values.par_chunks(n_experts))
        .zip(routing.experts.par_chunks(top_k).zip(dweights.par_chunks(top_k)))
        .for_each(|((dlogits, logits), (experts, dweights))| {
            let scores = scores(logits, router.score_func);
            let chosen = |j: usize| scores[experts[j] as usize];
            // From weights to scores: w = scale · s / Σ s, or w = scale · s.
            let (norm, shared) = if router.route_norm {
                let norm = (0..top_k).map(chosen).sum::<f32>() + TINY;
                (norm, (0..top_k).map(|j| dweights[j] * chosen(j)).sum::<f32>() / (norm * norm))
            } else {
                (1.0, 0.0)
            };
            let dscore = |j: usize| router.route_scale * (dweights[j] / norm - shared);
            match router.score_func {
                ScoreFunc::Sigmoid => {
                    for (j, e) in experts.iter().enumerate() {
                        dlogits[*e as usize] += dscore(j) * chosen(j) * (1.0 - chosen(j));
                    }
                }
                ScoreFunc::Softmax => {
                    let mean: f32 = (0..top_k).map(|j| dscore(j) * chosen(j)).sum();
                    dlogits.iter_mut().zip(&scores).for_each(|(d, s)| *d = -s * mean);
                    for (j, e) in experts.iter().enumerate() {
                        dlogits[*e as usize] += dscore(j) * chosen(j);
                    }
                }
            }
        });
    tensor(dlogits, logits.shape(), logits.dtype())
}

/// What forward leaves for backward, in the order of the sorted slots.
pub struct Hidden {
    /// `W₁ x` and `W₃ x`, `(slots, hidden)`.
    gate: Tensor,
    up: Tensor,
    /// The experts' results, `(slots, dim)`, where the gradient of the weights needs them.
    result: Option<Tensor>,
}

pub struct Forward {
    pub y: Tensor,
    pub hidden: Hidden,
}

pub fn forward(x: &Tensor, weights: &Tensor, routing: &Routing, experts: &Experts) -> Result<Forward> {
    let (n, dim) = x.dims2()?;
    let (w1, w2, w3) = (experts.w1.compute()?, experts.w2.compute()?, experts.w3.compute()?);
    let (_, hidden_dim, _) = w1.dims3()?;
    let dtype = w1.dtype();
    let slots = routing.sorted.len();
    let weights = floats(weights)?;

    let input = gather(&floats(x)?, dim, routing, experts.score_before_experts.then_some(&weights[..]), dtype);
    let product = |input: &[f32], weight: &Tensor, rows: usize, cols: usize| -> Result<Vec<f32>> {
        let weight = floats(weight)?;
        let mut y = vec![0f32; slots * rows];
        for_experts(routing, |e, range| {
            let x = Mat::new(&input[range.start * cols..], range.len(), cols);
            let w = Mat::new(&weight[e * rows * cols..], rows, cols);
            matmul_all(&mut y[range.start * rows..range.end * rows], Store::Overwrite, x, w.t());
        });
        round(&mut y, dtype);
        Ok(y)
    };
    let gate = product(&input, &w1, hidden_dim, dim)?;
    let up = product(&input, &w3, hidden_dim, dim)?;
    let mut activated = swiglu::activate(&gate, &up);
    round(&mut activated, dtype);
    let result = product(&activated, &w2, dim, hidden_dim)?;

    let mut y = vec![0f32; n * dim];
    scatter_sum(&mut y, dim, &result, routing, (!experts.score_before_experts).then_some(&weights[..]));
    let hidden = Hidden {
        gate: tensor(gate, (slots, hidden_dim), dtype)?,
        up: tensor(up, (slots, hidden_dim), dtype)?,
        result: (!experts.score_before_experts).then(|| tensor(result, (slots, dim), dtype)).transpose()?,
    };
    Ok(Forward { y: tensor(y, (n, dim), x.dtype())?, hidden })
}

/// The gradients of `x` and `weights`.
pub fn backward(
    x: &Tensor,
    weights: &Tensor,
    hidden: &Hidden,
    routing: &Routing,
    experts: &Experts,
    dy: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (n, dim) = x.dims2()?;
    let (slots, hidden_dim) = hidden.gate.dims2()?;
    let dtype = hidden.gate.dtype();
    let before = experts.score_before_experts;
    let (values, weight_values, dys) = (floats(x)?, floats(weights)?, floats(dy)?);
    let (weights_before, weights_after) =
        if before { (Some(&weight_values[..]), None) } else { (None, Some(&weight_values[..])) };

    let input = gather(&values, dim, routing, weights_before, dtype);
    let dresult = gather(&dys, dim, routing, weights_after, dtype);
    let (gate, up) = (floats(&hidden.gate)?, floats(&hidden.up)?);
    let mut activated = swiglu::activate(&gate, &up);
    round(&mut activated, dtype);

    accumulate(routing, &experts.w2, &dresult, &activated)?;
    let mut dactivated = vec![0f32; slots * hidden_dim];
    add_products(&mut dactivated, routing, &experts.w2, &dresult)?;
    round(&mut dactivated, dtype);
    let (mut dgate, mut dup) = swiglu::gradients(&gate, &up, &dactivated);
    round(&mut dgate, dtype);
    round(&mut dup, dtype);
    accumulate(routing, &experts.w1, &dgate, &input)?;
    accumulate(routing, &experts.w3, &dup, &input)?;
    let mut dinput = vec![0f32; slots * dim];
    add_products(&mut dinput, routing, &experts.w1, &dgate)?;
    add_products(&mut dinput, routing, &experts.w3, &dup)?;

    // A weight's gradient is the product of what it scaled with the gradient of the scaled.
    let mut dweights = vec![0f32; slots];
    let result = hidden.result.as_ref().map(floats).transpose()?;
    for (position, slot) in routing.sorted.iter().enumerate() {
        let token = *slot as usize / routing.top_k;
        let (at_slot, at_token) = (position * dim..(position + 1) * dim, token * dim..(token + 1) * dim);
        dweights[*slot as usize] = match &result {
            None => dot(&values[at_token], &dinput[at_slot]),
            Some(result) => dot(&result[at_slot], &dys[at_token]),
        };
    }
    let mut dx = vec![0f32; n * dim];
    scatter_sum(&mut dx, dim, &dinput, routing, weights_before);
    Ok((tensor(dx, (n, dim), x.dtype())?, tensor(dweights, weights.shape(), DType::F32)?))
}

/// The rows of `x` in the order of the sorted slots, times the slot's weight if there are weights.
fn gather(x: &[f32], dim: usize, routing: &Routing, weights: Option<&[f32]>, dtype: DType) -> Vec<f32> {
    let mut rows = vec![0f32; routing.sorted.len() * dim];
    rows.par_chunks_mut(dim).zip(&routing.sorted).with_min_len(GRAIN / dim.min(GRAIN)).for_each(|(row, slot)| {
        let x = &x[*slot as usize / routing.top_k * dim..][..dim];
        let weight = weights.map_or(1.0, |w| w[*slot as usize]);
        vectorized!(row.iter_mut().zip(x).for_each(|(row, x)| *row = x * weight));
    });
    round(&mut rows, dtype);
    rows
}

/// Adds to each token's row of `y` the rows of its slots, times their weights if there are weights, in the order of the
/// token's choices.
fn scatter_sum(y: &mut [f32], dim: usize, rows: &[f32], routing: &Routing, weights: Option<&[f32]>) {
    let mut position_of = vec![0u32; routing.sorted.len()];
    routing.sorted.iter().enumerate().for_each(|(position, slot)| position_of[*slot as usize] = position as u32);
    y.par_chunks_mut(dim).enumerate().with_min_len(GRAIN / dim.min(GRAIN)).for_each(|(token, y)| {
        for slot in token * routing.top_k..(token + 1) * routing.top_k {
            let row = &rows[position_of[slot] as usize * dim..][..dim];
            let weight = weights.map_or(1.0, |w| w[slot]);
            vectorized!(y.iter_mut().zip(row).for_each(|(y, row)| *y += row * weight));
        }
    });
}

/// Calls `body` with each expert that has tokens, and its range of sorted slots.
fn for_experts(routing: &Routing, mut body: impl FnMut(usize, std::ops::Range<usize>)) {
    for (e, pair) in routing.offsets.windows(2).enumerate() {
        if pair[0] < pair[1] {
            body(e, pair[0]..pair[1]);
        }
    }
}

/// `grad[e] += dyᵀ x` over the slots of each expert.
fn accumulate(routing: &Routing, weight: &Parameter, dy: &[f32], x: &[f32]) -> Result<()> {
    let [_, rows, cols] = *weight.shape() else { unreachable!("expert weights have three dimensions") };
    update(&weight.grad()?, |grad: &mut [f32]| {
        for_experts(routing, |e, range| {
            let dy = Mat::new(&dy[range.start * rows..], range.len(), rows);
            let x = Mat::new(&x[range.start * cols..], range.len(), cols);
            matmul_all(&mut grad[e * rows * cols..(e + 1) * rows * cols], Store::Add, dy.t(), x);
        });
    })
}

/// `dx += dy weight[e]` over the slots of each expert.
fn add_products(dx: &mut [f32], routing: &Routing, weight: &Parameter, dy: &[f32]) -> Result<()> {
    let [_, rows, cols] = *weight.shape() else { unreachable!("expert weights have three dimensions") };
    let weight = weight.compute()?;
    let weight = floats(&weight)?;
    for_experts(routing, |e, range| {
        let dy = Mat::new(&dy[range.start * rows..], range.len(), rows);
        let w = Mat::new(&weight[e * rows * cols..], rows, cols);
        matmul_all(&mut dx[range.start * cols..range.end * cols], Store::Add, dy, w);
    });
    Ok(())
}

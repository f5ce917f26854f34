use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::{ExpertGroups, Experts, Hidden, Router, Routing};
use crate::Result;
use crate::autograd::Parameter;
use crate::models::args::ScoreFunc;
use crate::ops::Residual;
use crate::ops::add::add_within;
use crate::ops::bias::cpu::{add_rows, add_to_rows};
use crate::ops::glu::cpu as glu;
use crate::ops::host::{
    Element, GRAIN, Indices, build, dot, elements, exp, floats, indices, max_of, sum_of, typed, update, update_if,
    vectorized,
};
use crate::ops::matmul::{Dst, Mat, Operand, Product, grouped_product, grouped_sum};
use crate::ops::sort::Groups;

/// Keeps a sum of scores that are all zero from dividing by zero.
const TINY: f32 = 1e-20;

/// Rows of tokens per task.
fn rows_per_task(dim: usize) -> usize {
    GRAIN.div_ceil(dim)
}

#[inline(always)]
fn scores(logits: &[f32], score_func: ScoreFunc, scores: &mut [f32]) {
    match score_func {
        ScoreFunc::Sigmoid => scores.iter_mut().zip(logits).for_each(|(s, l)| *s = glu::sigmoid(*l)),
        ScoreFunc::Softmax => {
            let max = max_of(logits, f32::NEG_INFINITY);
            scores.iter_mut().zip(logits).for_each(|(s, l)| *s = exp(l - max));
            let sum = sum_of(scores, |s| s);
            scores.iter_mut().for_each(|s| *s /= sum);
        }
    }
}

/// Weights and choices.
pub fn route(logits: &Tensor, bias: Option<&Tensor>, router: &Router) -> Result<(Tensor, Tensor)> {
    let (n, n_experts) = logits.dims2()?;
    let top_k = router.top_k;
    let (logits, bias) = (floats(logits)?, bias.map(floats).transpose()?);
    let bias = bias.as_deref();
    let rows = rows_per_task(n_experts);
    let (mut experts, mut weights) = (vec![0u32; n * top_k], vec![0f32; n * top_k]);
    let outputs = experts.par_chunks_mut(rows * top_k).zip(weights.par_chunks_mut(rows * top_k));
    outputs.zip(logits.par_chunks(rows * n_experts)).enumerate().for_each(|(task, ((experts, weights), logits))| {
        vectorized!({
            let (mut scored, mut choice) = (vec![0f32; n_experts], vec![0f32; n_experts]);
            let mut ranked = Vec::with_capacity(n_experts);
            let outputs = experts.chunks_exact_mut(top_k).zip(weights.chunks_exact_mut(top_k));
            for (i, ((experts, weights), logits)) in outputs.zip(logits.chunks_exact(n_experts)).enumerate() {
                scores(logits, router.score_func, &mut scored);
                if router.force_load_balance {
                    let first = (task * rows + i) * top_k;
                    experts.iter_mut().enumerate().for_each(|(j, e)| *e = ((first + j) % n_experts) as u32);
                } else {
                    choice.copy_from_slice(&scored);
                    if let Some(bias) = bias {
                        choice.iter_mut().zip(bias).for_each(|(choice, bias)| *choice += bias);
                    }
                    if let Some(groups) = router.groups {
                        limit_to_groups(&mut choice, groups);
                    }
                    ranked.clear();
                    ranked.extend(0..n_experts as u32);
                    ranked.sort_by(|a, b| choice[*b as usize].total_cmp(&choice[*a as usize]));
                    experts.copy_from_slice(&ranked[..top_k]);
                }
                experts.iter().zip(&mut *weights).for_each(|(e, w)| *w = scored[*e as usize]);
                let norm = if router.route_norm { weights.iter().sum::<f32>() + TINY } else { 1.0 };
                weights.iter_mut().for_each(|w| *w = *w / norm * router.route_scale);
            }
        },);
    });
    let tensor = (n, top_k);
    Ok((Tensor::from_vec(weights, tensor, &Device::Cpu)?, Tensor::from_vec(experts, tensor, &Device::Cpu)?))
}

/// Takes the experts outside a token's best groups out of the choice.
fn limit_to_groups(choice: &mut [f32], groups: ExpertGroups) {
    let size = choice.len() / groups.n;
    let sum_of_two = |group: &[f32]| {
        let (first, second) = group.iter().fold((f32::NEG_INFINITY, f32::NEG_INFINITY), |(first, second), score| {
            if *score > first { (*score, first) } else { (first, second.max(*score)) }
        });
        if group.len() > 1 { first + second } else { first }
    };
    let sums: Vec<f32> = choice.chunks_exact(size).map(sum_of_two).collect();
    let mut ranked: Vec<usize> = (0..groups.n).collect();
    ranked.sort_by(|a, b| sums[*b].total_cmp(&sums[*a]));
    for group in &ranked[groups.limit..] {
        choice[group * size..(group + 1) * size].fill(f32::NEG_INFINITY);
    }
}

pub fn route_backward(logits: &Tensor, choices: &Tensor, router: &Router, dweights: &Tensor) -> Result<Tensor> {
    typed!(T = logits.dtype(); route_backward_in::<T>(logits, choices, router, dweights))
}

fn route_backward_in<T: Element>(
    logits: &Tensor,
    choices: &Tensor,
    router: &Router,
    dweights: &Tensor,
) -> Result<Tensor> {
    let (_, n_experts) = logits.dims2()?;
    let top_k = router.top_k;
    let (values, choices, dweights) = (floats(logits)?, indices(choices)?, floats(dweights)?);
    let (values, choices, dweights): (&[f32], &[u32], &[f32]) = (&values, &choices, &dweights);
    let ([dlogits], _) = build(values.len(), rows_per_task(n_experts) * n_experts, |range, out| {
        vectorized!({
            let (mut scored, mut dlogits) = (vec![0f32; n_experts], vec![0f32; n_experts]);
            for t in range.start / n_experts..range.end / n_experts {
                scores(&values[t * n_experts..][..n_experts], router.score_func, &mut scored);
                let (experts, dweights) = (&choices[t * top_k..][..top_k], &dweights[t * top_k..][..top_k]);
                let chosen = |j: usize| scored[experts[j] as usize];
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
                        dlogits.fill(0.0);
                        for (j, e) in experts.iter().enumerate() {
                            dlogits[*e as usize] += dscore(j) * chosen(j) * (1.0 - chosen(j));
                        }
                    }
                    ScoreFunc::Softmax => {
                        let mean: f32 = (0..top_k).map(|j| dscore(j) * chosen(j)).sum();
                        dlogits.iter_mut().zip(&scored).for_each(|(d, s)| *d = -s * mean);
                        for (j, e) in experts.iter().enumerate() {
                            dlogits[*e as usize] += dscore(j) * chosen(j);
                        }
                    }
                }
                out.extend(dlogits.iter().map(|d| [T::store(*d)]));
            }
        },);
    });
    Ok(Tensor::from_vec(dlogits, logits.shape(), &Device::Cpu)?)
}

/// Counts the slots of each expert. There are no tiles.
pub fn cut(slots: &Groups, counter: Option<&Tensor>) -> Result<Option<Tensor>> {
    if let Some(counter) = counter {
        let offsets = indices(&slots.offsets)?;
        update(counter, |tokens: &mut [u32]| {
            tokens.iter_mut().zip(offsets.windows(2)).for_each(|(sum, pair)| *sum += pair[1] - pair[0]);
        })?;
    }
    Ok(None)
}

pub fn rebalance(tokens: &Tensor, counted: &Tensor, bias: Option<(&Tensor, f32)>) -> Result<()> {
    update(tokens, |tokens: &mut [u32]| update(counted, |counted: &mut [u32]| counted.copy_from_slice(tokens)))??;
    update(tokens, |tokens: &mut [u32]| tokens.fill(0))?;
    let Some((bias, coeff)) = bias else { return Ok(()) };
    let counted = indices(counted)?;
    let n = counted.len();
    let mean = counted.iter().map(|tokens| u64::from(*tokens)).sum::<u64>() as f32 / n as f32;
    let towards_mean = |tokens: &u32| match mean - *tokens as f32 {
        0.0 => 0.0,
        gap => coeff * gap.signum(),
    };
    let moves: Vec<f32> = counted.iter().map(towards_mean).collect();
    let drift = moves.iter().sum::<f32>() / n as f32;
    update(bias, |bias: &mut [f32]| bias.iter_mut().zip(moves).for_each(|(bias, by)| *bias += by - drift))
}

/// The slots of a routing, as the host reads them.
struct Slots<'a> {
    sorted: Indices<'a>,
    positions: Indices<'a>,
    offsets: Vec<usize>,
    top_k: usize,
}

impl<'a> Slots<'a> {
    fn of(routing: &'a Routing) -> Result<Self> {
        let Groups { order, positions, offsets } = &routing.slots;
        let offsets = indices(offsets)?.iter().map(|offset| *offset as usize).collect();
        Ok(Self { sorted: indices(order)?, positions: indices(positions)?, offsets, top_k: routing.top_k })
    }
}

/// The result; `None` if what it would be added to is not read.
pub fn forward(
    x: &Tensor,
    weights: &Tensor,
    routing: &Routing,
    experts: &Experts,
    residual: Option<Residual>,
) -> Result<(Option<Tensor>, Hidden)> {
    let is_read = residual.is_none_or(|residual| residual.is_read);
    typed!(X = x.dtype(), T = experts.w1.compute()?.dtype(); {
        forward_in::<X, T>(x, weights, routing, experts, is_read)
    })
}

fn forward_in<X: Element, T: Operand>(
    x: &Tensor,
    weights: &Tensor,
    routing: &Routing,
    experts: &Experts,
    is_read: bool,
) -> Result<(Option<Tensor>, Hidden)> {
    let (n, dim) = x.dims2()?;
    let (n_slots, hidden_dim) = (routing.n_slots(), experts.w1.shape()[1]);
    let slots = &Slots::of(routing)?;
    let (values, weights) = (elements::<X>(x)?, floats(weights)?);
    let (before, after) = weights_of(experts, &weights);

    let input = gather::<X, T>(&values, dim, slots, before);
    let product = |x: &[T], weight: &Parameter, bias: usize| -> Result<Vec<T>> {
        let values = weight.compute()?;
        let mut y = grouped_product(&slots.offsets, x, &transposed(weight, &elements(&values)?));
        if let Some(biases) = &experts.biases {
            add_biases(slots, &biases[bias], &mut y)?;
        }
        Ok(y)
    };
    let (gate, up) = (product(&input, &experts.w1, 0)?, product(&input, &experts.w3, 2)?);
    let result = (is_read || after.is_some())
        .then(|| product(&glu::activate(&gate, &up, experts.gate), &experts.w2, 1))
        .transpose()?;
    let y = result.as_ref().filter(|_| is_read).map(|result| scatter_sum::<T, X>(result, dim, slots, after));

    let tensor = |values: Vec<T>, width: usize| Tensor::from_vec(values, (n_slots, width), &Device::Cpu);
    let result = result.filter(|_| after.is_some()).map(|result| tensor(result, dim)).transpose()?;
    let hidden = Hidden { gate: tensor(gate, hidden_dim)?, up: tensor(up, hidden_dim)?, result };
    Ok((y.map(|y| Tensor::from_vec(y, (n, dim), &Device::Cpu)).transpose()?, hidden))
}

/// The gradients of `x`, added to `sum` if there is one, and of `weights`.
pub fn backward(
    (x, weights, hidden): (&Tensor, &Tensor, &Hidden),
    routing: &Routing,
    experts: &Experts,
    dy: &Tensor,
    sum: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let (dx, dweights) = typed!(X = x.dtype(), T = hidden.gate.dtype(); {
        backward_in::<X, T>(x, weights, hidden, routing, experts, dy)
    })?;
    Ok((sum.map_or(Ok(dx.clone()), |sum| add_within(sum, &dx))?, dweights))
}

fn backward_in<X: Element, T: Operand>(
    x: &Tensor,
    weights: &Tensor,
    hidden: &Hidden,
    routing: &Routing,
    experts: &Experts,
    dy: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (n, dim) = x.dims2()?;
    let slots = &Slots::of(routing)?;
    let (values, weight_values, dys) = (elements::<X>(x)?, floats(weights)?, elements::<X>(dy)?);
    let (values, dys): (&[X], &[X]) = (&values, &dys);
    let (before, after) = weights_of(experts, &weight_values);

    let input = gather::<X, T>(values, dim, slots, before);
    let dresult = gather::<X, T>(dys, dim, slots, after);
    let (gate, up) = (elements::<T>(&hidden.gate)?, elements::<T>(&hidden.up)?);
    accumulate(slots, &experts.w2, &dresult, &glu::activate(&gate, &up, experts.gate))?;
    accumulate_bias(slots, experts, 1, &dresult)?;
    let (w1, w2, w3) = (experts.w1.compute()?, experts.w2.compute()?, experts.w3.compute()?);
    let (w1, w2, w3) = (elements::<T>(&w1)?, elements::<T>(&w2)?, elements::<T>(&w3)?);
    let dactivated = grouped_product(&slots.offsets, &dresult, &matrices(&experts.w2, &w2));
    drop(dresult);
    let (dgate, dup) = glu::gradients(&gate, &up, &dactivated, experts.gate);
    drop(dactivated);
    accumulate(slots, &experts.w1, &dgate, &input)?;
    accumulate(slots, &experts.w3, &dup, &input)?;
    accumulate_bias(slots, experts, 0, &dgate)?;
    accumulate_bias(slots, experts, 2, &dup)?;
    drop(input);
    let through_gate = (&dgate[..], matrices(&experts.w1, &w1));
    let dinput = grouped_sum(&slots.offsets, &[through_gate, (&dup, matrices(&experts.w3, &w3))]);

    // A weight's gradient is the product of what it scaled with the gradient of the scaled.
    let result = hidden.result.as_ref().map(elements::<T>).transpose()?;
    let result = result.as_deref();
    let (positions, top_k): (&[u32], usize) = (&slots.positions, slots.top_k);
    let ([dweights], _) = build(positions.len(), rows_per_task(dim), |slots, dweights| {
        vectorized!(dweights.extend(slots.map(|slot| {
            let (position, token) = (positions[slot] as usize, slot / top_k);
            let (at_slot, at_token) = (position * dim..(position + 1) * dim, token * dim..(token + 1) * dim);
            [match result {
                None => dot(&values[at_token], &dinput[at_slot]),
                Some(result) => dot(&result[at_slot], &dys[at_token]),
            }]
        })));
    });
    let dx = scatter_sum::<f32, X>(&dinput, dim, slots, before);
    let dx = Tensor::from_vec(dx, (n, dim), &Device::Cpu)?;
    Ok((dx, Tensor::from_vec(dweights, weights.shape(), &Device::Cpu)?))
}

/// The weights that multiply tokens before the experts, and those that multiply results after them.
fn weights_of<'a>(experts: &Experts, weights: &'a [f32]) -> (Option<&'a [f32]>, Option<&'a [f32]>) {
    if experts.score_before_experts { (Some(weights), None) } else { (None, Some(weights)) }
}

/// The rows of `x` in the order of the sorted slots, times the slot's weight if there are weights.
fn gather<X: Element, T: Element>(x: &[X], dim: usize, slots: &Slots, weights: Option<&[f32]>) -> Vec<T> {
    let (sorted, top_k): (&[u32], usize) = (&slots.sorted, slots.top_k);
    let ([rows], _) = build(sorted.len() * dim, rows_per_task(dim) * dim, |range, rows| {
        vectorized!({
            for slot in &sorted[range.start / dim..range.end / dim] {
                let x = &x[*slot as usize / top_k * dim..][..dim];
                let weight = weights.map_or(1.0, |w| w[*slot as usize]);
                rows.extend(x.iter().map(|x| [T::store(x.load() * weight)]));
            }
        },);
    });
    rows
}

/// For each token the sum of the rows of its slots, times their weights if there are weights, in the order of the token's
/// choices.
fn scatter_sum<T: Element, X: Element>(rows: &[T], dim: usize, slots: &Slots, weights: Option<&[f32]>) -> Vec<X> {
    let (positions, top_k): (&[u32], usize) = (&slots.positions, slots.top_k);
    let n = positions.len() / top_k;
    let ([y], _) = build(n * dim, rows_per_task(dim) * dim, |range, y| {
        vectorized!({
            let mut sums = vec![0f32; dim];
            for token in range.start / dim..range.end / dim {
                sums.fill(0.0);
                for slot in token * top_k..(token + 1) * top_k {
                    let row = &rows[positions[slot] as usize * dim..][..dim];
                    let weight = weights.map_or(1.0, |w| w[slot]);
                    sums.iter_mut().zip(row).for_each(|(sum, row)| *sum += row.load() * weight);
                }
                y.extend(sums.iter().map(|sum| [X::store(*sum)]));
            }
        },);
    });
    y
}

/// The matrices of all experts.
fn matrices<'a, T>(weight: &Parameter, values: &'a [T]) -> Vec<Mat<'a, T>> {
    let [_, rows, cols] = *weight.shape() else { unreachable!("expert weights have three dimensions") };
    values.chunks_exact(rows * cols).map(|values| Mat::new(values, rows, cols)).collect()
}

fn transposed<'a, T>(weight: &Parameter, values: &'a [T]) -> Vec<Mat<'a, T>> {
    matrices(weight, values).into_iter().map(Mat::t).collect()
}

/// `grad[e] += dyᵀ x` over the slots of each expert.
fn accumulate<T: Operand>(slots: &Slots, weight: &Parameter, dy: &[T], x: &[T]) -> Result<()> {
    let [_, rows, cols] = *weight.shape() else { unreachable!("expert weights have three dimensions") };
    update_if(weight.accumulator()?.as_ref(), |grad| {
        let Some(grad) = grad else { return };
        let experts = slots.offsets.windows(2).zip(grad.chunks_exact_mut(rows * cols));
        let products = experts.filter(|(rows, _)| rows[0] < rows[1]).map(|(own, grad)| {
            let dy = Mat::new(&dy[own[0] * rows..own[1] * rows], own[1] - own[0], rows);
            let x = Mat::new(&x[own[0] * cols..own[1] * cols], own[1] - own[0], cols);
            Product::new(dy.t(), x, Dst::Add(grad))
        });
        T::multiply(products.collect());
    })
}

/// Adds each expert's bias to the rows of its slots.
fn add_biases<T: Element>(slots: &Slots, bias: &Parameter, mut rows: &mut [T]) -> Result<()> {
    let width = bias.shape()[1];
    let bias = bias.weights()?;
    for (slots, bias) in slots.offsets.windows(2).zip(floats(&bias)?.chunks_exact(width)) {
        let own = rows.split_off_mut(..(slots[1] - slots[0]) * width).expect("experts follow one another");
        add_to_rows(own, bias);
    }
    Ok(())
}

/// `grad[e] += Σ dy` over the slots of each expert, for bias `which`, if there are biases that are trained.
fn accumulate_bias<T: Element>(slots: &Slots, experts: &Experts, which: usize, dy: &[T]) -> Result<()> {
    let Some(bias) = experts.biases.as_ref().map(|biases| &biases[which]) else { return Ok(()) };
    let Some(grad) = bias.accumulator()? else { return Ok(()) };
    let width = bias.shape()[1];
    update(&grad, |grad: &mut [f32]| {
        for (slots, grad) in slots.offsets.windows(2).zip(grad.chunks_exact_mut(width)) {
            add_rows(grad, &dy[slots[0] * width..slots[1] * width]);
        }
    })
}

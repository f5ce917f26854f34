//! Token-choice mixture of experts: routing, and the experts on the tokens that chose them.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use std::sync::Arc;

use candle_core::Tensor;

use crate::Result;
use crate::autograd::{Parameter, Value};
use crate::models::args::ScoreFunc;
use crate::ops::Residual;
use crate::ops::add::onto;
use crate::ops::glu::Gate;
use crate::ops::sort::{self, Groups};
use crate::tools::profiler;

/// How router logits become choices and weights.
#[derive(Clone, Copy, Debug)]
pub struct Router {
    pub score_func: ScoreFunc,
    pub top_k: usize,
    /// Divide a token's chosen scores by their sum.
    pub route_norm: bool,
    /// Factor on the chosen scores.
    pub route_scale: f32,
    /// A token's experts come from its best groups. `None`: from anywhere.
    pub groups: Option<ExpertGroups>,
    /// Choice `j` of token `t` is expert `(t · top_k + j) mod n_experts`, whatever the scores.
    pub force_load_balance: bool,
}

/// Experts in groups of equal size, by their order.
#[derive(Clone, Copy, Debug)]
pub struct ExpertGroups {
    pub n: usize,
    /// How many of them a token's experts come from: those whose two highest scores, with bias, sum to most.
    pub limit: usize,
}

/// Who goes where, on the device of the tokens. A slot is one choice of one token: slot `t · top_k + j` is choice `j` of
/// token `t`.
#[derive(Debug)]
pub struct Routing {
    /// The expert of each slot, `(n, top_k)` u32.
    pub experts: Tensor,
    /// The slots by expert: how they are sorted, where each stands then, and where experts begin.
    slots: Groups,
    /// What a GPU cuts the sorted slots into: see `kernel.cu`.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "the host has none"))]
    tiles: Option<Tensor>,
    top_k: usize,
}

impl Routing {
    /// Adds to `counter`, `(n_experts,)` u32, how many slots chose each expert, if it is given.
    fn new(experts: Tensor, n_experts: usize, counter: Option<&Tensor>) -> Result<Self> {
        let (_, top_k) = experts.dims2()?;
        let slots = sort::group(&experts.flatten_all()?, n_experts)?;
        let tiles = on_device!(experts, cut(&slots, counter))?;
        Ok(Self { experts, slots, tiles, top_k })
    }

    fn n_slots(&self) -> usize {
        self.slots.order.elem_count()
    }
}

/// Ends the count of a step: `counted` becomes what `tokens` holds, which is zeros again. A bias moves by its coefficient
/// towards an even load (up where its expert had fewer tokens than the mean), less the mean of these moves. The same numbers
/// on all devices.
///
/// # Shapes
/// `tokens`, `counted`: `(n_experts,)` u32. `bias`: `(n_experts,)` f32.
///
/// # Source
/// Wang et al., arXiv:2408.15664, with the bias's mean kept at zero.
pub fn rebalance(tokens: &Tensor, counted: &Tensor, bias: Option<(&Tensor, f32)>) -> Result<()> {
    on_device!(tokens, rebalance(tokens, counted, bias))
}

/// Chooses `top_k` experts for each token and weighs them.
///
/// Scores are `sigmoid` or `softmax` of the logits, in f32. The experts with the largest `score + bias` are chosen (of
/// equals the first), from the groups that a token is limited to; the weight of each is its score without the bias,
/// normalised and scaled as `router` says. Returns the weights, `(n, top_k)` f32, and the choices, which `counter` counts if
/// there is one. Gradients flow through the weights, not the choices.
///
/// # Shapes
/// `logits`: `(n, n_experts)`. `bias`: `(n_experts,)`, f32. `counter`: `(n_experts,)`, u32.
///
/// # Source
/// Groups: DeepSeek-V3, arXiv:2412.19437, as its own inference code chooses them.
pub fn route(
    logits: &Value,
    bias: Option<&Tensor>,
    router: &Router,
    counter: Option<&Tensor>,
) -> Result<(Value, Arc<Routing>)> {
    let _span = profiler::span("route").shapes(&[logits.tensor().dims()]);
    let (_, n_experts) = logits.tensor().dims2()?;
    let (weights, choices) = on_device!(logits.tensor(), route(logits.tensor(), bias, router))?;
    let routing = Arc::new(Routing::new(choices.clone(), n_experts, counter)?);
    let (saved, router) = (logits.tensor().clone(), *router);
    let weights = Value::record("route", weights, [logits], move |dweights| {
        Ok([Some(on_device!(saved, route_backward(&saved, &choices, &router, &dweights))?)])
    });
    Ok((weights, routing))
}

/// The weights of all experts of a layer.
#[derive(Clone, Debug)]
pub struct Experts {
    /// `(n_experts, hidden, dim)`: the gate.
    pub w1: Arc<Parameter>,
    /// `(n_experts, dim, hidden)`.
    pub w2: Arc<Parameter>,
    /// `(n_experts, hidden, dim)`.
    pub w3: Arc<Parameter>,
    /// `b₁`, `b₂` and `b₃`: `(n_experts, hidden)`, `(n_experts, dim)`, `(n_experts, hidden)`.
    pub biases: Option<[Arc<Parameter>; 3]>,
    /// What the gate makes of its input.
    pub gate: Gate,
    /// Multiply a token by its weight before the expert, else its result after it.
    pub score_before_experts: bool,
}

/// For each token, the sum over its chosen experts of the weighted feed-forward
/// `W₂ (act(W₁ x + b₁) · (W₃ x + b₃)) + b₂`, where there are biases; added to `residual` if there is one. Tokens are gathered
/// by expert, without padding; an expert that none chose costs nothing and has no gradient.
///
/// # Shapes
/// `x`: `(n, dim)`. `weights`: `(n, top_k)`, as [`route`] returned them with `routing`. Returns `(n, dim)`, in the dtype of
/// `residual`, else of `x`.
pub fn experts(
    x: &Value,
    weights: &Value,
    routing: &Arc<Routing>,
    experts: &Experts,
    residual: Option<Residual>,
) -> Result<Value> {
    let span = profiler::span("experts").shapes(&[x.tensor().dims(), experts.w1.shape()]);
    let (y, hidden) =
        span.around(|| on_device!(x.tensor(), forward(x.tensor(), weights.tensor(), routing, experts, residual)))?;
    onto(
        residual,
        |_| Ok(y.expect("a result that is read is made")),
        |y| {
            let (saved_x, saved_weights) = (x.tensor().clone(), weights.tensor().clone());
            let (routing, experts) = (routing.clone(), experts.clone());
            Value::record_sum("experts", y, [x, weights], move |dy, sum| {
                let saved = (&saved_x, &saved_weights, &hidden);
                let (dx, dweights) = on_device!(dy, backward(saved, &routing, &experts, &dy, sum.as_ref()))?;
                Ok([Some(dx), Some(dweights)])
            })
        },
    )
}

/// What forward leaves for backward, in the order of the sorted slots, in the compute dtype of the weights.
struct Hidden {
    /// `W₁ x` and `W₃ x`, `(slots, hidden)`.
    gate: Tensor,
    up: Tensor,
    /// The experts' results, `(slots, dim)`, where the gradient of the weights needs them.
    result: Option<Tensor>,
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType, Device, Tensor};

    use super::*;
    use crate::ops::glu::tests::reference as activated;
    use crate::ops::testing::{Case, assert_close, devices, on_threads, parameters, random_tensor};

    fn router(score_func: ScoreFunc, top_k: usize, route_norm: bool) -> Router {
        Router { score_func, top_k, route_norm, route_scale: 2.5, groups: None, force_load_balance: false }
    }

    fn vec(tensor: &Tensor) -> Result<Vec<u32>> {
        Ok(tensor.flatten_all()?.to_vec1()?)
    }

    #[test]
    fn routing_weights_match_their_reference() -> Result<()> {
        for score_func in [ScoreFunc::Sigmoid, ScoreFunc::Softmax] {
            for (top_k, route_norm, n_experts) in [(1, false, 5), (3, false, 5), (2, true, 5), (9, true, 70)] {
                for dtype in [DType::F32, DType::BF16] {
                    let router = router(score_func, top_k, route_norm);
                    let logits = random_tensor("logits", &[23, n_experts])?.to_dtype(dtype)?;
                    let bias = (random_tensor("bias", &[n_experts])? * 0.3)?;
                    let (_, routing) = route(&Value::constant(logits.clone()), Some(&bias), &router, None)?;
                    let choices = routing.experts.clone();
                    Case::new("route").input(logits).check(
                        |v| {
                            let bias = bias.to_device(v[0].tensor().device())?;
                            let (weights, routing) = route(&v[0], Some(&bias), &router, None)?;
                            assert_eq!(vec(&routing.experts)?, vec(&choices)?);
                            Ok(weights)
                        },
                        |t| {
                            let scores = match score_func {
                                ScoreFunc::Sigmoid => (t[0].neg()?.exp()? + 1.0)?.recip()?,
                                ScoreFunc::Softmax => candle_nn::ops::softmax(&t[0], D::Minus1)?,
                            };
                            let chosen = scores.gather(&choices, 1)?;
                            let sum = chosen.sum_keepdim(1)?;
                            Ok(((if route_norm { chosen.broadcast_div(&sum)? } else { chosen }) * 2.5)?)
                        },
                    )?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn the_bias_changes_who_is_chosen_but_not_the_weights() -> Result<()> {
        for device in devices() {
            let logits = Value::constant(Tensor::new(&[[0f32, 1., 2.]], device)?);
            let bias = Tensor::new(&[1f32, 0., 0.], device)?;
            let router = Router { route_scale: 1.0, ..router(ScoreFunc::Sigmoid, 2, false) };
            let (weights, routing) = route(&logits, Some(&bias), &router, None)?;
            assert_eq!(vec(&routing.experts)?, [0, 2]);
            let expected = Tensor::new(&[[0.5f32, 1.0 / (1.0 + (-2f32).exp())]], &Device::Cpu)?;
            assert_close("weights", weights.tensor(), &expected, 2e-7)?;
        }
        Ok(())
    }

    #[test]
    fn of_equal_scores_the_first_are_chosen() -> Result<()> {
        for device in devices() {
            let mut logits = vec![0.5f32; 3 * 100];
            (logits[150], logits[200]) = (f32::INFINITY, f32::NEG_INFINITY);
            let logits = Value::constant(Tensor::from_vec(logits, (3, 100), device)?);
            let (_, routing) = route(&logits, None, &router(ScoreFunc::Sigmoid, 4, true), None)?;
            assert_eq!(vec(&routing.experts)?, [0, 1, 2, 3, 50, 0, 1, 2, 1, 2, 3, 4]);
        }
        Ok(())
    }

    #[test]
    fn experts_outside_the_best_groups_are_not_chosen() -> Result<()> {
        for device in devices() {
            // Groups (0, 1), (2, 3), (4, 5): expert 2 scores highest, but its group's two sum to least.
            let logits = Value::constant(Tensor::new(&[[0f32, 1., 1.2, -9., 0.5, 0.]], device)?);
            let grouped =
                |n, limit| Router { groups: Some(ExpertGroups { n, limit }), ..router(ScoreFunc::Sigmoid, 3, false) };
            let choices = |router: Router, bias: &[f32]| -> Result<Vec<u32>> {
                vec(&route(&logits, Some(&Tensor::new(bias, device)?), &router, None)?.1.experts)
            };
            let none = [0.0; 6];
            assert_eq!(choices(router(ScoreFunc::Sigmoid, 3, false), &none)?, [2, 1, 4]);
            assert_eq!(choices(grouped(3, 2), &none)?, [1, 4, 0]);
            // A bias counts in the sums.
            assert_eq!(choices(grouped(3, 2), &[0., 0., 0., 2., 0., 0.])?, [3, 2, 1]);
            // Groups of one expert compete by it alone.
            let one = Router { top_k: 2, ..grouped(6, 2) };
            assert_eq!(choices(one, &none)?, [2, 1]);
        }
        Ok(())
    }

    #[test]
    fn all_devices_choose_from_the_same_groups() -> Result<()> {
        let (logits, bias) = (random_tensor("logits", &[57, 96])?, (random_tensor("bias", &[96])? * 0.2)?);
        let groups = Some(ExpertGroups { n: 8, limit: 3 });
        let router = Router { groups, ..router(ScoreFunc::Sigmoid, 6, true) };
        let choices = |device: &Device| -> Result<Vec<u32>> {
            let (logits, bias) = (Value::constant(logits.to_device(device)?), bias.to_device(device)?);
            vec(&route(&logits, Some(&bias), &router, None)?.1.experts)
        };
        let expected = choices(&Device::Cpu)?;
        devices().iter().try_for_each(|device| {
            assert_eq!(choices(device)?, expected);
            Ok(())
        })
    }

    #[test]
    fn forced_balance_goes_round_robin() -> Result<()> {
        for device in devices() {
            let logits = Value::constant(random_tensor("logits", &[4, 3])?.to_device(device)?);
            let router = Router { force_load_balance: true, ..router(ScoreFunc::Softmax, 2, false) };
            assert_eq!(vec(&route(&logits, None, &router, None)?.1.experts)?, [0, 1, 2, 0, 1, 2, 0, 1]);
        }
        Ok(())
    }

    #[test]
    fn biases_follow_what_was_counted() -> Result<()> {
        for device in devices() {
            let tokens = Tensor::zeros(4, DType::U32, device)?;
            let count = |choices: &[u32]| {
                Routing::new(Tensor::from_slice(choices, (3, 2), device)?, 4, Some(&tokens)).map(drop)
            };
            let (counted, bias) = (tokens.copy()?, Tensor::new(&[0.5f32, 0.25, 0., -0.5], device)?);
            count(&[0, 1, 1, 0, 3, 0])?;
            count(&[0, 1, 3, 0, 1, 0])?;
            assert_eq!(vec(&tokens)?, [6, 4, 0, 2]);
            rebalance(&tokens, &counted, Some((&bias, 0.1)))?;
            assert_eq!((vec(&tokens)?, vec(&counted)?), (vec![0; 4], vec![6, 4, 0, 2]));
            // The mean is 3: two experts move down, and two up.
            assert_eq!(bias.to_vec1::<f32>()?, [0.5 - 0.1, 0.25 - 0.1, 0.1, -0.5 + 0.1]);
            count(&[2, 2, 2, 2, 2, 0])?;
            rebalance(&tokens, &counted, None)?;
            assert_eq!(vec(&counted)?, [1, 0, 5, 0]);
            assert_eq!(bias.to_vec1::<f32>()?, [0.5 - 0.1, 0.25 - 0.1, 0.1, -0.5 + 0.1]);
        }
        Ok(())
    }

    #[test]
    fn all_devices_have_the_same_biases() -> Result<()> {
        let tokens: Vec<u32> =
            random_tensor("tokens", &[300])?.to_vec1::<f32>()?.iter().map(|x| (x.abs() * 1e6) as u32).collect();
        let biases = |device: &Device| -> Result<Vec<f32>> {
            let tokens = Tensor::from_slice(&tokens, 300, device)?;
            let bias = random_tensor("bias", &[300])?.to_device(device)?;
            rebalance(&tokens, &Tensor::zeros(300, DType::U32, device)?, Some((&bias, 0.001)))?;
            Ok(bias.to_vec1()?)
        };
        let expected = biases(&Device::Cpu)?;
        devices().iter().try_for_each(|device| {
            assert_eq!(biases(device)?, expected);
            Ok(())
        })
    }

    /// Every expert on every token, weighted by a dense matrix of weights that is zero where it was not chosen.
    fn reference(t: &[Tensor], p: &[Tensor], choices: &[u32], before: bool, kind: Gate) -> Result<Tensor> {
        let with_bias = |x: Tensor, bias: usize, e: usize| -> Result<Tensor> {
            Ok(p.get(bias).map_or(Ok(x.clone()), |bias| x.broadcast_add(&bias.get(e)?))?)
        };
        let (n, top_k) = t[1].dims2()?;
        let n_experts = p[0].dim(0)?;
        let mut sum = t[0].zeros_like()?;
        for e in 0..n_experts {
            let chosen: Vec<f64> = choices.iter().map(|c| f64::from(u8::from(*c as usize == e))).collect();
            let chosen = Tensor::from_vec(chosen, (n, top_k), &Device::Cpu)?;
            for j in 0..top_k {
                let chosen = chosen.narrow(1, j, 1)?;
                let weight = (t[1].narrow(1, j, 1)? * &chosen)?;
                let x = if before { t[0].broadcast_mul(&weight)? } else { t[0].clone() };
                let (w1, w2, w3) = (p[0].get(e)?, p[1].get(e)?, p[2].get(e)?);
                let (gate, up) = (with_bias(x.matmul(&w1.t()?)?, 3, e)?, with_bias(x.matmul(&w3.t()?)?, 5, e)?);
                let y = with_bias(activated(kind, &gate, &up)?.matmul(&w2.t()?)?, 4, e)?;
                sum = (sum + y.broadcast_mul(if before { &chosen } else { &weight })?)?;
            }
        }
        Ok(sum)
    }

    fn check_experts(
        [n, dim, hidden]: [usize; 3],
        pattern: &[[u32; 2]],
        n_experts: usize,
        dtype: DType,
        before: bool,
        has_biases: bool,
        gate: Gate,
    ) -> Result<()> {
        let choices: Vec<u32> = (0..n).flat_map(|t| pattern[t % pattern.len()]).collect();
        // One as well as the other, with weights before and after.
        let is_residual = !has_biases;
        let mut case = Case::new("experts")
            .compute(dtype)
            .input(random_tensor("x", &[n, dim])?)
            .input(random_tensor("weights", &[n, 2])?)
            .parameter("w1", &[n_experts, hidden, dim])
            .parameter("w2", &[n_experts, dim, hidden])
            .parameter("w3", &[n_experts, hidden, dim]);
        if has_biases {
            case = case
                .parameter("b1", &[n_experts, hidden])
                .parameter("b2", &[n_experts, dim])
                .parameter("b3", &[n_experts, hidden]);
        }
        case.check_with_parameters(
            |v, p| {
                let choices = Tensor::from_slice(&choices, (n, 2), v[0].tensor().device())?;
                let routing = Arc::new(Routing::new(choices, n_experts, None)?);
                let biases = has_biases.then(|| [3, 4, 5].map(|i| p[i].clone()));
                let (w1, w2, w3) = (p[0].clone(), p[1].clone(), p[2].clone());
                let all = Experts { w1, w2, w3, biases, gate, score_before_experts: before };
                let residual = is_residual.then(|| Residual { stream: &v[0], is_read: true });
                experts(&v[0], &v[1], &routing, &all, residual)
            },
            |t, p| {
                let y = reference(t, p, &choices, before, gate)?;
                Ok(if is_residual { (&t[0] + y)? } else { y })
            },
        )
    }

    #[test]
    fn experts_match_their_reference() -> Result<()> {
        // Expert 2 is chosen by none.
        let pattern = [[0, 1], [3, 0], [1, 3]];
        for (dtype, before, has_biases) in [
            (DType::F32, true, false),
            (DType::F32, false, false),
            (DType::BF16, true, false),
            (DType::BF16, false, false),
            (DType::F32, true, true),
            (DType::F32, false, true),
            (DType::BF16, false, true),
        ] {
            check_experts([29, 6, 10], &pattern, 4, dtype, before, has_biases, Gate::Silu)?;
            check_experts([70, 24, 40], &pattern, 4, dtype, before, has_biases, Gate::Silu)?;
        }
        Ok(())
    }

    #[test]
    fn experts_with_any_gate_match_their_reference() -> Result<()> {
        let check = |dtype, dims, gate| check_experts(dims, &[[0, 1], [1, 2]], 3, dtype, true, true, gate);
        // Rounded, a number may fall on the other side of where a slope has a jump.
        check(DType::BF16, [29, 8, 16], Gate::GeluTanh)?;
        for gate in [Gate::GeluTanh, Gate::Relu, Gate::Clamped { limit: 1.4 }] {
            check(DType::F32, [29, 6, 10], gate)?;
        }
        Ok(())
    }

    #[test]
    fn experts_are_the_same_bits_on_one_thread_and_on_three() -> Result<()> {
        let (n, dim, hidden, n_experts) = (300, 24, 40, 5);
        let run = || -> Result<Vec<Vec<f32>>> {
            let choices: Vec<u32> = (0..2 * n).map(|slot| (slot * slot % n_experts) as u32).collect();
            let routing = Arc::new(Routing::new(Tensor::from_vec(choices, (n, 2), &Device::Cpu)?, n_experts, None)?);
            let shapes = [[n_experts, hidden, dim], [n_experts, dim, hidden], [n_experts, hidden, dim]];
            let values = shapes.iter().map(|s| random_tensor("w", s)).collect::<Result<Vec<_>>>()?;
            let p = parameters(&values, DType::F32)?;
            let (w1, w2, w3) = (p[0].clone(), p[1].clone(), p[2].clone());
            let x = Value::input(random_tensor("x", &[n, dim])?);
            let weights = Value::constant(random_tensor("weights", &[n, 2])?);
            let y = experts(
                &x,
                &weights,
                &routing,
                &Experts { w1, w2, w3, biases: None, gate: Gate::Silu, score_before_experts: true },
                None,
            )?;
            let forward = y.tensor().flatten_all()?.to_vec1()?;
            let dx = y.backward(random_tensor("dy", &[n, dim])?)?;
            let mut all = vec![forward, dx.flatten_all()?.to_vec1()?];
            for p in &p {
                all.push(p.grad()?.flatten_all()?.to_vec1()?);
            }
            Ok(all)
        };
        assert!(on_threads(1, run)? == on_threads(3, run)?);
        Ok(())
    }
}

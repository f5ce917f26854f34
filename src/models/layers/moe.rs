use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::{FeedForward, Linear, STD, normal};
use crate::Result;
use crate::autograd::{Init, StageBuilder, Value};
use crate::models::args::{FeedForwardKind, MoeArgs};
use crate::ops::{self, ExpertGroups, Experts, Gate, Router};

/// Token-choice mixture of experts, with shared experts that see every token.
#[derive(Debug)]
pub struct Moe {
    gate: Linear,
    router: Router,
    experts: Experts,
    shared_experts: Option<FeedForward>,
    load: Arc<ExpertLoad>,
}

impl Moe {
    pub fn new(
        stage: &mut StageBuilder,
        prefix: &str,
        args: &MoeArgs,
        [dim, hidden_dim]: [usize; 2],
        out_std: f64,
    ) -> Self {
        let n = args.num_experts;
        let gate = Linear::new(stage, format!("{prefix}.router.gate"), [n, dim], out_std, args.use_bias);
        let mut experts =
            |name, shape: &[usize], init| stage.parameter(format!("{prefix}.experts.{name}"), shape, init);
        let experts = Experts {
            w1: experts("w1", &[n, hidden_dim, dim], normal(STD)),
            w2: experts("w2", &[n, dim, hidden_dim], normal(out_std)),
            w3: experts("w3", &[n, hidden_dim, dim], normal(out_std)),
            biases: args.use_bias.then(|| {
                [("b1", hidden_dim), ("b2", dim), ("b3", hidden_dim)]
                    .map(|(name, width)| experts(name, &[n, width], Init::Constant(0.0)))
            }),
            gate: args.swiglu_limit.map_or(Gate::Silu, |limit| Gate::Clamped { limit: limit as f32 }),
            score_before_experts: args.score_before_experts,
        };
        let shared = args.num_shared_experts;
        let shared_experts = (shared > 0).then(|| {
            let dims = [dim, shared * hidden_dim];
            FeedForward::new(stage, &format!("{prefix}.shared_experts"), FeedForwardKind::Swiglu, dims, false, out_std)
        });
        let router = Router {
            score_func: args.score_func,
            top_k: args.top_k,
            route_norm: args.route_norm,
            route_scale: args.route_scale as f32,
            groups: args.num_expert_groups.zip(args.num_limited_groups).map(|(n, limit)| ExpertGroups { n, limit }),
            force_load_balance: args.force_load_balance,
        };
        Self { gate, router, experts, shared_experts, load: Arc::new(ExpertLoad::new(prefix, args)) }
    }

    pub fn load(&self) -> &Arc<ExpertLoad> {
        &self.load
    }

    /// `(b, s, dim) -> (b, s, dim)`. `count`: whether these tokens are part of the load that the biases follow.
    pub fn forward(&self, x: &Value, count: bool) -> Result<Value> {
        let (b, s, dim) = x.tensor().dims3()?;
        let tokens = x.reshape(&[b * s, dim])?;
        let bias = self.load.bias();
        let (weights, routing) = ops::route(&self.gate.forward(&tokens)?, bias.as_deref(), &self.router)?;
        if count {
            self.load.count(routing.tokens_per_expert());
        }
        let mut y = ops::experts(&tokens, &weights, &routing, &self.experts)?;
        if let Some(shared_experts) = &self.shared_experts {
            y = ops::add(&shared_experts.forward(&tokens)?, &y)?;
        }
        y.reshape(&[b, s, dim])
    }
}

/// How busy the experts of a layer are, and the biases that even it out without an auxiliary loss.
///
/// # Source
/// Wang et al., arXiv:2408.15664, with the bias's mean kept at zero.
#[derive(Debug)]
pub struct ExpertLoad {
    /// The field path of the layer's biases.
    fqn: String,
    coeff: Option<f32>,
    bias: RwLock<Vec<f32>>,
    /// Tokens since the last [`ExpertLoad::rebalance`].
    tokens: Mutex<Vec<u64>>,
}

impl ExpertLoad {
    fn new(prefix: &str, args: &MoeArgs) -> Self {
        Self {
            fqn: format!("{prefix}.expert_bias"),
            coeff: args.load_balance_coeff.map(|coeff| coeff as f32),
            bias: RwLock::new(vec![0.0; args.num_experts]),
            tokens: Mutex::new(vec![0; args.num_experts]),
        }
    }

    /// The field path of the biases, as in `layers.1.moe.expert_bias`.
    pub fn fqn(&self) -> &str {
        &self.fqn
    }

    /// What is added to scores when experts are chosen; `None` in a layer that balances nothing.
    pub fn bias(&self) -> Option<Vec<f32>> {
        self.coeff.map(|_| self.bias.read().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Overwrites the biases, one per expert.
    pub fn set_bias(&self, bias: &[f32]) {
        self.bias.write().unwrap_or_else(PoisonError::into_inner).copy_from_slice(bias);
    }

    fn count(&self, tokens_per_expert: impl Iterator<Item = usize>) {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.iter_mut().zip(tokens_per_expert).for_each(|(sum, n)| *sum += n as u64);
    }

    /// Moves each bias by `coeff` towards an even load (up where an expert had fewer tokens than the mean), less the mean
    /// of these moves; not at all unless `moves`, as the biases of a frozen model. Returns the tokens counted since the last
    /// time, and starts counting anew.
    pub fn rebalance(&self, moves: bool) -> Vec<u64> {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let n = tokens.len();
        let counted = std::mem::replace(&mut *tokens, vec![0; n]);
        if let Some(coeff) = self.coeff.filter(|_| moves) {
            let mean = counted.iter().sum::<u64>() as f32 / n as f32;
            let towards_mean = |tokens: &u64| match mean - *tokens as f32 {
                0.0 => 0.0,
                gap => coeff * gap.signum(),
            };
            let moves: Vec<f32> = counted.iter().map(towards_mean).collect();
            let drift = moves.iter().sum::<f32>() / n as f32;
            let mut bias = self.bias.write().unwrap_or_else(PoisonError::into_inner);
            bias.iter_mut().zip(moves).for_each(|(bias, by)| *bias += by - drift);
        }
        counted
    }
}

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};

use super::{FeedForward, Linear, STD, normal};
use crate::Result;
use crate::autograd::{Init, StageBuilder, Value};
use crate::models::args::{FeedForwardKind, MoeArgs};
use crate::ops::{self, ExpertGroups, Experts, Gate, Residual, Router};

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

    /// `(b, s, dim) -> (b, s, dim)`, added to `residual` if there is one. `count`: whether these tokens are part of the load that
    /// the biases follow.
    pub fn forward(&self, residual: Option<Residual>, x: &Value, count: bool) -> Result<Value> {
        let (b, s, dim) = x.tensor().dims3()?;
        let tokens = x.reshape(&[b * s, dim])?;
        let stream = residual.map(|residual| residual.stream.reshape(&[b * s, dim])).transpose()?;
        let residual = residual.zip(stream.as_ref()).map(|(residual, stream)| Residual { stream, ..residual });
        let counter = count.then(|| &self.load.state().tokens);
        let (weights, routing) = ops::route(&self.gate.forward(&tokens)?, self.load.bias(), &self.router, counter)?;
        let experts = |residual| ops::experts(&tokens, &weights, &routing, &self.experts, residual);
        let y = match (&self.shared_experts, residual) {
            (None, residual) => experts(residual)?,
            (Some(shared), Some(residual)) if residual.is_added_in_passing() => {
                let stream = &experts(Some(residual))?;
                shared.forward(Some(Residual { stream, ..residual }), &tokens)?
            }
            (Some(shared), residual) => {
                let stream = &experts(None)?;
                ops::add_onto(residual, shared.forward(Some(Residual { stream, is_read: true }), &tokens)?)?
            }
        };
        y.reshape(&[b, s, dim])
    }
}

/// How busy the experts of a layer are, and the biases that even it out without an auxiliary loss: all on the device of the
/// model, which a step need not wait for.
#[derive(Debug)]
pub struct ExpertLoad {
    /// The field path of the layer's biases.
    fqn: String,
    coeff: Option<f32>,
    n_experts: usize,
    state: OnceLock<State>,
}

/// `(n_experts,)` each, and written in place: a recorded step reads and writes where it did.
#[derive(Debug)]
struct State {
    /// f32.
    bias: Tensor,
    /// Tokens since the last [`ExpertLoad::rebalance`], u32.
    tokens: Tensor,
    /// Those until then.
    counted: Tensor,
}

impl ExpertLoad {
    fn new(prefix: &str, args: &MoeArgs) -> Self {
        Self {
            fqn: format!("{prefix}.expert_bias"),
            coeff: args.load_balance_coeff.map(|coeff| coeff as f32),
            n_experts: args.num_experts,
            state: OnceLock::new(),
        }
    }

    /// Takes the memory, zeroed.
    pub fn allocate(&self, device: &Device) -> Result<()> {
        let zeros = |dtype| Tensor::zeros(self.n_experts, dtype, device);
        let state = State { bias: zeros(DType::F32)?, tokens: zeros(DType::U32)?, counted: zeros(DType::U32)? };
        self.state.set(state).expect("a model is allocated once");
        Ok(())
    }

    fn state(&self) -> &State {
        self.state.get().expect("a model is allocated before it is used")
    }

    /// The field path of the biases, as in `layers.1.moe.expert_bias`.
    pub fn fqn(&self) -> &str {
        &self.fqn
    }

    /// How many biases there are: 0 in a layer that balances nothing.
    pub fn n_biases(&self) -> usize {
        if self.coeff.is_some() { self.n_experts } else { 0 }
    }

    /// What is added to scores when experts are chosen, `(n_experts,)` f32; `None` in a layer that balances nothing.
    pub fn bias(&self) -> Option<&Tensor> {
        self.coeff.map(|_| &self.state().bias)
    }

    /// Overwrites the biases, one per expert.
    ///
    /// # Errors
    /// If there are not as many.
    pub fn set_bias(&self, bias: &Tensor) -> Result<()> {
        let own = &self.state().bias;
        let bias = bias.reshape(self.n_experts)?.to_dtype(DType::F32)?.to_device(own.device())?;
        Ok(own.slice_set(&bias, 0, 0)?)
    }

    /// Ends a step: counting starts anew, and each bias moves towards an even load, as [`ops::rebalance`] does; not at all
    /// unless `moves`, as the biases of a frozen model.
    pub fn rebalance(&self, moves: bool) -> Result<()> {
        let State { bias, tokens, counted } = self.state();
        ops::rebalance(tokens, counted, self.coeff.filter(|_| moves).map(|coeff| (bias, coeff)))
    }

    /// The tokens of each expert in the step that the last [`ExpertLoad::rebalance`] has ended. Waits for the device.
    pub fn tokens_per_expert(&self) -> Result<Vec<u64>> {
        Ok(self.state().counted.to_vec1::<u32>()?.into_iter().map(u64::from).collect())
    }
}

//! A run that goes on under another config than it began with: what may differ, and what that means.

use tracing::subscriber::{NoSubscriber, with_default};
use tracing::{info, warn};

use super::build::schedule;
use crate::Result;
use crate::components::checkpoint::StepFolder;
use crate::config::{self, CheckpointState, JobConfig, Loaded};
use crate::data::tokenizer::TokenizerFile;

/// What the new value of a key does to a run that goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// None on its numbers, or one that is said elsewhere.
    None,
    /// From here on other numbers than without the change.
    OtherNumbers,
    /// Those of the learning rate's schedule, unless its factors are the same.
    Schedule,
    /// The state of the checkpoint would make no sense.
    Refused,
}

fn effect(key: &str, config: &JobConfig) -> Effect {
    let loads = |state| !config.checkpoint.exclude_from_loading.contains(&state);
    match key {
        // They follow from keys of other sections, which are compared themselves.
        "model.args.max_seq_len" | "model.args.moe_args.force_load_balance" => Effect::None,
        "model.lora.rank" | "model.lora.targets" => Effect::Refused,
        key if key.starts_with("model.args.") => Effect::Refused,
        "optimizer.name" if loads(CheckpointState::Optimizer) => Effect::Refused,
        "training.steps" => Effect::Schedule,
        key if key.starts_with("lr_scheduler.") => Effect::Schedule,
        "optimizer.name"
        | "optimizer.lr"
        | "optimizer.beta1"
        | "optimizer.beta2"
        | "optimizer.eps"
        | "optimizer.weight_decay" => Effect::OtherNumbers,
        "training.local_batch_size"
        | "training.global_batch_size"
        | "training.seq_len"
        | "training.max_norm"
        | "training.dtype"
        | "training.mixed_precision_param" => Effect::OtherNumbers,
        "data.text_field" | "data.messages_field" | "data.prompt_field" | "data.completion_field" => {
            Effect::OtherNumbers
        }
        "model.converters"
        | "quantize.linear.float8.recipe_name"
        | "quantize.linear.float8.filter_fqns"
        | "quantize.linear.float8.emulate" => Effect::OtherNumbers,
        "model.lora.alpha" | "model.lora.dropout" | "debug.moe_force_load_balance" => Effect::OtherNumbers,
        _ => Effect::None,
    }
}

/// Compares the config and the tokenizer of the run that `then` is a step of with those that it is to go on with, and logs
/// each change.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) if the run cannot go on like that.
pub fn check(then: &StepFolder, loaded: &Loaded, now: &JobConfig, tokenizer: &[TokenizerFile]) -> Result<()> {
    let path = then.path().display();
    let before = match config::parse(&format!("{path}/config.toml"), &then.config_toml()?) {
        Ok(before) => before.config,
        Err(error) => {
            warn!("what this run began with cannot be compared with its config now:\n{error}");
            return Ok(());
        }
    };

    let mut refused: Vec<(&str, String)> = Vec::new();
    let changes = config::changes(&before, now);
    for change in &changes {
        match effect(&change.key, now) {
            Effect::Refused => refused.push((&change.key, format!("this run cannot go on with {change}"))),
            Effect::OtherNumbers => warn_of(change),
            Effect::Schedule if !has_same_schedule(&before, now) => warn_of(change),
            Effect::Schedule | Effect::None => info!("changed since the checkpoint: {change}"),
        }
    }
    let tokenizer_then = then.tokenizer_files()?;
    // Token shards can do without.
    if !tokenizer_then.is_empty() && !tokenizer.is_empty() {
        let is_same = |file: &TokenizerFile| {
            tokenizer_then.iter().any(|(name, bytes)| (name, bytes) == (&file.name, &file.bytes))
        };
        let another = tokenizer.iter().find(|file| !is_same(file));
        if let Some(name) = another.map(|file| &file.name) {
            let what =
                format!("this run cannot go on with another tokenizer: {name} is not the one that it began with");
            refused.push(("model.hf_assets_path", what));
        } else if tokenizer.len() != tokenizer_then.len() {
            let what = "this run cannot go on with another tokenizer: it began with more files".to_owned();
            refused.push(("model.hf_assets_path", what));
        }
    }
    if refused.is_empty() {
        return Ok(());
    }
    let remedy = format!(
        "set it back; or begin another run in another job.dump_folder, with the weights of this one where they fit: \
         checkpoint.initial_load_path = \"{path}\""
    );
    Err(loaded.refuse(&refused, &remedy))
}

fn warn_of(change: &config::Change) {
    warn!("changed since the checkpoint: {change}: the run goes on, no longer bit for bit as without that change");
}

/// Whether the learning rates were and will be the same, as far as both schedules go.
fn has_same_schedule(before: &JobConfig, now: &JobConfig) -> bool {
    // What is odd about the old one was said then.
    let before_schedule = with_default(NoSubscriber::default(), || schedule(before));
    let now_schedule = with_default(NoSubscriber::default(), || schedule(now));
    let common = before.training.steps.min(now.training.steps);
    (0..common).all(|index| before_schedule.factor(index) == now_schedule.factor(index))
}

//! From a job config to a [`Trainer`] that is ready to step.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use tracing::{info, warn};

use super::memory::{self, Classes};
use super::profile::StepProfiler;
use super::{Trainer, continuation, convert};
use crate::autograd::Precision;
use crate::components::checkpoint::{Assets, CheckpointManager, Weights, holds_hugging_face, read_config};
use crate::components::loss_guard::LossGuard;
use crate::components::lr_scheduler::LrScheduler;
use crate::components::metrics::{self, MetricsLogger, MetricsSettings, grouped};
use crate::components::optimizer::Optimizer;
use crate::components::validate::Validator;
use crate::config::{AcMode, JobConfig, Loaded, ModelArgs, OptimizerName};
use crate::data::datasets::{self, DatasetSpec, Vocabulary};
use crate::data::tokenizer::Tokenizer;
use crate::data::{Encode, Loader, LoaderOptions, hub};
use crate::engine::Recompute;
use crate::models::args::{AttnMaskType, AttnType, DecoderArgs};
use crate::models::hf;
use crate::models::{self, Decoder};
use crate::ops::Adam;
use crate::tools::device::{Choice, DeviceFacts};
use crate::tools::{files, profiler};
use crate::{Error, Result};

/// What the metrics need to know of a run.
pub struct RunFacts {
    pub device: DeviceFacts,
    flops_per_token: f64,
}

impl RunFacts {
    pub fn metrics(&self, config: &JobConfig, start_step: usize) -> Result<MetricsLogger> {
        let settings = MetricsSettings {
            log_freq: config.metrics.log_freq as u64,
            enable_tensorboard: config.metrics.enable_tensorboard,
            save_tb_folder: config.metrics.save_tb_folder.clone(),
            disable_color_printing: config.metrics.disable_color_printing,
        };
        let facts = metrics::RunFacts {
            flops_per_token: self.flops_per_token,
            device: self.device.clone(),
            total_steps: config.training.steps as u64,
            start_step: start_step as u64,
        };
        MetricsLogger::new(settings, &config.job.dump_folder, facts)
    }
}

/// What the model must know of the text, and what a checkpoint keeps of it.
struct Text {
    tokenizer: Option<Arc<Tokenizer>>,
    vocabulary: Vocabulary,
}

impl Trainer {
    /// Builds every part, and brings all of them to where the run's own checkpoint, or `initial_load_path`, left off.
    pub fn build(loaded: Loaded) -> Result<Self> {
        let text = Text::of(&loaded.config)?;
        let args = decoder_args(&loaded.config, &text.vocabulary)?;
        let data = train_spec(&loaded.config);
        loaded.notices.iter().for_each(|notice| warn!("{notice}"));
        let mut config = loaded.config.clone();
        config.model.args = ModelArgs::all(&args);
        if config.job.print_config {
            info!("Running with this config:\n{}", config.to_toml());
        }

        let choice = Choice::of_environment()?;
        let (device, facts) = (choice.device.clone(), choice.facts()?);
        info!("Device: {facts}; {choice}");
        profiler::wait_for(&device);
        let keys = [
            ("compile.enable", config.compile.enable),
            ("training.enable_cpu_offload", config.training.enable_cpu_offload),
        ];
        for (key, _) in keys.iter().filter(|(_, is_on)| *is_on && device.is_cpu()) {
            info!("`{key}` has no effect on a CPU");
        }
        convert::check(&loaded, &device)?;
        let mut checkpoints =
            CheckpointManager::open(config.checkpoint.clone(), &config.job.dump_folder, text.assets(&config, &args))?;
        // From here on the dump folder is this process's.
        if let Some(file) = &config.job.save_config_file {
            let path = config.job.dump_folder.join(file);
            let folder = path.parent().unwrap_or(&config.job.dump_folder);
            std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
            files::write(&path, &mut config.to_toml().as_bytes()).map_err(Error::io("write", &path))?;
        }
        let adapts = config.model.lora.rank.is_some();
        let base = adapts.then(|| checkpoints.open_base()).transpose()?;
        let resume = checkpoints.find()?;
        if let Some(then) = resume.as_ref().and_then(|resume| resume.folder.as_ref()) {
            let tokenizer = text.tokenizer.as_ref().map_or(&[][..], |tokenizer| tokenizer.files());
            continuation::check(then, &loaded, &config, tokenizer)?;
        }
        let train_state = resume.as_ref().and_then(|resume| resume.train_state.clone());
        let seed = match (&train_state, config.debug.seed) {
            (Some(state), Some(seed)) if state.seed != seed => {
                warn!("debug.seed = {seed} is not used: this run began with seed {}", state.seed);
                state.seed
            }
            (Some(state), _) => state.seed,
            (None, Some(seed)) => seed,
            // Small enough to be typed.
            (None, None) => u64::from(rand::random::<u32>()),
        };

        info!("Seed: {seed}");

        let mut model = Decoder::new(&args, text.vocabulary.eos_id)?;
        model.adapt(&config.model.lora, seed)?;
        convert::convert(&model, &config);
        let (storage, compute) = (config.training.dtype.into(), config.training.mixed_precision_param.into());
        let precision = Precision { storage, compute };
        memory::check(&model, precision, &config, &facts)?;
        let classes = Classes::of(&model, precision, config.training.enable_cpu_offload && !device.is_cpu());
        let explain = |class, error| classes.explain(error, class, &config, &facts);

        // Data before memory is taken: what is wrong with a dataset shows at once.
        let mut loader = train_loader(&config, &data, &text, seed)?;
        let validator = validator(&config, &data, &text)?;

        let flops_per_token = model.flops_per_token(config.training.seq_len);
        let trained: usize = model.trained_parameters().map(|parameter| parameter.numel()).sum();
        info!(
            "Model {} {}: {} parameters{}, {:.1} MFLOP per token",
            config.model.name,
            config.model.flavor,
            grouped(model.n_params() as f64, 0),
            if adapts {
                format!(", {} more in adapters, which are trained", grouped(trained as f64, 0))
            } else {
                String::new()
            },
            flops_per_token as f64 / 1e6
        );
        let of_optimizer = if config.training.enable_cpu_offload { &Device::Cpu } else { &device };
        model
            .allocate_apart(precision, &device, of_optimizer, true)
            .map_err(|error| explain("weights and gradients", error))?;
        let adam = Adam {
            beta1: config.optimizer.beta1,
            beta2: config.optimizer.beta2,
            eps: config.optimizer.eps,
            weight_decay: config.optimizer.weight_decay,
            decoupled: config.optimizer.name == OptimizerName::AdamW,
        };
        let mut optimizer =
            Optimizer::new(adam, model.trained()).map_err(|error| explain("the optimizer's moments", error))?;

        let step = train_state.as_ref().map_or(0, |state| state.step);
        if let Some(base) = base {
            base.load(&model.base_shapes(), |name, tensor| model.set(name, &tensor))?;
        }
        match resume.as_ref().and_then(|resume| resume.model.as_ref()) {
            Some(weights) => weights.load(&model.state_shapes(), |name, tensor| model.set(name, &tensor))?,
            None => model.trained_parameters().try_for_each(|parameter| models::initialize(parameter, seed))?,
        }
        if let Some(resume) = &resume {
            if let Some(weights) = &resume.optimizer {
                load_moments(&mut optimizer, &model, weights, resume.optimizer_steps.unwrap_or(step as u64))?;
            }
            if let Some(state) = &resume.dataloader {
                loader.load_state(state)?;
            }
        }

        let mut guard = LossGuard::new(&config.training);
        if let Some(state) = resume.as_ref().and_then(|resume| resume.loss_guard.as_ref()) {
            guard.load_state(state)?;
        }

        let profiling = &config.profiling;
        let schedule = schedule(&config);
        let local_batch_size = config.training.local_batch_size;
        Ok(Self {
            recompute: recompute(&config),
            grad_accum: config.training.global_batch_size.map_or(1, |global| global / local_batch_size),
            n_tokens_seen: train_state.map_or(0, |state| state.n_tokens_seen),
            classes,
            #[cfg(feature = "cuda")]
            recorder: None,
            run: RunFacts { device: facts, flops_per_token: flops_per_token as f64 },
            profiler: StepProfiler::new(profiling, &config.job.dump_folder),
            config,
            device,
            model,
            optimizer,
            schedule,
            guard,
            loader,
            validator,
            checkpoints,
            step,
            seed,
        })
    }
}

impl Text {
    /// The tokenizer of `model.hf_assets_path`; where token shards describe themselves, only if the config names one.
    fn of(config: &JobConfig) -> Result<Self> {
        let of_shards = datasets::vocabulary(&train_spec(config))?;
        let path = &config.model.hf_assets_path;
        let wanted = of_shards.is_none() || *path != JobConfig::default().model.hf_assets_path;
        let tokenizer = wanted.then(|| Tokenizer::from_dir(path)).transpose()?.map(Arc::new);
        let vocabulary = match (of_shards, &tokenizer) {
            (Some(vocabulary), _) => vocabulary,
            (None, Some(tokenizer)) => Vocabulary { vocab_size: tokenizer.vocab_size(), eos_id: tokenizer.eos_id() },
            (None, None) => unreachable!("without shards that describe themselves a tokenizer is wanted"),
        };
        Ok(Self { tokenizer, vocabulary })
    }

    fn encoder(&self) -> Option<Arc<dyn Encode>> {
        self.tokenizer.clone().map(|tokenizer| tokenizer as Arc<dyn Encode>)
    }

    fn assets(&self, config: &JobConfig, args: &DecoderArgs) -> Assets {
        let files = self.tokenizer.iter().flat_map(|tokenizer| tokenizer.files());
        Assets {
            hf_assets_path: config.model.hf_assets_path.clone(),
            model_name: config.model.name.clone(),
            args: args.clone(),
            config_toml: config.to_toml(),
            tokenizer_files: files.map(|file| (file.name.clone(), file.bytes.clone())).collect(),
            bos_id: self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.bos_id()),
            eos_id: self.vocabulary.eos_id,
        }
    }
}

/// The arguments of the model that a job trains; those of its flavor's vocabulary, where its tokenizer is not there.
pub fn model_args(config: &JobConfig) -> Result<DecoderArgs> {
    let vocabulary = match Text::of(config) {
        Ok(text) => text.vocabulary,
        Err(error @ Error::Tokenizer(_)) => {
            warn!("{error}\n  = training will ask for it; the vocabulary shown is that of the flavor");
            Vocabulary { vocab_size: 0, eos_id: None }
        }
        Err(error) => return Err(error),
    };
    decoder_args(config, &vocabulary)
}

/// The flavor's arguments with `[model.args]` over them, fitted to the vocabulary and to the sequences.
fn decoder_args(config: &JobConfig, vocabulary: &Vocabulary) -> Result<DecoderArgs> {
    let model = &config.model;
    let base = match model.flavor.as_str() {
        models::FLAVOR_OF_CONFIG_JSON => args_of_config_json(config)?,
        flavor => models::flavor(&model.name, flavor)
            .ok_or_else(|| Error::Model(format!("there is no model {} {flavor}", model.name)))?,
    };
    let mut args = model.args.apply(&base)?;

    let (vocab_size, needed) = (args.vocab_size, vocabulary.vocab_size);
    if needed > vocab_size {
        if config.model.args.sets("vocab_size") {
            return Err(Error::Config(format!(
                "error: `model.args.vocab_size` = {vocab_size} is smaller than the tokenizer's {needed}\n   = at least \
                 {needed}, or leave it out to take the tokenizer's"
            )));
        }
        args.vocab_size = needed;
        let tables = if args.enable_weight_tying { 1 } else { 2 };
        warn!(
            "The tokenizer has {} entries, the flavor {}: the model takes the tokenizer's, which costs {} parameters \
             more. A smaller tokenizer saves them.",
            grouped(needed as f64, 0),
            grouped(vocab_size as f64, 0),
            grouped((tables * args.dim * (needed - vocab_size)) as f64, 0)
        );
    }
    let longest = config.training.seq_len.max(if config.validation.enable { config.validation.seq_len } else { 0 });
    if config.model.args.sets("max_seq_len") && args.max_seq_len < longest {
        return Err(Error::Config(format!(
            "error: `model.args.max_seq_len` = {} is shorter than the sequences of {longest} tokens to come\n   = at \
             least {longest}, or leave it out",
            args.max_seq_len
        )));
    }
    args.max_seq_len = longest;
    let spec = train_spec(config);
    if spec.is_of_examples() && !model.args.sets("attn_mask_type") && !args.masks_documents() {
        info!(
            "Attention stays inside each document of `{}`: model.args.attn_mask_type = \"block_causal\"",
            spec.dataset
        );
        args.attn_mask_type = AttnMaskType::BlockCausal;
        if args.attn_type == AttnType::Sdpa {
            args.attn_type = AttnType::Varlen;
        }
    }
    if let Some(moe) = &mut args.moe_args {
        moe.force_load_balance |= config.debug.moe_force_load_balance;
    }
    Ok(args)
}

/// What `model.flavor = "hf"` stands for.
fn args_of_config_json(config: &JobConfig) -> Result<DecoderArgs> {
    let initial = config.checkpoint.initial_load_path.as_ref().filter(|_| config.checkpoint.initial_load_in_hf);
    let folder = initial.unwrap_or(&config.model.hf_assets_path);
    if !holds_hugging_face(folder) {
        return Err(Error::Model(format!(
            "model.flavor = \"hf\" takes the model's sizes from a config.json, and {} holds none\n   = set \
             model.hf_assets_path to a folder with one, or choose another flavor",
            folder.display()
        )));
    }
    let (family, args) = hf::args_from_config(&read_config(folder)?)?;
    if !family.is_named(&config.model.name) {
        return Err(Error::Model(format!(
            "{} describes a {} model, and model.name is {:?}",
            folder.join("config.json").display(),
            family.name(),
            config.model.name
        )));
    }
    Ok(args)
}

fn train_spec(config: &JobConfig) -> DatasetSpec {
    DatasetSpec {
        dataset: config.training.dataset.clone(),
        dataset_path: config.training.dataset_path.clone(),
        text_field: config.data.text_field.clone(),
        messages_field: config.data.messages_field.clone(),
        prompt_field: config.data.prompt_field.clone(),
        completion_field: config.data.completion_field.clone(),
        masks_examples: config.model.args.0.get("attn_mask_type").and_then(|mask| mask.as_str()) != Some("causal"),
        max_bad_records: config.data.max_bad_records,
        validates: None,
    }
}

fn train_loader(config: &JobConfig, data: &DatasetSpec, text: &Text, seed: u64) -> Result<Loader> {
    let options = LoaderOptions {
        batch_size: config.training.local_batch_size,
        seq_len: config.training.seq_len,
        dp_rank: 0,
        dp_degree: 1,
        shuffle: config.data.shuffle.then_some(seed),
        repeat: true,
        num_workers: config.data.num_workers,
    };
    Loader::new(data, text.encoder(), options, &hub::open_dataset)
}

fn validator(config: &JobConfig, data: &DatasetSpec, text: &Text) -> Result<Option<Validator>> {
    let validation = &config.validation;
    if !validation.enable {
        return Ok(None);
    }
    let spec = DatasetSpec {
        dataset: validation.dataset.clone(),
        dataset_path: validation.dataset_path.clone(),
        validates: Some(config.training.dataset.clone()),
        ..data.clone()
    };
    let options = LoaderOptions {
        batch_size: validation.local_batch_size,
        seq_len: validation.seq_len,
        dp_rank: 0,
        dp_degree: 1,
        shuffle: None,
        repeat: false,
        num_workers: config.data.num_workers,
    };
    let loader = Loader::new(&spec, text.encoder(), options, &hub::open_dataset)?;
    Ok(Some(Validator::new(loader, validation.steps)))
}

pub fn schedule(config: &JobConfig) -> LrScheduler {
    let keys = &config.lr_scheduler;
    LrScheduler::new(config.training.steps, keys.warmup_steps, keys.decay_ratio, keys.decay_type, keys.min_lr_factor)
}

fn recompute(config: &JobConfig) -> Recompute {
    let keys = &config.activation_checkpoint;
    match keys.mode {
        AcMode::Full => Recompute::All,
        AcMode::Selective => keys.selective_every().map_or(Recompute::None, Recompute::EveryNth),
        AcMode::None | AcMode::MemoryBudget => Recompute::None,
    }
}

fn load_moments(optimizer: &mut Optimizer, model: &Decoder, weights: &Weights, steps: u64) -> Result<()> {
    let windows: HashMap<String, Tensor> = optimizer.state(model.trained())?.into_iter().collect();
    let expected: Vec<_> = windows.iter().map(|(name, window)| (name.clone(), window.dims().to_vec())).collect();
    weights.load(&expected, |name, tensor| {
        let window = &windows[name];
        Ok(window.slice_set(&tensor.to_dtype(window.dtype())?.to_device(window.device())?.contiguous()?, 0, 0)?)
    })?;
    optimizer.set_steps(steps);
    Ok(())
}

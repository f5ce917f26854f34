//! The job config: one struct per TOML section, loaded from defaults < TOML < flags, checked as a whole.
//!
//! The structs are the single source of truth. [`schema`] reads off them what each key may hold, [`read`] holds files
//! and flags against that, [`check`] knows what values exclude each other, and [`diagnostic`] reports all faults at once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::models::args::{AttnMaskType, AttnType};
use crate::tools::files;
use crate::{Error, Result, models};

mod activation_checkpoint;
mod changes;
mod check;
mod checkpoint;
mod comm;
mod compile;
mod data;
mod debug;
mod diagnostic;
mod experimental;
mod fault_tolerance;
mod job;
mod lr_scheduler;
mod memory_estimation;
mod metrics;
mod minus_one;
mod model;
mod none;
mod optimizer;
mod overrides;
mod parallelism;
mod print;
mod profiling;
mod quantize;
mod read;
mod schema;
mod training;
mod validation;

pub use activation_checkpoint::{AcMode, ActivationCheckpoint};
pub use changes::{Change, changes};
pub use checkpoint::{AsyncMode, Checkpoint, CheckpointState, ExportDtype};
pub use comm::{Comm, CommMode};
pub use compile::{Compile, Component};
pub use data::Data;
pub use debug::Debug;
pub use experimental::Experimental;
pub use fault_tolerance::FaultTolerance;
pub use job::Job;
pub use lr_scheduler::{DecayType, LrScheduler};
pub use memory_estimation::MemoryEstimation;
pub use metrics::Metrics;
pub use model::{Model, ModelArgs};
pub use optimizer::{Implementation, Optimizer, OptimizerName};
pub use overrides::{Override, split_overrides};
pub use parallelism::{Parallelism, ReshardAfterForward, RotateMethod};
pub use profiling::Profiling;
pub use quantize::{
    CastKernel, Float8GroupedMm, Float8Linear, Float8Recipe, Fqns, MxGroupedMm, MxLinear, MxRecipe, Quantize,
    QuantizeGroupedMm, QuantizeLinear,
};
pub use schema::json_schema;
pub use training::{Dtype, NanPolicy, SpikePolicy, Training};
pub use validation::Validation;

use diagnostic::{Document, Origin, Origins};

/// Of a job file, a thousand times those that there are.
const MAX_BYTES: u64 = 4_000_000;

/// A titan job file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct JobConfig {
    pub job: Job,
    pub profiling: Profiling,
    pub metrics: Metrics,
    pub model: Model,
    pub optimizer: Optimizer,
    pub lr_scheduler: LrScheduler,
    pub training: Training,
    pub data: Data,
    pub parallelism: Parallelism,
    pub checkpoint: Checkpoint,
    pub activation_checkpoint: ActivationCheckpoint,
    pub compile: Compile,
    pub quantize: Quantize,
    pub comm: Comm,
    pub memory_estimation: MemoryEstimation,
    pub fault_tolerance: FaultTolerance,
    pub experimental: Experimental,
    pub validation: Validation,
    pub debug: Debug,
}

impl JobConfig {
    /// All keys with their values. [`parse`] makes the same config of it.
    pub fn to_toml(&self) -> String {
        self.print(&|_, line| line)
    }

    fn print(&self, decorate: &dyn Fn(&str, String) -> String) -> String {
        print::toml(&none::to_table(self, &schema::SECTIONS), decorate)
    }
}

/// A job config and where its values come from.
pub struct Loaded {
    pub config: JobConfig,
    /// What the user should know before the run starts, each to be logged once: deprecated keys, and keys that were
    /// set but have no effect.
    pub notices: Vec<String>,
    document: Option<Document>,
    origins: Origins,
}

/// Loads a job config: defaults, below the file at `path`, below `overrides`.
///
/// # Errors
/// [`Error::Config`] names all faults of file and overrides at once; [`Error::Usage`] if there is no such file.
pub fn load(path: Option<&Path>, overrides: &[Override]) -> Result<Loaded> {
    let document = path.map(open).transpose()?;
    let mut loaded = resolve(document, overrides)?;
    if let Some(path) = path {
        loaded.config.job.config_file = Some(path.to_owned());
        loaded.origins.insert("job.config_file".into(), Origin::Flag("--config".into()));
    }
    Ok(loaded)
}

/// Loads a job config from text, such as the one inside a checkpoint. `name` is what messages call it.
///
/// # Errors
/// [`Error::Config`] names all faults at once.
pub fn parse(name: &str, text: &str) -> Result<Loaded> {
    resolve(Some(Document { name: name.to_owned(), text: text.to_owned() }), &[])
}

fn open(path: &Path) -> Result<Document> {
    let text = files::read(path, MAX_BYTES).map_err(|error| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let folder =
            path.parent().map_or(Path::new("."), |it| if it.as_os_str().is_empty() { Path::new(".") } else { it });
        let others: Vec<PathBuf> =
            std::fs::read_dir(folder).into_iter().flatten().flatten().map(|it| it.path()).collect();
        let names = others
            .iter()
            .filter(|it| it.extension().is_some_and(|it| it == "toml"))
            .filter_map(|it| it.file_name()?.to_str());
        let hint = diagnostic::nearest(&name, names)
            .map(|near| format!("; did you mean {}?", path.with_file_name(near).display()));
        Error::Usage(format!("cannot read the job config {}: {error}{}", path.display(), hint.unwrap_or_default()))
    })?;
    let name = path.display().to_string();
    match String::from_utf8(text) {
        Ok(text) => Ok(Document { name, text }),
        Err(error) => {
            let line =
                1 + error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|it| **it == b'\n').count();
            Err(Error::Config(format!("error: {name}, line {line}: not UTF-8, so not TOML")))
        }
    }
}

fn resolve(document: Option<Document>, overrides: &[Override]) -> Result<Loaded> {
    let mut reader = read::Reader::default();
    let is_toml = document.as_ref().is_none_or(|document| reader.document(document));
    overrides.iter().for_each(|given| reader.flag(given));
    let read::Reader { table, mut origins, mut faults } = reader;

    let mut config: JobConfig = none::from_table(table).map_err(|error| Error::Config(format!("error: {error}")))?;
    let args = models::flavor(&config.model.name, &config.model.flavor).map(|base| config.model.args.apply(&base));
    let args = args.transpose()?;
    if is_toml {
        // A value that could not be read counts as its default here, so a rule about it would only confuse.
        let unread: Vec<String> = faults.iter().flat_map(|fault| fault.keys.clone()).collect();
        let more = check::job(&config).into_iter().chain(args.iter().flat_map(check::decoder));
        faults.extend(more.filter(|fault| !fault.keys.iter().any(|key| unread.contains(key))));
    }
    if !faults.is_empty() {
        return Err(diagnostic::report(faults, document.as_ref(), &origins));
    }

    let mut notices = Vec::from_iter(without_effect(&origins, &config));
    if let Some(path) = config.model.tokenizer_path.take() {
        notices.push("`model.tokenizer_path` is deprecated: its value was taken for `model.hf_assets_path`".to_owned());
        config.model.hf_assets_path = path;
        let origin = origins.remove("model.tokenizer_path");
        origins.extend(origin.map(|origin| ("model.hf_assets_path".to_owned(), origin)));
    }
    if args.is_some_and(|it| it.attn_type == AttnType::Sdpa && it.attn_mask_type == AttnMaskType::BlockCausal) {
        notices
            .push("no effect: `model.args.attn_mask_type`, as `attn_type` \"sdpa\" has no document masks".to_owned());
    }
    Ok(Loaded { config, notices, document, origins })
}

/// One line that names the keys that were set in vain, by reason.
fn without_effect(origins: &Origins, config: &JobConfig) -> Option<String> {
    let is_idle = |path: &str| path.starts_with("quantize.linear.float8.") && !config.model.converts_to_float8();
    let mut by_reason = BTreeMap::<&str, Vec<String>>::new();
    for path in origins.keys() {
        let own_reason = schema::find(path).and_then(|key| key.no_effect.as_deref());
        if let Some(reason) = own_reason.or(is_idle(path).then_some(schema::NO_FLOAT8)) {
            by_reason.entry(reason).or_default().push(format!("`{path}`"));
        }
    }
    let each: Vec<_> = by_reason.iter().map(|(reason, keys)| format!("{} ({reason})", keys.join(", "))).collect();
    (!each.is_empty()).then(|| format!("no effect: {}", each.join("; ")))
}

impl Loaded {
    /// The merged config as TOML, the origin of each value behind it.
    pub fn to_toml_with_origins(&self) -> String {
        self.config.print(&|path, line| {
            if line.starts_with('[') { line } else { format!("{line:<48} # {}", self.origin(path)) }
        })
    }

    /// The merged config as TOML, above each key what it means and what it may hold.
    pub fn to_toml_with_docs(&self) -> String {
        self.config.print(&|path, line| {
            let Some(key) = schema::find(path) else { return line };
            let mut doc = key.doc.clone();
            if key.shape.keys().is_none() {
                doc += &format!("\nAllowed: {}.", key.shape);
            }
            let doc: String = doc.lines().map(|line| format!("# {line}\n")).collect();
            doc + &line
        })
    }

    fn origin(&self, path: &str) -> String {
        match (self.origins.get(path), &self.document) {
            (Some(Origin::File(span)), Some(document)) => {
                let line = 1 + document.text[..span.start].matches('\n').count();
                format!("{}:{line}", document.name)
            }
            (Some(Origin::Flag(flag)), _) => flag.clone(),
            _ => "default".to_owned(),
        }
    }
}

use std::path::PathBuf;

use schemars::transform::{RecursiveTransform, Transform};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::none;
use super::schema::{self, TORCH};
use crate::models::args::DecoderArgs;
use crate::models::lora::Lora;
use crate::{Error, Result};

/// The names of the one converter that there is.
pub(super) const FLOAT8_CONVERTERS: [&str; 2] = ["quantize.linear.float8", "float8"];

/// Which model, and the files that come with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// Family, such as "llama3"; `titan models` lists all.
    pub name: String,
    /// Size within the family, such as "debugmodel" or "8B". `[model.args]` changes any part of it. "hf": what the
    /// `config.json` says that lies beside the Hugging Face weights to start from, or else in `hf_assets_path`.
    pub flavor: String,
    /// Folder with `tokenizer.json`, `tokenizer_config.json` and, to start from Hugging Face weights, the safetensors.
    /// `titan download-tokenizer` fills one. titan ships the tokenizer of the default.
    pub hf_assets_path: PathBuf,
    /// Deprecated name of `hf_assets_path`, which wins over it.
    pub tokenizer_path: Option<PathBuf>,
    /// Changes to the model before training: "quantize.linear.float8", or "float8" for short, computes its linear layers in 8-bit
    /// floats, as `[quantize.linear.float8]` says.
    pub converters: Vec<String>,
    /// Log the model after its conversion.
    #[schemars(extend("x-no-effect" = TORCH))]
    pub print_after_conversion: bool,
    /// The model's arguments, over those of its flavor: any of them, such as `dim = 512` or `moe_args.num_experts = 16`.
    pub args: ModelArgs,
    pub lora: Lora,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            name: "llama3".into(),
            flavor: "debugmodel".into(),
            hf_assets_path: "./assets/tokenizer".into(),
            tokenizer_path: None,
            converters: Vec::new(),
            print_after_conversion: false,
            args: ModelArgs::default(),
            lora: Lora::default(),
        }
    }
}

impl Model {
    /// Whether linear layers are to compute in 8-bit floats.
    pub fn converts_to_float8(&self) -> bool {
        self.converters.iter().any(|name| FLOAT8_CONVERTERS.contains(&name.as_str()))
    }
}

/// `[model.args]`: those of the [`DecoderArgs`] that the job sets itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ModelArgs(pub toml::Table);

impl ModelArgs {
    /// All of `args`, so that no flavor shows through.
    pub fn all(args: &DecoderArgs) -> Self {
        let keys = schema::keys_of::<DecoderArgs>();
        let mut table = none::to_table(args, &keys);
        for key in keys {
            // What is absent is a table of its own that there is none of.
            table.entry(key.name).or_insert_with(|| "none".into());
        }
        Self(table)
    }

    /// `base`, with what the job sets in place of its values. Where `base` has no `moe_args` or `rope_scaling_args`, a
    /// job that sets one of their fields gets the defaults of the others.
    ///
    /// # Errors
    /// [`Error::Config`] where a value does not fit, which [`super::load`] has already ruled out.
    pub fn apply(&self, base: &DecoderArgs) -> Result<DecoderArgs> {
        let mut args = Self::all(base).0;
        overlay(&mut args, &self.0);
        none::from_table(args).map_err(|error| Error::Config(format!("error: [model.args]: {error}")))
    }

    /// Whether the job itself sets the argument. A `vocab_size` that it does not set follows the tokenizer.
    pub fn sets(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

/// Puts the values of `over` into `table`, key by key in tables that both have.
pub(super) fn overlay(table: &mut toml::Table, over: &toml::Table) {
    for (key, value) in over {
        match (table.get_mut(key), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(over)) => overlay(inner, over),
            _ => {
                table.insert(key.clone(), value.clone());
            }
        }
    }
}

impl JsonSchema for ModelArgs {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ModelArgs".into()
    }

    /// That of [`DecoderArgs`] without defaults, for those come from the flavor.
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = DecoderArgs::json_schema(generator);
        RecursiveTransform(|schema: &mut Schema| {
            schema.remove("default");
        })
        .transform(&mut schema);
        schema
    }
}

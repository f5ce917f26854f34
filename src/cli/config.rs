use std::path::PathBuf;

use tracing::warn;

use crate::Result;
use crate::config::{self, Override};

/// Show the merged job config, or the schema of job files.
///
/// Without an option: all keys as TOML, the origin of each value behind it. Any key can be overridden:
/// `titan config --config job.toml --training.steps 100 --checkpoint.enable`.
#[derive(clap::Args)]
pub struct Args {
    /// The job config, a TOML file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Show above each key what it means and what it may hold, instead of its origin.
    #[arg(long, conflicts_with = "schema")]
    list: bool,
    /// Print the JSON schema of job files. Save it as titan.schema.json, open a job file with the line
    /// `#:schema titan.schema.json`, and an editor with TOML support (taplo, Even Better TOML) completes and checks it.
    #[arg(long)]
    schema: bool,
}

pub fn run(args: Args, overrides: &[Override]) -> Result<()> {
    let loaded = config::load(args.config.as_deref(), overrides)?;
    for notice in &loaded.notices {
        warn!("{notice}");
    }
    let text = if args.schema {
        format!("{:#}\n", config::json_schema().as_value())
    } else if args.list {
        loaded.to_toml_with_docs()
    } else {
        loaded.to_toml_with_origins()
    };
    super::print(text)
}

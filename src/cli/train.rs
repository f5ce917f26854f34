use std::path::PathBuf;

use crate::config::{self, Override};
use crate::tools::signals::Interrupt;
use crate::trainer::Trainer;
use crate::{Error, Result};

/// Train a model as a job config says.
///
/// Any key of the config can be overridden: `titan train --config configs/debug_model.toml --training.steps 100
/// --checkpoint.enable`; `titan config --list` explains them all. Ctrl-C saves and stops; the same command goes on.
#[derive(clap::Args)]
pub struct Args {
    /// The job config, a TOML file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub fn run(args: Args, overrides: &[Override]) -> Result<()> {
    if args.config.is_none() && overrides.is_empty() {
        return Err(Error::Usage(
            "what to train is said by a job config\n   = for example: titan train --config configs/debug_model.toml"
                .into(),
        ));
    }
    let interrupt = Interrupt::install()?;
    Trainer::build(config::load(args.config.as_deref(), overrides)?)?.run(&interrupt)
}

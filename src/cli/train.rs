use crate::Result;
use crate::config::Override;

/// Train a model as a job config says.
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args, _overrides: &[Override]) -> Result<()> {
    Err(crate::Error::Usage("not written yet".into()))
}

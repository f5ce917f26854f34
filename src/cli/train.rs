use crate::Result;

/// Train a model as a job config says.
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<()> {
    Err(crate::Error::Usage("not written yet".into()))
}

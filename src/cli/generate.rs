use crate::Result;

/// Continue text with a checkpoint.
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<()> {
    Err(crate::Error::Usage("not written yet".into()))
}

use crate::Result;

/// Show the merged job config, or the schema of job files.
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<()> {
    Err(crate::Error::Usage("not written yet".into()))
}

use crate::Result;

/// Write text as token shards, so that training need not tokenize.
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<()> {
    Err(crate::Error::Usage("not written yet".into()))
}

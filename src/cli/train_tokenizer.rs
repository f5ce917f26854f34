use crate::Result;

/// Train a byte-level BPE tokenizer on your own text.
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<()> {
    Err(crate::Error::Usage("not written yet".into()))
}

use crate::Result;

/// Fetch a model's tokenizer from the Hugging Face hub.
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<()> {
    Err(crate::Error::Usage("not written yet".into()))
}

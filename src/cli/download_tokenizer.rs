use std::path::PathBuf;

use clap::ValueEnum;

use crate::data::hub::{Hub, RepoKind};
use crate::data::remote::RemoteFiles;
use crate::{Error, Result};

/// Fetch a model's tokenizer from the Hugging Face hub.
#[derive(clap::Args)]
pub struct Args {
    /// The model, as OWNER/NAME.
    #[arg(long, alias = "repo_id")]
    repo_id: String,

    /// Token of the hub, for gated and private models.
    #[arg(long, alias = "hf_token", env = "HF_TOKEN", hide_env_values = true)]
    hf_token: Option<String>,

    /// The files go into a folder in here that is named like the model.
    #[arg(long, alias = "local_dir", value_name = "DIR", default_value = "./assets/hf")]
    local_dir: PathBuf,

    /// What to fetch.
    #[arg(long, value_enum, value_delimiter = ',', num_args = 1.., default_value = "tokenizer",
        default_value_if("all", "true", None), default_value_if("additional_patterns", clap::builder::ArgPredicate::IsPresent, None))]
    assets: Vec<Asset>,

    /// Further files by name, such as README.md or *.bin.
    #[arg(long, alias = "additional_patterns", value_name = "PATTERN", value_delimiter = ',', num_args = 1..)]
    additional_patterns: Vec<String>,

    /// Every file of the repository.
    #[arg(long, conflicts_with_all = ["assets", "additional_patterns"])]
    all: bool,

    /// A branch, a tag or a commit.
    #[arg(long, default_value = "main")]
    revision: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum Asset {
    Tokenizer,
    Config,
    Index,
    Safetensors,
}

impl Asset {
    /// File names, in whatever folder they lie.
    fn patterns(self) -> &'static [&'static str] {
        match self {
            Self::Tokenizer => &[
                "tokenizer.json",
                "tokenizer_config.json",
                "tokenizer.model",
                "vocab.txt",
                "vocab.json",
                "merges.txt",
                "special_tokens_map.json",
                "chat_template.jinja",
            ],
            Self::Config => &["config.json", "generation_config.json"],
            Self::Index => &["model.safetensors.index.json"],
            Self::Safetensors => &["*.safetensors", "model.safetensors.index.json"],
        }
    }
}

pub fn run(args: Args) -> Result<()> {
    let hub = Hub::from_env(args.hf_token.clone())?;
    let repo = hub.repo(RepoKind::Model, &args.repo_id, Some(&args.revision))?;
    let available = repo.list("**")?;
    let files = choose(&args, &available)?;

    // Checked when the repository was opened: the name is neither empty nor a way out of the folder.
    let name = args.repo_id.rsplit('/').next().unwrap_or_default();
    let dir = args.local_dir.join(name);
    for file in &files {
        say!("{}", repo.save(file, &dir)?.display());
    }
    Ok(())
}

/// The files that were asked for. Each kind of asset must be there.
fn choose(args: &Args, available: &[String]) -> Result<Vec<String>> {
    if args.all {
        return Ok(available.to_vec());
    }
    let kinds = args.assets.iter().map(|asset| asset.patterns().iter().map(|&pattern| pattern.to_owned()).collect());
    let kinds: Vec<Vec<String>> =
        kinds.chain(args.additional_patterns.iter().map(|pattern| vec![pattern.clone()])).collect();
    let mut files = Vec::new();
    for patterns in kinds {
        let found = files.len();
        for pattern in &patterns {
            let glob =
                glob::Pattern::new(pattern).map_err(|e| Error::Usage(format!("`{pattern}` is no pattern: {e}")))?;
            let base = |file: &str| file.rsplit('/').next().unwrap_or_default().to_owned();
            files.extend(available.iter().filter(|file| glob.matches(file) || glob.matches(&base(file))).cloned());
        }
        if files.len() == found {
            let some = available.iter().take(20).cloned().collect::<Vec<_>>().join(", ");
            return Err(Error::Hub(format!(
                "{} has none of {}\n  = it has {} files: {some}",
                args.repo_id,
                patterns.join(", "),
                available.len(),
            )));
        }
    }
    files.sort();
    files.dedup();
    Ok(files)
}

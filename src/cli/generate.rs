use std::io::{BufRead, IsTerminal, Read, Write};
use std::path::PathBuf;

use tracing::info;

use crate::config;
use crate::generate::{Chat, Generator, Pretrained, Sampling};
use crate::tools::random::keyed;
use crate::{Error, Result};

/// Continue text with a checkpoint.
///
/// Needs nothing but the checkpoint, which holds its config and tokenizer:
/// `titan generate --checkpoint latest --prompt "Once upon a time"`. A folder of the Hugging Face hub will do as well.
/// `titan generate --chat` talks with a model that was trained on conversations. Computes in the type that the run was
/// trained in, its `training.mixed_precision_param`.
#[derive(clap::Args)]
pub struct Args {
    /// A checkpoint's folder, titan's or Hugging Face's, the name of a step (`step-9500`), or `latest`.
    #[arg(long, value_name = "CHECKPOINT", default_value = "latest")]
    checkpoint: String,
    /// Where a run wrote its checkpoints: looked through for names of steps [default: ./outputs].
    #[arg(long, alias = "dump_folder", value_name = "DIR")]
    dump_folder: Option<PathBuf>,
    /// The job config of the run, whose dump folder and checkpoint folder are looked through.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Text to continue; `-` reads standard input. May be given several times; without it the model begins by itself.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Vec<String>,
    /// Talk with the model: each line is a message, `/exit` or Ctrl-D ends.
    #[arg(long, conflicts_with_all = ["prompt", "num_samples"])]
    chat: bool,
    /// What the model is told before the conversation.
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    system: Option<String>,
    /// Tokens to make at most; the model may end the text sooner.
    #[arg(long, alias = "max_new_tokens", value_name = "N", default_value_t = 200)]
    max_new_tokens: usize,
    /// Below 1 the likely becomes likelier, above 1 the unlikely; 0 always takes the likeliest token.
    #[arg(long, value_name = "T", default_value_t = 0.7, value_parser = at_least_zero)]
    temperature: f32,
    /// Draw from the K likeliest tokens only.
    #[arg(long, alias = "top_k", value_name = "K", value_parser = clap::value_parser!(u64).range(1..))]
    top_k: Option<u64>,
    /// Draw from the likeliest tokens only that together have this probability.
    #[arg(long, alias = "top_p", value_name = "P", value_parser = probability)]
    top_p: Option<f32>,
    /// The same seed gives the same text.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Continuations of each prompt.
    #[arg(long, aliases = ["num_samples", "batch_size", "batch-size"], value_name = "N", default_value_t = 1)]
    num_samples: usize,
}

/// Positions of a conversation at most, where the model takes more.
const CHAT_POSITIONS: usize = 8192;

fn at_least_zero(text: &str) -> Result<f32, String> {
    text.parse().ok().filter(|t: &f32| t.is_finite() && *t >= 0.0).ok_or_else(|| "must be 0 or more".to_owned())
}

fn probability(text: &str) -> Result<f32, String> {
    text.parse().ok().filter(|p: &f32| *p > 0.0 && *p <= 1.0).ok_or_else(|| "must be above 0 and at most 1".to_owned())
}

pub fn run(args: Args) -> Result<()> {
    let job = config::load(args.config.as_deref(), &[])?.config;
    let dump_folder = args.dump_folder.as_deref().unwrap_or(&job.job.dump_folder);
    let checkpoint = Pretrained::open(&args.checkpoint, dump_folder, &job.checkpoint.folder)?;
    let prompts = if args.chat { Vec::new() } else { prompts(&args)? };
    let generator = Generator::load(&checkpoint, |tokenizer, trained| {
        if args.chat {
            return Ok(trained.min(CHAT_POSITIONS));
        }
        let lengths = prompts.iter().map(|prompt| Ok(tokenizer.encode(prompt, true, false)?.len()));
        Ok(lengths.collect::<Result<Vec<_>>>()?.into_iter().max().unwrap_or(0).saturating_add(args.max_new_tokens))
    })?;
    info!("Checkpoint: {}", checkpoint.path.display());

    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k.map(|k| k as usize), top_p: args.top_p };
    let mut out = std::io::stdout().lock();
    let mut write = |text: &str| -> Result<()> {
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::io("cannot write", "standard output"))
    };
    if args.chat {
        return chat(&args, &generator, &sampling, write);
    }
    for (p, prompt) in prompts.iter().enumerate() {
        for sample in 0..args.num_samples {
            if p + sample > 0 {
                write("\n")?;
            }
            write(prompt)?;
            let mut rng = keyed(args.seed, "generate", &format!("{p}.{sample}"));
            let pace = generator.generate(prompt, args.max_new_tokens, &sampling, &mut rng, &mut write)?;
            write("\n")?;
            info!(
                "{} tokens at {:.1} tokens/s (prompt: {} tokens at {:.1} tokens/s)",
                pace.new_tokens,
                pace.new_tokens as f64 / pace.decode.as_secs_f64(),
                pace.prompt_tokens,
                pace.prompt_tokens as f64 / pace.prompt.as_secs_f64()
            );
        }
    }
    Ok(())
}

/// One message per line, until there are no more.
fn chat(
    args: &Args,
    generator: &Generator,
    sampling: &Sampling,
    mut write: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    let mut chat = Chat::new(generator, args.system.as_deref())?;
    let mut rng = keyed(args.seed, "generate", "chat");
    let stdin = std::io::stdin();
    let is_terminal = stdin.is_terminal();
    let mut lines = stdin.lock().lines();
    loop {
        if is_terminal {
            write("> ")?;
        }
        let Some(line) = lines.next() else { break };
        let line = line.map_err(Error::io("cannot read", "standard input"))?;
        match line.trim() {
            "" => continue,
            "/exit" => return Ok(()),
            text => chat.say(text, args.max_new_tokens, sampling, &mut rng, &mut write)?,
        };
        write("\n")?;
    }
    // The terminal's own prompt begins a line.
    if is_terminal { write("\n") } else { Ok(()) }
}

fn prompts(args: &Args) -> Result<Vec<String>> {
    let read = |prompt: &String| match prompt.as_str() {
        "-" => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map_err(Error::io("cannot read", "standard input"))?;
            Ok(text.trim_end_matches('\n').to_owned())
        }
        _ => Ok(prompt.clone()),
    };
    if args.prompt.is_empty() { Ok(vec![String::new()]) } else { args.prompt.iter().map(read).collect() }
}

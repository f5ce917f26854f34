//! The command line: one file per subcommand, arguments in, text and exit code out.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{Override, split_overrides};
use crate::tools::{logging, signals};
use crate::{Error, Result};

/// As `println!`, but what cannot be written is an error.
macro_rules! say {
    ($($words:tt)*) => { crate::cli::print(format_args!("{}\n", format_args!($($words)*)))? };
}

pub mod checkpoint;
pub mod config;
pub mod convert;
pub mod download_tokenizer;
pub mod generate;
pub mod models;
pub mod tokenize;
pub mod train;
pub mod train_tokenizer;
pub mod write_stories;

/// Pretraining language models from one TOML file.
#[derive(Parser)]
#[command(name = "titan", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Train(train::Args),
    Generate(generate::Args),
    Checkpoint(checkpoint::Args),
    Models(models::Args),
    Config(config::Args),
    Convert(convert::Args),
    DownloadTokenizer(download_tokenizer::Args),
    TrainTokenizer(train_tokenizer::Args),
    Tokenize(tokenize::Args),
    WriteStories(write_stories::Args),
}

/// Parses `argv`, runs the subcommand, and turns an [`Error`] into a message and an exit code.
pub fn main(argv: impl IntoIterator<Item = OsString>) -> ExitCode {
    let (argv, overrides) = split_overrides(argv);
    let cli = match Cli::try_parse_from(argv) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let result = prepare(&cli.command).and_then(|()| match cli.command {
        Command::Train(args) => train::run(args, &overrides),
        Command::Config(args) => config::run(args, &overrides),
        _ if !overrides.is_empty() => Err(takes_no_overrides(&overrides)),
        Command::Checkpoint(args) => checkpoint::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Models(args) => models::run(args),
        Command::DownloadTokenizer(args) => download_tokenizer::run(args),
        Command::TrainTokenizer(args) => train_tokenizer::run(args),
        Command::Tokenize(args) => tokenize::run(args),
        Command::WriteStories(args) => write_stories::run(args),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let heading = match error {
                // A config report brings its own headings, and to be stopped is no error.
                Error::Config(_) | Error::Interrupted { .. } => "",
                _ => "error: ",
            };
            // Where nobody reads it, the exit code tells.
            let _ = writeln!(io::stderr(), "{heading}{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Writes a result of a command to standard output.
fn print(text: impl Display) -> Result<()> {
    let mut out = io::stdout();
    write!(out, "{text}").and_then(|()| out.flush()).map_err(Error::io("cannot write", "standard output"))
}

/// Logging, errors for files that may not grow, and quiet ends of pipes: all but training end when nobody reads on.
fn prepare(command: &Command) -> Result<()> {
    logging::init()?;
    signals::survive_file_size_limit()?;
    match command {
        Command::Train(_) => Ok(()),
        _ => signals::end_on_broken_pipe(),
    }
}

fn takes_no_overrides(overrides: &[Override]) -> Error {
    let flags: Vec<_> = overrides.iter().map(|given| given.flag.as_str()).collect();
    Error::Usage(format!(
        "this subcommand takes no job config keys: {}; only `train` and `config` do",
        flags.join(", ")
    ))
}

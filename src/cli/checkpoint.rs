use std::path::{Path, PathBuf};

use clap::Subcommand;
use indicatif::HumanBytes;

use crate::components::checkpoint::{
    DumpFolderLock, Found, Kind, Statistics, Survey, TensorFacts, inspect as inspect_tensors, remove_unless_read,
};
use crate::components::metrics::grouped;
use crate::{Error, Result};

/// Look at checkpoints, or remove old ones.
///
/// PATH is a checkpoint, a folder of them, or the dump folder of a run. Only `prune` changes anything.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List the checkpoints of a run: step, kind, size, and whether all files are there.
    ///
    /// Steps of the same config show the same `config`. Sizes are compared with what the checkpoint says of itself; `titan
    /// checkpoint verify` compares every bit.
    List {
        #[arg(value_name = "PATH", default_value = "./outputs")]
        path: PathBuf,
    },
    /// Read every bit of each checkpoint and compare it with its manifest. Exits with 1 if one is damaged.
    Verify {
        #[arg(value_name = "PATH", default_value = "./outputs")]
        path: PathBuf,
    },
    /// Show the tensors of a checkpoint: names, types, shapes, and what their numbers are like.
    ///
    /// Takes any folder or file of safetensors, those of Hugging Face too. Optimizer states are `exp_avg.NAME` and
    /// `exp_avg_sq.NAME`. Elements that are not finite are counted, and left out of the other figures.
    Inspect {
        #[arg(value_name = "PATH")]
        path: PathBuf,
        /// Only tensors whose names contain this.
        #[arg(long, value_name = "TEXT", default_value = "")]
        tensors: String,
    },
    /// Remove all steps but the newest K that are whole.
    ///
    /// Every bit of each step is read first. Damaged steps do not count and stay; so do exports, what another program
    /// reads, and everything that is not a step. Refused while a run trains there.
    Prune {
        #[arg(value_name = "PATH", default_value = "./outputs")]
        path: PathBuf,
        /// Steps that stay.
        #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
        keep: u32,
        /// Say what would be removed, and remove nothing.
        #[arg(long, alias = "dry_run")]
        dry_run: bool,
    },
}

pub fn run(args: Args) -> Result<()> {
    match args.command {
        Command::List { path } => list(&path),
        Command::Verify { path } => verify(&path),
        Command::Inspect { path, tensors } => inspect(&path, &tensors),
        Command::Prune { path, keep, dry_run } => prune(&path, keep as usize, dry_run),
    }
}

fn list(path: &Path) -> Result<()> {
    let survey = Survey::of(path, false)?;
    say!("{}", survey.folder.display());
    say!("{:<20} {:<13} {:>11}  {:<9} state", "name", "kind", "size", "config");
    for found in &survey.found {
        let (config, state) = match &found.manifest {
            Ok(Some(manifest)) => (manifest.config_sha256.get(..8).unwrap_or("-"), "all files there"),
            Ok(None) => ("-", "names no hashes"),
            Err(damage) => ("-", damage.as_str()),
        };
        let size = HumanBytes(found.bytes).to_string();
        say!("{:<20} {:<13} {size:>11}  {config:<9} {state}", found.name(), kind(found));
    }
    Ok(())
}

fn kind(found: &Found) -> &'static str {
    match &found.manifest {
        Ok(Some(manifest)) if manifest.kind == Kind::Full => "full",
        Ok(Some(_)) => "model",
        Ok(None) => "Hugging Face",
        Err(_) => "damaged",
    }
}

fn verify(path: &Path) -> Result<()> {
    let survey = Survey::of(path, true)?;
    let mut n_damaged = 0;
    for found in &survey.found {
        let name = found.name();
        match &found.manifest {
            Ok(Some(manifest)) => {
                say!("{name}: whole, {} files, {}", manifest.files.len(), HumanBytes(found.bytes))
            }
            Ok(None) => say!("{name}: Hugging Face's format, which has no hashes to compare with"),
            Err(damage) => {
                n_damaged += 1;
                say!("{name}: damaged: {damage}");
            }
        }
    }
    if n_damaged > 0 {
        let n = survey.found.len();
        return Err(Error::Checkpoint(format!("{}: {n_damaged} of {n} checkpoints damaged", survey.folder.display())));
    }
    Ok(())
}

fn inspect(path: &Path, part: &str) -> Result<()> {
    let tensors = inspect_tensors(path, part)?;
    let elements = |tensor: &TensorFacts| tensor.shape.iter().product::<usize>();
    let width = tensors.iter().map(|tensor| tensor.name.len()).max().unwrap_or(0).max("tensor".len());
    say!(
        "{:<width$} {:<5} {:<16} {:>10} {:>10} {:>10} {:>10} {:>10} {:>8}",
        "tensor",
        "type",
        "shape",
        "min",
        "max",
        "mean",
        "std",
        "rms",
        "NaN, inf"
    );
    for tensor in &tensors {
        let shape = tensor.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
        let dtype = tensor.dtype.to_string();
        say!("{:<width$} {dtype:<5} {shape:<16} {}", tensor.name, figures(tensor.statistics));
    }
    let total: usize = tensors.iter().map(elements).sum();
    say!("{} tensors, {} elements", tensors.len(), grouped(total as f64, 0));
    Ok(())
}

fn figures(statistics: Option<Statistics>) -> String {
    let Some(Statistics { min, max, mean, std, rms, n_nan, n_infinite }) = statistics else {
        return "not looked at: no plain numbers".to_owned();
    };
    let odd = n_nan + n_infinite;
    format!("{min:>10.3e} {max:>10.3e} {mean:>10.3e} {std:>10.3e} {rms:>10.3e} {odd:>8}")
}

fn prune(path: &Path, keep: usize, dry_run: bool) -> Result<()> {
    let folder = Survey::of(path, false)?.folder;
    // First the lock: what a run saves or removes while this looks would not be what is found.
    let _lock = if dry_run { None } else { DumpFolderLock::of_checkpoints(&folder)? };
    let survey = Survey::of(&folder, true)?;
    for found in survey.found.iter().filter(|found| found.step().is_some()) {
        if let Err(damage) = &found.manifest {
            say!("{} does not count, and stays: {damage}", found.name());
        }
    }
    let doomed: Vec<_> = survey.whole_steps().rev().skip(keep).collect();
    if doomed.is_empty() {
        say!("nothing to remove: {} whole steps", survey.whole_steps().count());
    }
    for (step, found) in doomed.into_iter().rev() {
        let what = format!("{}, {}", found.path.display(), HumanBytes(found.bytes));
        if dry_run {
            say!("would remove {what}");
        } else if remove_unless_read(&folder, step)? {
            say!("removed {what}");
        }
    }
    Ok(())
}

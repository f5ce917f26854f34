//! One error type: a variant per fault that a user can act on.

use std::path::{Path, PathBuf};

use crate::tools::signals::Signal;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Every fault of a job config at once, already rendered with file, line and suggestion.
    #[error("{0}")]
    Config(String),

    /// A command line that cannot be carried out as given.
    #[error("{0}")]
    Usage(String),

    /// A file or folder that could not be read or written.
    #[error("{}: {action}: {source}", path.display())]
    Io { path: PathBuf, action: &'static str, source: std::io::Error },

    /// Training text that cannot be used. The message names the file and line or row.
    #[error("{0}")]
    Data(String),

    /// A tokenizer that cannot be loaded, or does not fit the model.
    #[error("{0}")]
    Tokenizer(String),

    /// The Hugging Face hub refused, or could not be reached.
    #[error("{0}")]
    Hub(String),

    /// A checkpoint that is damaged, incomplete, or of another model.
    #[error("{0}")]
    Checkpoint(String),

    /// Model arguments that contradict each other or their input.
    #[error("{0}")]
    Model(String),

    /// A GPU that is not there, or cannot be used.
    #[error("{0}")]
    Device(String),

    /// Numbers that went bad during training.
    #[error("{0}")]
    Training(String),

    /// The user stopped a run; not a fault, but not the end of the run either.
    #[error("stopped by {signal} after step {step}; {}", match (*step, *saved) {
        (0, _) => "there was nothing to save",
        (_, true) => "its state is saved: the same command goes on",
        (_, false) => "nothing was saved, as this run saves no checkpoints",
    })]
    Interrupted { signal: Signal, step: usize, saved: bool },

    /// Something that a run waits for was given up, as the user wants the run to stop.
    #[error("given up, as the run was asked to stop")]
    AskedToStop,

    /// A fault of the tensor library; reaching a user it is a bug of titan.
    #[error("internal tensor error: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// For `map_err`: attaches what was being done to which path.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { path, action, source }
    }

    /// 2 for usage and config, 128 and its number for a signal, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Interrupted { signal, .. } => 128 + signal.number(),
            Self::Config(_) | Self::Usage(_) => 2,
            _ => 1,
        }
    }
}

//! What the environment says of the hub, as all its programs read it.

use std::path::PathBuf;
use std::{env, fs};

pub fn endpoint() -> String {
    variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into())
}

pub fn cache_dir() -> PathBuf {
    let dir = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE"));
    dir.map_or_else(|| home().join("hub"), PathBuf::from)
}

/// `None` also where no token is to be used that was not asked for.
pub fn token() -> Option<String> {
    let stored = || {
        let path = variable("HF_TOKEN_PATH").map_or_else(|| home().join("token"), PathBuf::from);
        fs::read_to_string(path).ok()
    };
    match variable("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
        Some(_) => None,
        // A secret that was pasted or read from a file often ends with a line break.
        None => variable("HF_TOKEN").or_else(stored),
    }
}

pub fn is_offline() -> bool {
    let value = variable("HF_HUB_OFFLINE").unwrap_or_default().to_uppercase();
    ["1", "TRUE", "YES", "ON"].contains(&value.as_str())
}

fn home() -> PathBuf {
    variable("HF_HOME").map_or_else(
        || {
            let user = || env::home_dir().unwrap_or_default().join(".cache");
            variable("XDG_CACHE_HOME").map_or_else(user, PathBuf::from).join("huggingface")
        },
        PathBuf::from,
    )
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

//! `--section.key value` on the command line.

use std::ffi::{OsStr, OsString};

use super::schema::{self, Shape};

/// A config key that the command line sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    /// The option as it was typed, without its value.
    pub flag: String,
    /// The path of the key, with underscores.
    pub key: String,
    /// None where the option stands alone although its key is not a boolean.
    pub value: Option<String>,
}

/// Takes the overrides out of `argv`, wherever they stand, and leaves the rest for the argument parser.
///
/// An override is an option with a dot in its name. It takes the next argument, which may begin with one dash, as its
/// value; a boolean stands alone or takes `true` or `false`, and `--section.no-key` turns it off.
/// `--job.config_file FILE` becomes `--config FILE`. Everything after a lone `--` is left alone.
pub fn split_overrides(argv: impl IntoIterator<Item = OsString>) -> (Vec<OsString>, Vec<Override>) {
    let mut argv = argv.into_iter().peekable();
    let mut rest = Vec::from_iter(argv.next());
    let mut overrides = Vec::new();
    while let Some(arg) = argv.next() {
        if arg == "--" {
            rest.push(arg);
            rest.extend(argv);
            break;
        }
        let Some((flag, given)) = arg.to_str().and_then(dotted_option) else {
            rest.push(arg);
            continue;
        };
        let key = flag[2..].replace('-', "_");
        let is_value = |next: &OsString| !next.to_str().is_some_and(|next| next.starts_with("--"));
        if key == "job.config_file" {
            rest.push("--config".into());
            rest.extend(given.map(OsString::from).or_else(|| argv.next_if(is_value)));
            continue;
        }
        let (key, value) = match given {
            Some(value) => (key, Some(value.to_owned())),
            None if is_bool(&key) => {
                let value = argv.next_if(|next| next == "true" || next == "false");
                (key, Some(value.as_deref().map_or("true".into(), text)))
            }
            None => match negated(&key) {
                Some(key) => (key, Some("false".to_owned())),
                None => (key, argv.next_if(is_value).as_deref().map(text)),
            },
        };
        overrides.push(Override { flag: flag.to_owned(), key, value });
    }
    (rest, overrides)
}

/// The name of an option that has a dot, dashes included, and the value behind `=`.
fn dotted_option(arg: &str) -> Option<(&str, Option<&str>)> {
    let (flag, value) = arg.split_once('=').map_or((arg, None), |(flag, value)| (flag, Some(value)));
    let is_name =
        |name: &str| name.contains('.') && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    flag.strip_prefix("--").is_some_and(is_name).then_some((flag, value))
}

fn is_bool(key: &str) -> bool {
    schema::find(key).is_some_and(|key| matches!(key.shape, Shape::Bool))
}

/// `a.key` for `a.no_key`, if it is a boolean.
fn negated(key: &str) -> Option<String> {
    let (section, name) = key.rsplit_once('.')?;
    let key = format!("{section}.{}", name.strip_prefix("no_")?);
    is_bool(&key).then_some(key)
}

fn text(value: &OsStr) -> String {
    value.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(argv: &str) -> (String, Vec<String>) {
        let (rest, overrides) = split_overrides(argv.split(' ').map(OsString::from));
        let show = |it: &Override| match &it.value {
            Some(value) => format!("{} = {value}", it.key),
            None => it.key.clone(),
        };
        let rest: Vec<_> = rest.iter().map(|arg| text(arg)).collect();
        (rest.join(" "), overrides.iter().map(show).collect())
    }

    #[test]
    fn overrides_stand_anywhere_and_the_rest_keeps_its_order() {
        let (rest, overrides) =
            split("titan --training.steps 5 train --optimizer.lr=1e-3 --config a.toml --model.name=x");
        assert_eq!(rest, "titan train --config a.toml");
        assert_eq!(overrides, ["training.steps = 5", "optimizer.lr = 1e-3", "model.name = x"]);
    }

    #[test]
    fn booleans_stand_alone_or_take_a_word_and_no_turns_them_off() {
        let (rest, overrides) = split(
            "titan --checkpoint.enable --debug.deterministic false train --checkpoint.no-load-only --compile.enable=true",
        );
        assert_eq!(rest, "titan train");
        let expected = [
            "checkpoint.enable = true",
            "debug.deterministic = false",
            "checkpoint.load_only = false",
            "compile.enable = true",
        ];
        assert_eq!(overrides, expected);
    }

    #[test]
    fn negative_numbers_are_values_and_options_are_not() {
        let (_, overrides) = split("titan --checkpoint.load-step -1 --training.steps --training.seq_len 4");
        assert_eq!(overrides, ["checkpoint.load_step = -1", "training.steps", "training.seq_len = 4"]);
    }

    #[test]
    fn the_config_file_is_another_name_of_config() {
        assert_eq!(split("titan train --job.config-file a.toml").0, "titan train --config a.toml");
        assert_eq!(split("titan train --job.config_file=a.toml").0, "titan train --config a.toml");
    }

    #[test]
    fn dots_in_values_and_after_a_lone_dash_pair_are_no_overrides() {
        let argv = "titan generate --prompt=a.b --temperature 0.5 -- --training.steps 5";
        assert_eq!(split(argv), (argv.to_owned(), Vec::new()));
        let prompt = ["titan", "generate", "--prompt", "-- He left. She stayed"].map(OsString::from);
        assert_eq!(split_overrides(prompt.clone()), (prompt.to_vec(), Vec::new()));
    }
}

//! What one job config says otherwise than another.

use std::collections::BTreeMap;
use std::fmt;

use toml::{Table, Value};

use super::diagnostic::{Fault, report};
use super::{JobConfig, Loaded, none, print, schema};
use crate::Error;

/// A key with another value than before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub key: String,
    old: String,
    new: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} -> {}", self.key, self.old, self.new)
    }
}

/// The keys whose values differ, in alphabetical order.
pub fn changes(old: &JobConfig, new: &JobConfig) -> Vec<Change> {
    let [old, new] = [old, new].map(|config| {
        let mut values = BTreeMap::new();
        flatten(&none::to_table(config, &schema::SECTIONS), "", &mut values);
        values
    });
    let value = |of: &BTreeMap<String, String>, key: &String| of.get(key).map_or("\"none\"".into(), String::clone);
    let keys = old.keys().chain(new.keys().filter(|key| !old.contains_key(*key)));
    let change = |key: &String| Change { key: key.clone(), old: value(&old, key), new: value(&new, key) };
    let mut changes: Vec<Change> = keys.map(change).filter(|change| change.old != change.new).collect();
    changes.sort_by(|a, b| a.key.cmp(&b.key));
    changes
}

fn flatten(table: &Table, path: &str, values: &mut BTreeMap<String, String>) {
    for (name, value) in table {
        let key = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        match value {
            Value::Table(table) => flatten(table, &key, values),
            value => {
                values.insert(key, print::value(value));
            }
        }
    }
}

impl Loaded {
    /// One error of all `faults`, each a key and what is wrong with it, that shows where the keys were set.
    pub fn refuse(&self, faults: &[(&str, String)], remedy: &str) -> Error {
        let faults = faults.iter().map(|(key, title)| Fault::new(title, &[key]).note(remedy)).collect();
        report(faults, self.document.as_ref(), &self.origins)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    #[test]
    fn changes_are_those_of_values_and_not_of_how_they_are_written() {
        let config = |text| parse("job.toml", text).unwrap().config;
        let old = config("[training]\nsteps = 10\n[model.args]\ndim = 32\n[optimizer]\nlr = 1e-3");
        let new = config("[optimizer]\nlr = 0.001\n[model.args]\ndim = 64\nmoe_args.top_k = 2\n[training]\nsteps = 20");
        let found: Vec<_> = changes(&old, &new).iter().map(Change::to_string).collect();
        assert_eq!(
            found,
            ["model.args.dim: 32 -> 64", "model.args.moe_args.top_k: \"none\" -> 2", "training.steps: 10 -> 20"]
        );
        assert_eq!(changes(&new, &new), []);
    }
}

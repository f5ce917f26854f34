//! A job config as TOML.

use toml::{Table, Value};

/// Writes `table`, passing every header and every `key = value` with its path through `decorate`. Sections without
/// keys of their own get no header.
pub(super) fn toml(table: &Table, decorate: &dyn Fn(&str, String) -> String) -> String {
    let mut text = String::new();
    section(table, "", decorate, &mut text);
    text
}

fn section(table: &Table, path: &str, decorate: &dyn Fn(&str, String) -> String, text: &mut String) {
    let here = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    let (tables, values): (Vec<_>, Vec<_>) = table.iter().partition(|(_, value)| value.is_table());
    if !values.is_empty() {
        let gap = if text.is_empty() { "" } else { "\n" };
        *text += &format!("{gap}{}\n", decorate(path, format!("[{path}]")));
    }
    for (name, value) in values {
        *text += &format!("{}\n", decorate(&here(name), format!("{name} = {}", self::value(value))));
    }
    for (name, value) in tables {
        if let Value::Table(table) = value {
            section(table, &here(name), decorate, text);
        }
    }
}

/// A value as TOML has it.
pub(super) fn value(value: &Value) -> String {
    match value {
        // Display would write 1e-15 with all its zeros.
        Value::Float(number) => format!("{number:?}"),
        value => value.to_string(),
    }
}

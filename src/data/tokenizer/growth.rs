//! A `tokenizer.json` can make much of little: replacements that replace what others put in, templates that add special
//! tokens to every text. What multiplies a text beyond bounds is refused.

use serde::Deserialize;
use serde_json::Value;

/// How many times as long all replacements together may make a text; those that there are put one character in place of one
/// or more.
const MAX_GROWTH: usize = 16;

/// Tokens that a template may add to a text.
const MAX_ADDED: usize = 1000;

/// The parts of a tokenizer that can multiply a text.
#[derive(Deserialize)]
struct Parts {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
}

/// # Errors
/// Which part makes too much of a text. What is no tokenizer at all is left to those who read it.
pub fn check(tokenizer_json: &[u8]) -> Result<(), String> {
    let Ok(parts) = serde_json::from_slice::<Parts>(tokenizer_json) else { return Ok(()) };
    for (name, part) in [
        ("normalizer", &parts.normalizer),
        ("pre_tokenizer", &parts.pre_tokenizer),
        ("post_processor", &parts.post_processor),
        ("decoder", &parts.decoder),
    ] {
        let mut growth = 1_usize;
        let mut added = 0_usize;
        let mut open = vec![part];
        while let Some(value) = open.pop() {
            match value {
                Value::Array(items) => open.extend(items),
                Value::Object(fields) => {
                    growth = growth.saturating_mul(replacement(value));
                    added = added.saturating_add(tokens_of_template(value));
                    open.extend(fields.values());
                }
                _ => {}
            }
        }
        if growth > MAX_GROWTH {
            return Err(format!("its {name} may make a text more than {MAX_GROWTH} times as long"));
        }
        if added > MAX_ADDED {
            return Err(format!("its {name} adds more than {MAX_ADDED} tokens to every text"));
        }
    }
    Ok(())
}

/// Characters that a replacement puts in place of one, or that are put before each part of a text, if it is that.
fn replacement(value: &Value) -> usize {
    let characters = |field: &str| value[field].as_str().map_or(1, |text| text.chars().count().max(1));
    match value["type"].as_str() {
        Some("Replace") => characters("content"),
        Some("Prepend") => characters("prepend"),
        _ => 1,
    }
}

/// Special tokens of a `TemplateProcessing` for one text, if it is that.
fn tokens_of_template(value: &Value) -> usize {
    let items = |field: &str| value[field].as_array().map_or(0, Vec::len);
    let tokens = value["special_tokens"].as_object().into_iter().flatten();
    let longest = tokens.map(|(_, token)| token["ids"].as_array().map_or(0, Vec::len)).max().unwrap_or(0);
    items("single").max(items("pair")).saturating_mul(longest)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_multiplies_a_text_is_refused_by_its_part() {
        let replace = |content: &str| json!({ "type": "Replace", "pattern": { "String": "a" }, "content": content });
        let template = |ids: usize| {
            json!({ "type": "TemplateProcessing", "single": [{ "SpecialToken": { "id": "x", "type_id": 0 } }], "pair": [],
                "special_tokens": { "x": { "id": "x", "ids": vec![0; ids], "tokens": vec!["x"; ids] } } })
        };
        let sequence = |n: usize| json!({ "type": "Sequence", "normalizers": vec![replace("xx"); n] });
        let verdict = |part: &str, value: Value| check(json!({ part: value }).to_string().as_bytes());
        for (part, good, bad) in [
            ("normalizer", replace("\u{2581}"), replace(&"x".repeat(17))),
            ("normalizer", sequence(4), sequence(5)),
            ("decoder", replace(" "), sequence(5)),
            ("post_processor", template(2), template(1001)),
        ] {
            assert_eq!(verdict(part, good), Ok(()));
            assert!(verdict(part, bad).unwrap_err().contains(part));
        }
    }
}

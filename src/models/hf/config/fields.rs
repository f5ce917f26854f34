//! Reading `config.json` field by field.

use serde_json::{Value, json};

use super::gemma::linear;
use crate::models::args::{DecoderArgs, RopeScalingArgs};

/// Beyond any model, and small enough that products of two sizes stay exact.
const MAX_SIZE: u64 = 1 << 24;

/// Reads fields one by one and gathers what is wrong with them.
pub struct Fields<'a> {
    pub config: &'a Value,
    pub faults: Vec<String>,
}

impl Fields<'_> {
    pub fn fault(&mut self, fault: impl Into<String>) {
        self.faults.push(fault.into());
    }

    /// A positive integer; 1 where it is faulty, so that reading can go on.
    pub fn size(&mut self, name: &str, default: Option<usize>) -> usize {
        match (&self.config[name], default) {
            (Value::Null, Some(default)) => default,
            (value, _) => match value.as_u64() {
                Some(size @ 1..=MAX_SIZE) => size as usize,
                _ => {
                    self.fault(format!("{name}: {value} is not a size from 1 to {MAX_SIZE}"));
                    1
                }
            },
        }
    }

    /// The same under one of two names, as versions of transformers differ.
    pub fn size_of(&mut self, names: [&str; 2]) -> usize {
        let name = if self.config[names[0]].is_null() { names[1] } else { names[0] };
        self.size(name, None)
    }

    /// A number of things that may be none.
    pub fn count(&mut self, name: &str, default: usize) -> usize {
        match &self.config[name] {
            Value::Null => default,
            value if *value == json!(0) => 0,
            _ => self.size(name, None),
        }
    }

    pub fn number(&mut self, name: &str, default: f64) -> f64 {
        number_of(self.config, name, Some(default), &mut self.faults)
    }

    /// A positive number, `None` for null; `default` where there is no such field.
    pub fn optional_number(&mut self, name: &str, default: Option<f64>) -> Option<f64> {
        match self.config.get(name) {
            None => default,
            Some(Value::Null) => None,
            Some(_) => Some(self.number(name, 1.0)),
        }
    }

    pub fn flag(&mut self, name: &str, default: bool) -> bool {
        match &self.config[name] {
            Value::Null => default,
            Value::Bool(flag) => *flag,
            value => {
                self.fault(format!("{name}: {value} is neither true nor false"));
                default
            }
        }
    }

    /// Only one value will do, which is also what transformers takes where the config says nothing.
    pub fn expect(&mut self, name: &str, only: impl Into<Value>) {
        let only = only.into();
        let value = &self.config[name];
        if !value.is_null() && *value != only {
            let fault = format!("{name}: {value} is not supported, only {only}");
            self.fault(fault);
        }
    }

    /// `rope_theta` and the scaling of rotary positions, as transformers 4 (`rope_scaling`) and 5 (`rope_parameters`)
    /// write them.
    pub fn rope(&mut self, args: &mut DecoderArgs, default_theta: f64) {
        let config = self.config;
        let (theta, scaling) = match &config["rope_parameters"] {
            Value::Null => (config, &config["rope_scaling"]),
            parameters => (parameters, parameters),
        };
        self.rope_of(theta, scaling, args, default_theta);
    }

    /// The same from the objects that hold the base and the scaling.
    pub fn rope_of(&mut self, theta: &Value, scaling: &Value, args: &mut DecoderArgs, default_theta: f64) {
        args.rope_theta = number_of(theta, "rope_theta", Some(default_theta), &mut self.faults);
        for factor in [&scaling["partial_rotary_factor"], &self.config["partial_rotary_factor"]] {
            if !factor.is_null() && factor.as_f64() != Some(1.0) {
                self.fault(format!("partial_rotary_factor: {factor} is not supported, only 1"));
            }
        }
        let faults = &mut self.faults;
        let mut number = |name, default| number_of(scaling, name, default, faults);
        match scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("default") {
            "default" => {}
            "linear" => args.rope_scaling_args = Some(linear(number("factor", None))),
            "llama3" => {
                args.rope_scaling_args = Some(RopeScalingArgs {
                    scaling_factor: number("factor", None),
                    low_freq_factor: number("low_freq_factor", None),
                    high_freq_factor: number("high_freq_factor", None),
                    original_max_position_embeddings: number("original_max_position_embeddings", None) as usize,
                });
            }
            "yarn" => {
                args.rope_factor = Some(number("factor", None));
                args.original_seq_len =
                    number("original_max_position_embeddings", Some(args.max_seq_len as f64)) as usize;
                args.beta_fast = number("beta_fast", Some(32.0));
                args.beta_slow = number("beta_slow", Some(1.0));
                args.yarn_truncate = scaling["truncate"] != json!(false);
                args.mscale = number("mscale_all_dim", Some(if args.kv_lora_rank.is_some() { 0.0 } else { 1.0 }));
                // transformers scales what rotates by mscale and by the inverse of mscale_all_dim, which cancel out where
                // they are equal. Where whole heads rotate, scaling them is the same as scaling the scores.
                let cancel_out = !scaling["mscale"].is_null() && scaling["mscale"] == scaling["mscale_all_dim"];
                let has_neither = scaling["mscale"].is_null() && scaling["mscale_all_dim"].is_null();
                match args.kv_lora_rank {
                    Some(_) if !cancel_out => {
                        self.fault("rope_scaling: mscale must be given and equal to mscale_all_dim")
                    }
                    None if !has_neither => self.fault("rope_scaling: mscale is not supported"),
                    _ => {}
                }
                if !scaling["attention_factor"].is_null() {
                    self.fault("rope_scaling: attention_factor is not supported");
                }
                // transformers stretches whatever max_position_embeddings says.
                args.yarn_always = true;
            }
            other => {
                self.fault(format!(
                    "rope_type: \"{other}\" is not supported, only \"default\", \"linear\", \"llama3\" and \"yarn\""
                ));
            }
        }
    }
}

/// A positive number, or 1 and a fault.
fn number_of(object: &Value, name: &str, default: Option<f64>, faults: &mut Vec<String>) -> f64 {
    match (&object[name], default) {
        (Value::Null, Some(default)) => default,
        (value, _) => value.as_f64().filter(|number| *number > 0.0).unwrap_or_else(|| {
            faults.push(format!("{name}: {value} is not a positive number"));
            1.0
        }),
    }
}

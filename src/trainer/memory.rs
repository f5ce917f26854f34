//! What a run takes of its device's memory: refused before it begins where that cannot be enough, explained where it was
//! not.

use crate::autograd::Precision;
use crate::components::metrics::grouped;
use crate::config::{AcMode, JobConfig};
use crate::models::Decoder;
use crate::tools::device::{DeviceFacts, GIB};
use crate::{Error, Result};

/// Refuses a run that takes more than the machine holds, rather than be killed by the system. Counted is what cannot be
/// done without: weights, gradients and moments, what is saved in the background, and of a batch what each layer takes in.
pub fn check(model: &Decoder, precision: Precision, config: &JobConfig, facts: &DeviceFacts) -> Result<()> {
    // In floating point, where absurd sizes do not wrap around. The copy that is saved in the background holds weight and
    // moments, and is the host's.
    let copied = if config.checkpoint.in_background() && facts.gpu.is_none() {
        3 * precision.storage.size_in_bytes()
    } else {
        0
    };
    let trained: f64 = model.trained_parameters().map(|parameter| parameter.numel() as f64).sum();
    let of_weights = model.training_bytes(precision) + trained * copied as f64;

    let of_layer = (model.args().dim * precision.compute.size_in_bytes()) as f64;
    let tokens = |rows: usize, seq_len: usize| rows as f64 * seq_len as f64;
    let (training, validation) = (&config.training, &config.validation);
    let kept = tokens(training.local_batch_size, training.seq_len) * of_layer * (model.args().n_layers + 1) as f64;
    let passing = tokens(validation.local_batch_size, validation.seq_len) * of_layer * 2.0;
    let (batch, batch_keys) = match validation.enable && passing > kept {
        true => (passing, "[validation]"),
        false => (kept, "[training]"),
    };

    let there = facts.total_memory_bytes as f64;
    if there == 0.0 || of_weights + batch <= there {
        return Ok(());
    }
    let remedy = if of_weights > batch {
        "a smaller `model.flavor`, or smaller sizes in [model.args]".to_owned()
    } else {
        format!("a smaller `local_batch_size` or `seq_len` in {batch_keys}")
    };
    Err(Error::Config(format!(
        "error: this run takes more than the {:.1} GiB of memory that there are: weights, gradients and optimizer state of \
         {} parameters {:.1} GiB, what the layers take in of a batch {:.1} GiB\n   = {remedy}",
        there / GIB,
        grouped(model.parameters().map(|parameter| parameter.numel() as f64).sum(), 0),
        of_weights / GIB,
        batch / GIB
    )))
}

/// What the driver calls memory that is not there.
const OUT_OF_MEMORY: &str = "CUDA_ERROR_OUT_OF_MEMORY";

/// What a run holds of its device's memory, by what it is for; known before it is taken.
#[derive(Clone, Debug)]
pub struct Classes {
    weights: f64,
    gradients: f64,
    moments: f64,
}

impl Classes {
    pub fn of(model: &Decoder, precision: Precision, is_offloaded: bool) -> Self {
        let trained: f64 = model.trained_parameters().map(|parameter| parameter.numel() as f64).sum();
        let moments = 2.0 * trained * precision.storage.size_in_bytes() as f64;
        let gradients = trained * size_of::<f32>() as f64;
        let weights = model.training_bytes(precision) - moments - gradients;
        match is_offloaded {
            false => Self { weights, gradients, moments },
            true => {
                let compute = trained * precision.compute.size_in_bytes() as f64;
                let frozen = weights - trained * (precision.training_bytes() as f64) + moments + gradients;
                Self { weights: compute + frozen.max(0.0), gradients, moments: 0.0 }
            }
        }
    }

    /// Names and bytes.
    pub fn held(&self) -> [(&'static str, f64); 3] {
        [("weights", self.weights), ("gradients", self.gradients), ("moments", self.moments)]
    }

    /// `error`, or if it says that memory is not there, what of the run holds how much, and what would help. `class`: what
    /// was being allocated.
    pub fn explain(&self, error: Error, class: &str, config: &JobConfig, facts: &DeviceFacts) -> Error {
        let is_out_of_memory = matches!(&error, Error::Tensor(error) if error.to_string().contains(OUT_OF_MEMORY));
        if !is_out_of_memory {
            return error;
        }
        let Self { weights, gradients, moments } = self;
        let used = facts.memory_use().current_bytes as f64;
        let activations = (used - weights - gradients - moments).max(0.0);
        let of_states = weights + gradients + moments > facts.total_memory_bytes as f64 / 2.0;
        Error::Training(format!(
            "{} is out of memory, taking more for {class}: of {:.1} GiB, weights hold {:.1}, gradients {:.1}, the optimizer's \
             moments {:.1}, activations and the rest {:.1}\n   = {}",
            facts.name,
            facts.total_memory_bytes as f64 / GIB,
            weights / GIB,
            gradients / GIB,
            moments / GIB,
            activations / GIB,
            remedy(config, of_states)
        ))
    }
}

/// The key that helps most.
fn remedy(config: &JobConfig, of_states: bool) -> String {
    let training = &config.training;
    if of_states {
        return match training.enable_cpu_offload {
            false => "training.enable_cpu_offload = true keeps weights and moments in the host's memory".into(),
            true => "a smaller `model.flavor`, or smaller sizes in [model.args]".into(),
        };
    }
    if config.activation_checkpoint.mode != AcMode::Full {
        return "activation_checkpoint.mode = \"full\" keeps only what each layer takes in".into();
    }
    match training.local_batch_size {
        1 => "a smaller training.seq_len".into(),
        rows => format!(
            "a smaller training.local_batch_size than {rows}; training.global_batch_size = {} keeps the batch of a step",
            training.global_batch_size.unwrap_or(rows)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models;

    #[test]
    fn an_error_for_want_of_memory_says_who_holds_it_and_what_helps() {
        let model = Decoder::new(&models::flavor("llama4", "debugmodel").unwrap(), None).unwrap();
        let precision = Precision { storage: candle_core::DType::F32, compute: candle_core::DType::BF16 };
        let classes = Classes::of(&model, precision, false);
        let n = model.n_params() as f64;
        // Which is looked up in the weights, and has no copy.
        let embedding = (model.args().vocab_size * model.args().dim) as f64;
        assert_eq!(
            (classes.weights, classes.gradients, classes.moments),
            (6.0 * n - 2.0 * embedding, 4.0 * n, 8.0 * n)
        );

        let facts =
            DeviceFacts { name: "A card".into(), cores: 1, total_memory_bytes: 1 << 30, peak_flops: 1e12, gpu: None };
        let error =
            || Error::Tensor(candle_core::Error::Msg(format!("DriverError({OUT_OF_MEMORY}, \"out of memory\")")));
        let mut config = JobConfig::default();
        config.activation_checkpoint.mode = AcMode::Full;
        let told = classes.explain(error(), "activations", &config, &facts).to_string();
        assert!(told.contains("A card is out of memory, taking more for activations"), "{told}");
        assert!(told.contains("a smaller training.local_batch_size than 8"), "{told}");
        config.activation_checkpoint.mode = AcMode::None;
        assert!(classes.explain(error(), "activations", &config, &facts).to_string().contains("\"full\""));
        let small = DeviceFacts { total_memory_bytes: 1 << 28, ..facts.clone() };
        assert!(classes.explain(error(), "moments", &config, &small).to_string().contains("enable_cpu_offload"));
        let other = Error::Data("no".into());
        assert_eq!(classes.explain(other, "activations", &config, &facts).to_string(), "no");
    }
}

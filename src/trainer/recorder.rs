//! Steps that a GPU repeats without being told each launch: small models wait for launches more than for arithmetic.

use candle_core::{CudaDevice, Device};
use tracing::{info, warn};

use super::Trainer;
use super::step::Part;
use crate::Result;
use crate::engine;
use crate::models::decoder::Sequence;
use crate::tools::gpu::{self, Graph};
use crate::tools::profiler;

/// Equal steps before one is recorded: by then all is loaded and chosen that a first step loads and chooses.
const WARM_UP: usize = 2;

/// Watches steps until they are alike, records one, and repeats it for as long as they stay so.
pub struct Recorder {
    device: CudaDevice,
    state: State,
}

enum State {
    Watching { alike: Option<(Key, usize)> },
    Recorded(Recording),
}

/// What a recorded step holds fixed: the shapes of its micro-batches, and the bits of their factors.
type Key = Vec<(Vec<usize>, u64)>;

struct Recording {
    key: Key,
    graph: Graph,
    /// What the launches read: the tokens of each step are written there.
    parts: Vec<Part>,
    /// Tables and masks that the launches read.
    _contexts: Vec<Sequence>,
}

fn key(parts: &[Part]) -> Key {
    parts.iter().map(|(batch, scale)| (batch.tokens.dims().to_vec(), scale.to_bits())).collect()
}

impl Recorder {
    /// `None`, and why in the log, where steps cannot be repeated.
    pub fn new(trainer: &Trainer) -> Option<Self> {
        if !trainer.config.compile.enable {
            return None;
        }
        let Device::Cuda(device) = &trainer.device else { return None };
        let in_the_way = if trainer.model.args().masks_documents() {
            Some("attention stays inside documents, which differ from step to step")
        } else if trainer.model.adapters().is_some_and(|adapters| adapters.dropout().is_on()) {
            Some("dropout differs from step to step")
        } else if trainer.config.training.enable_cpu_offload {
            Some("training.enable_cpu_offload has the host take part in each")
        } else {
            None
        };
        match in_the_way {
            Some(why) => {
                info!("compile.enable: steps are not recorded, as {why}");
                None
            }
            None => {
                info!("compile.enable: steps are recorded as a CUDA graph, and repeated while their shapes stay");
                Some(Self { device: device.clone(), state: State::Watching { alike: None } })
            }
        }
    }

    /// Does a step, up to what the optimizer has found out. `None`: steps are not to be recorded any more.
    pub fn step(mut self, trainer: &Trainer, parts: &[Part]) -> Result<Option<Self>> {
        let key = key(parts);
        if profiler::is_on() {
            trainer.enqueue(parts)?; // A profile wants to see each op.
            return Ok(Some(self));
        }
        match &mut self.state {
            State::Recorded(recording) if recording.key == key => {
                for ((from, _), (to, _)) in parts.iter().zip(&recording.parts) {
                    to.tokens.slice_set(&from.tokens, 0, 0)?;
                    to.labels.slice_set(&from.labels, 0, 0)?;
                }
                recording.graph.launch()?;
            }
            State::Watching { alike: Some((alike, n)) } if *alike == key && *n >= WARM_UP => {
                // What is shared by the passes is made, and used once, before recording: nothing may be uploaded then.
                let contexts = contexts(trainer, parts)?;
                trainer.enqueue_in(parts, &contexts)?;
                let parts = parts.to_vec();
                gpu::trim_pool(&self.device)?;
                match Graph::record(&self.device, || trainer.enqueue_in(&parts, &contexts)) {
                    Ok(graph) => {
                        self.state = State::Recorded(Recording { key, graph, parts, _contexts: contexts });
                    }
                    Err(error) => {
                        warn!(
                            "compile.enable: this step cannot be recorded, so that each launch is made anew: {error}"
                        );
                        return Ok(None);
                    }
                }
            }
            State::Watching { alike: Some((alike, n)) } if *alike == key => {
                *n += 1;
                trainer.enqueue(parts)?;
            }
            _ => {
                self.state = State::Watching { alike: Some((key, 1)) };
                trainer.enqueue(parts)?;
            }
        }
        Ok(Some(self))
    }
}

fn contexts(trainer: &Trainer, parts: &[Part]) -> Result<Vec<Sequence>> {
    parts.iter().map(|(batch, _)| engine::context(&trainer.model, batch)).collect()
}

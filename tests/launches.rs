//! How many kernels a block launches on a GPU. In a process of its own, as launches are counted by the process.
#![cfg(feature = "cuda")]

use candle_core::{DType, Device, Tensor};
use titan::autograd::Precision;
use titan::engine::{self, MicroBatch, Recompute};
use titan::models::args::DecoderArgs;
use titan::models::{self, Decoder};
use titan::{Result, ops};

#[path = "common/devices.rs"]
mod devices;
use devices::devices;

const MOST: u64 = 60;

/// What a step of the debug model with its first layers launches, forward and backward with full recomputation.
fn launches(n_layers: usize, device: &Device) -> Result<u64> {
    let (b, s) = (2, 64);
    let args = DecoderArgs { n_layers, max_seq_len: s, ..models::flavor("llama4", "debugmodel").expect("it is there") };
    let mut model = Decoder::new(&args, None)?;
    model.allocate(Precision { storage: DType::F32, compute: DType::BF16 }, device, true)?;
    model.parameters().try_for_each(|parameter| models::initialize(parameter, 0))?;
    let tokens = Tensor::arange(0u32, (b * s) as u32, device)?.reshape((b, s))?;
    let before = ops::launches();
    engine::forward_backward(&model, &MicroBatch::new(tokens.clone(), tokens), 1.0, Recompute::All)?;
    Ok(ops::launches() - before)
}

#[test]
fn a_block_that_is_recomputed_launches_at_most_sixty_kernels() -> Result<()> {
    for device in devices().iter().filter(|device| device.is_cuda()) {
        let of_layers = |n| launches(n, device);
        let [one, two, three] = [of_layers(1)?, of_layers(2)?, of_layers(3)?];
        let (experts, dense) = (two - one, three - two);
        println!("a dense block launches {dense} kernels, one with experts {experts}");
        assert!(dense.max(experts) <= MOST, "dense {dense}, with experts {experts}");
    }
    Ok(())
}

use candle_core::Tensor;

use crate::Result;
use crate::autograd::Value;

/// What one layer keeps of the tokens so far: keys and values, or the latents that both are made from.
#[derive(Debug, Default)]
pub struct LayerCache {
    /// `(b, capacity, heads, width)` each, filled up to `len`; grown by doubling.
    buffers: Vec<Tensor>,
    len: usize,
}

impl LayerCache {
    /// Appends one `(b, s, heads, width)` to each of the `N` buffers, and returns all that they hold.
    pub fn extend<const N: usize>(&mut self, new: [&Value; N]) -> Result<[Value; N]> {
        let needed = self.len + new[0].tensor().dim(1)?;
        if self.buffers.first().is_none_or(|buffer| buffer.dims()[1] < needed) {
            let grown = new.iter().enumerate().map(|(i, new)| -> Result<Tensor> {
                let (b, _, heads, width) = new.tensor().dims4()?;
                let shape = (b, needed.next_power_of_two(), heads, width);
                let buffer = Tensor::zeros(shape, new.tensor().dtype(), new.tensor().device())?;
                if let Some(old) = self.buffers.get(i) {
                    buffer.slice_set(&old.narrow(1, 0, self.len)?.contiguous()?, 1, 0)?;
                }
                Ok(buffer)
            });
            self.buffers = grown.collect::<Result<_>>()?;
        }
        for (buffer, new) in self.buffers.iter().zip(&new) {
            buffer.slice_set(&new.tensor().contiguous()?, 1, self.len)?;
        }
        self.len = needed;
        let held = |i: usize| Ok(Value::constant(self.buffers[i].narrow(1, 0, needed)?));
        let held: Vec<Value> = (0..N).map(held).collect::<Result<_>>()?;
        Ok(held.try_into().unwrap_or_else(|_| unreachable!("one value per buffer")))
    }

    /// Numbers kept per token.
    #[cfg(test)]
    pub fn width(&self) -> usize {
        self.buffers.iter().map(|buffer| buffer.dims()[2..].iter().product::<usize>()).sum()
    }
}

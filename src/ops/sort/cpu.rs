use candle_core::{Device, Tensor};

use super::Groups;
use crate::Result;
use crate::ops::host::indices;

pub fn stable_sort(keys: &Tensor, _bound: usize) -> Result<(Tensor, Tensor)> {
    let keys = indices(keys)?;
    let keys: &[u32] = &keys;
    let n = keys.len();
    let mut order: Vec<u32> = (0..n as u32).collect();
    order.sort_by_key(|i| keys[*i as usize]);
    let sorted = order.iter().map(|i| keys[*i as usize]).collect();
    Ok((Tensor::from_vec(order, n, &Device::Cpu)?, Tensor::from_vec(sorted, n, &Device::Cpu)?))
}

pub fn group(groups: &Tensor, n_groups: usize) -> Result<Groups> {
    let groups = indices(groups)?;
    let groups: &[u32] = &groups;
    let n = groups.len();
    let mut offsets = vec![0u32; n_groups + 1];
    groups.iter().for_each(|group| offsets[*group as usize + 1] += 1);
    (0..n_groups).for_each(|group| offsets[group + 1] += offsets[group]);
    let mut next = offsets.clone();
    let (mut order, mut positions) = (vec![0u32; n], vec![0u32; n]);
    for (i, group) in groups.iter().enumerate() {
        let position = &mut next[*group as usize];
        order[*position as usize] = i as u32;
        positions[i] = *position;
        *position += 1;
    }
    let tensor = |values: Vec<u32>| {
        let n = values.len();
        Tensor::from_vec(values, n, &Device::Cpu)
    };
    Ok(Groups { order: tensor(order)?, positions: tensor(positions)?, offsets: tensor(offsets)? })
}

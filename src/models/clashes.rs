//! Arguments that no decoder can be built with.

use super::args::{DecoderArgs, MoeArgs, RopeLayout};

/// Arguments that contradict each other, or that nothing can be built with.
#[derive(Debug)]
pub struct Clash {
    /// Paths within [`DecoderArgs`].
    pub keys: &'static [&'static str],
    pub what: String,
    pub remedy: String,
}

fn clash(keys: &'static [&'static str], what: impl Into<String>, remedy: impl Into<String>) -> Clash {
    Clash { keys, what: what.into(), remedy: remedy.into() }
}

impl DecoderArgs {
    /// Every clash between arguments; none in a model that can be built.
    pub fn clashes(&self) -> Vec<Clash> {
        // Sizes first: the other rules divide by them and multiply them.
        if let Some(clash) = self.impossible_size() {
            return vec![clash];
        }
        let mut clashes = Vec::new();
        match self.kv_lora_rank {
            None => self.grouped_attention(&mut clashes),
            Some(_) => self.latent_attention(&mut clashes),
        }
        self.rotary_positions(&mut clashes);
        self.feed_forward(&mut clashes);
        if let Some(moe) = &self.moe_args {
            experts(moe, &mut clashes);
        }
        clashes
    }

    fn impossible_size(&self) -> Option<Clash> {
        let Self { dim, n_layers, n_heads, vocab_size, multiple_of, max_seq_len, original_seq_len, .. } = *self;
        let Self { interleave_moe_layer_step, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } = *self;
        let sizes = [
            [dim, n_layers, n_heads, vocab_size, multiple_of, max_seq_len, original_seq_len, interleave_moe_layer_step],
            [
                qk_nope_head_dim,
                qk_rope_head_dim,
                v_head_dim,
                self.n_kv_heads.unwrap_or(1),
                self.head_dim.unwrap_or(1),
                self.kv_lora_rank.unwrap_or(1),
                self.every_n_layers_nope.unwrap_or(1),
                self.fixed_attn_block_size.unwrap_or(1),
            ],
        ];
        let widths = [self.hidden_dim, self.inter_dim, self.moe_inter_dim].map(|width| width.unwrap_or(1));
        let mut sizes = sizes.into_iter().flatten().chain(widths);
        if sizes.clone().any(|size| size == 0) {
            return Some(clash(&[], "a size is 0", "sizes must be at least 1"));
        }
        let beyond = sizes.any(|size| size >= 1 << 32) || self.q_lora_rank >= 1 << 32;
        beyond.then(|| clash(&[], "a size is beyond any machine", "sizes must be below 2^32"))
    }

    fn grouped_attention(&self, clashes: &mut Vec<Clash>) {
        let Self { dim, n_heads, .. } = *self;
        let n_kv_heads = self.n_kv_heads();
        if self.head_dim.is_none() && !dim.is_multiple_of(n_heads) {
            let nearest = dim.div_ceil(n_heads) * n_heads;
            clashes.push(clash(
                &["dim", "n_heads"],
                format!("`dim` {dim} does not divide into {n_heads} heads"),
                format!("`dim` must be a multiple of `n_heads`, or `head_dim` given; nearest: {nearest}"),
            ));
        }
        if !n_heads.is_multiple_of(n_kv_heads) {
            // No model has more heads; a slip of twelve digits should not take minutes.
            let allowed = (1..=n_heads.min(1000)).filter(|n| n_heads.is_multiple_of(*n)).map(|n| n.to_string());
            clashes.push(clash(
                &["n_kv_heads", "n_heads"],
                format!("{n_heads} query heads cannot share {n_kv_heads} key/value heads equally"),
                format!("`n_kv_heads` must divide `n_heads`; allowed: {}", allowed.collect::<Vec<_>>().join(", ")),
            ));
        }
        if self.q_lora_rank > 0 {
            clashes.push(clash(
                &["q_lora_rank", "kv_lora_rank"],
                "only latent attention makes queries from a latent",
                "set `kv_lora_rank`, or `q_lora_rank` to 0",
            ));
        }
    }

    fn latent_attention(&self, clashes: &mut Vec<Clash>) {
        let mut means_nothing = |keys, what: &str, remedy: &str| clashes.push(clash(keys, what, remedy));
        if self.n_kv_heads.is_some_and(|n| n != self.n_heads) {
            means_nothing(
                &["n_kv_heads", "kv_lora_rank"],
                "latent attention has a key and a value for every query head",
                "leave out `n_kv_heads`, or `kv_lora_rank` for grouped-query attention",
            );
        }
        if self.head_dim.is_some() {
            means_nothing(
                &["head_dim", "kv_lora_rank"],
                "the heads of latent attention have other widths",
                "set `qk_nope_head_dim`, `qk_rope_head_dim` and `v_head_dim` instead of `head_dim`",
            );
        }
        if self.qk_norm {
            means_nothing(
                &["qk_norm", "kv_lora_rank"],
                "latent attention norms its latents instead of queries and keys",
                "set `qk_norm` to false",
            );
        }
    }

    fn rotary_positions(&self, clashes: &mut Vec<Clash>) {
        let (keys, unmoved): (&[_], _) = match (self.kv_lora_rank, self.head_dim) {
            (Some(_), _) => (&["qk_rope_head_dim", "qk_nope_head_dim"], self.qk_nope_head_dim),
            (None, Some(_)) => (&["head_dim"], 0),
            (None, None) => (&["dim", "n_heads"], 0),
        };
        let rotary = self.rope_dim();
        let has_heads = self.kv_lora_rank.is_some() || self.head_dim.is_some() || self.dim.is_multiple_of(self.n_heads);
        if has_heads && !rotary.is_multiple_of(2) {
            let what = format!("heads of {rotary} numbers cannot rotate in pairs");
            clashes.push(clash(keys, what, "the width of a head must be even"));
        } else if !unmoved.is_multiple_of(2) && self.rope_layout == RopeLayout::Pairs {
            let what = format!("{unmoved} numbers before those that rotate would part a pair");
            clashes.push(clash(keys, what, "`qk_nope_head_dim` must be even, or `rope_layout` \"halves\""));
        }
        if self.rope_factor.is_some() && self.rope_scaling_args.is_some() {
            clashes.push(clash(
                &["rope_factor", "rope_scaling_args"],
                "wavelengths cannot be stretched in two ways",
                "set one of `rope_factor` and `rope_scaling_args` to \"none\"",
            ));
        }
    }

    fn feed_forward(&self, clashes: &mut Vec<Clash>) {
        if self.ffn_hidden_dim() == 0 {
            let what = "the feed-forward would have no width";
            clashes.push(clash(&["ffn_dim_multiplier"], what, "raise `ffn_dim_multiplier`"));
        }
        if let (Some(hidden_dim), Some(inter_dim)) = (self.hidden_dim, self.inter_dim)
            && hidden_dim != inter_dim
        {
            clashes.push(clash(
                &["hidden_dim", "inter_dim"],
                format!("a dense feed-forward cannot be {hidden_dim} and {inter_dim} wide"),
                "they are two names of one width: set one",
            ));
        }
    }
}

fn experts(moe: &MoeArgs, clashes: &mut Vec<Clash>) {
    let n = moe.num_experts;
    if !(1..=n).contains(&moe.top_k) {
        clashes.push(clash(
            &["moe_args.top_k", "moe_args.num_experts"],
            format!("a token cannot go to {} of {n} experts", moe.top_k),
            "`top_k` must be at least 1 and at most `num_experts`",
        ));
    }
    const GROUPS: &[&str] = &["moe_args.num_expert_groups", "moe_args.num_limited_groups"];
    match (moe.num_expert_groups, moe.num_limited_groups) {
        (None, None) => {}
        (Some(groups), Some(limit)) => {
            if !(1..=n).contains(&groups) || !n.is_multiple_of(groups) {
                clashes.push(clash(
                    &["moe_args.num_expert_groups", "moe_args.num_experts"],
                    format!("{n} experts do not fall into {groups} equal groups"),
                    "`num_expert_groups` must divide `num_experts`",
                ));
            } else if !(1..=groups).contains(&limit) {
                let what = format!("a token cannot be limited to {limit} of {groups} groups");
                clashes.push(clash(GROUPS, what, "`num_limited_groups` must be at most `num_expert_groups`"));
            } else if n / groups * limit < moe.top_k {
                clashes.push(clash(
                    &["moe_args.top_k", "moe_args.num_limited_groups", "moe_args.num_expert_groups"],
                    format!("{limit} groups of {} experts hold less than `top_k` = {}", n / groups, moe.top_k),
                    "raise `num_limited_groups`, or lower `top_k`",
                ));
            }
        }
        _ => clashes.push(clash(GROUPS, "one of two numbers that belong together is missing", "set both, or neither")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{FAMILIES, family, flavor};

    #[test]
    fn no_flavor_clashes_with_itself() {
        for (family, flavors) in FAMILIES {
            for name in *flavors {
                assert!(flavor(family, name).unwrap().clashes().is_empty(), "{family}/{name}");
            }
        }
    }

    #[test]
    fn every_clash_names_its_keys() {
        let (llama, deepseek) = (family("llama3").unwrap(), family("deepseek_v3").unwrap());
        let moe = |change: fn(&mut MoeArgs)| {
            let mut args = deepseek.clone();
            args.moe_args.iter_mut().for_each(change);
            args
        };
        let cases = [
            (DecoderArgs { n_heads: 3, ..llama.clone() }, "dim n_heads"),
            (DecoderArgs { n_kv_heads: Some(5), ..llama.clone() }, "n_kv_heads n_heads"),
            (DecoderArgs { head_dim: Some(7), ..llama.clone() }, "head_dim"),
            (DecoderArgs { q_lora_rank: 8, ..llama.clone() }, "q_lora_rank kv_lora_rank"),
            (DecoderArgs { rope_factor: Some(4.0), ..llama.clone() }, "rope_factor rope_scaling_args"),
            (DecoderArgs { hidden_dim: Some(8), inter_dim: Some(9), ..llama.clone() }, "hidden_dim inter_dim"),
            (DecoderArgs { ffn_dim_multiplier: Some(1e-9), ..llama.clone() }, "ffn_dim_multiplier"),
            (DecoderArgs { head_dim: Some(0), ..llama }, ""),
            (DecoderArgs { n_kv_heads: Some(8), ..deepseek.clone() }, "n_kv_heads kv_lora_rank"),
            (DecoderArgs { head_dim: Some(64), ..deepseek.clone() }, "head_dim kv_lora_rank"),
            (DecoderArgs { qk_norm: true, ..deepseek.clone() }, "qk_norm kv_lora_rank"),
            (DecoderArgs { qk_rope_head_dim: 9, ..deepseek.clone() }, "qk_rope_head_dim qk_nope_head_dim"),
            (DecoderArgs { qk_nope_head_dim: 9, ..deepseek.clone() }, "qk_rope_head_dim qk_nope_head_dim"),
            (moe(|moe| moe.top_k = 9), "moe_args.top_k moe_args.num_experts"),
            (moe(|moe| moe.num_expert_groups = Some(2)), "moe_args.num_expert_groups moe_args.num_limited_groups"),
            (
                moe(|moe| (moe.num_expert_groups, moe.num_limited_groups) = (Some(3), Some(1))),
                "moe_args.num_expert_groups moe_args.num_experts",
            ),
            (
                moe(|moe| (moe.num_expert_groups, moe.num_limited_groups) = (Some(2), Some(3))),
                "moe_args.num_expert_groups moe_args.num_limited_groups",
            ),
            (
                moe(|moe| (moe.num_expert_groups, moe.num_limited_groups, moe.top_k) = (Some(4), Some(1), 3)),
                "moe_args.top_k moe_args.num_limited_groups moe_args.num_expert_groups",
            ),
        ];
        for (args, keys) in cases {
            let found: Vec<_> = args.clashes().iter().map(|clash| clash.keys.join(" ")).collect();
            assert_eq!(found, [keys]);
        }
    }
}
